"""What a rehearsal found, for people: tables on the screen, Markdown for a log."""

from rich.console import Console
from rich.table import Table

from mlx_dgemma.units import count, human_bytes

from .fullsize_make import released_config

PACKAGES = ("mlx", "xllamacpp", "gguf", "numpy")


def scaled(layers: int) -> str:
    """What to say of a rehearsal with fewer layers."""
    most = released_config()["text_config"]["num_hidden_layers"]
    if layers == most:
        return ""
    return f"scaled down: {layers} of the 26B's {most} layers; times and sizes are not the 26B's, memory may be less"


def print_result(result):
    """Tables for people, on stderr."""
    console, floors = Console(stderr=True), result["floor_seconds"]
    title = f"{result['to']} {result['recipe']}, {count(result['layers'], 'layer')}"
    table = Table("", "amount", "rate", "seconds", title=title)
    disk = result["disk"]
    amounts = {
        "read": (human_bytes(result["bytes_read"]), f"{human_bytes(max(disk['read_per_second']))}/s"),
        "quantize": (f"{sum(q['weights'] for q in result['quantizers']) / 1e9:.2f} G weights", _rates(result)),
        "write": (human_bytes(result["bytes_written"]), f"{human_bytes(max(disk['write_per_second']))}/s"),
    }
    for name, (amount, rate) in amounts.items():
        table.add_row(name, amount, rate, f"{floors[name]:.1f}")
    table.add_section()
    for name, seconds in (("all at once", floors["overlapped"]), ("one after the other", floors["in_turn"])):
        table.add_row(f"floor, {name}", "", "", f"{seconds:.1f} ({seconds / result['seconds']:.0%})")
    n = result["machine"]["cores"]
    cpu = f"{result['cpu_seconds']} s, of which system {result['system_seconds']}"
    table.add_row("its processor time, all cores", cpu, "", f"{result['cpu_seconds'] / n:.1f}")
    table.add_row("measured, with start and end", f"{result['cores_used']} of {n} cores", "", f"{result['seconds']}")
    console.print(table)
    for name, verdict in result["checks"].items():
        console.print(f"{verdict:<15} {name}", highlight=False)
    own = result["peak_own_bytes"]
    beside = "" if own is None else f", of which {human_bytes(own)} its own and the rest pages of mapped files"
    console.print(
        f"peak resident {human_bytes(result['peak_resident_bytes'])}{beside}; the page cache is not in it\n"
        f"written {human_bytes(result['bytes_written'])} = {result['bytes_written'] / 2**30:.2f} GiB of tensors, of "
        f"which text {human_bytes(result['text_bytes'])}; files {result['file_bytes']} bytes"
        f"{_others(result)}",
        highlight=False,
    )


def _others(result):
    others = result["other_cores"]
    return f"; other programs kept {others} cores busy meanwhile" if others and others > 0.1 else ""


def _rates(result):
    return ", ".join(f"{q['type']} {q['per_second'] / 1e6:.0f}" for q in result["quantizers"]) + " M/s"


def markdown(results: list[dict]) -> str:
    """A table, then the conditions of each line."""
    lines = [
        "| conversion | layers | seconds | floor: read, quantize, write | overlapped | in turn | peak resident "
        "| cores (processor time) | tensors | checks |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        floors = r["floor_seconds"]
        verdicts = list(r["checks"].values())
        failed = [name for name, verdict in r["checks"].items() if verdict == "failed"]
        cells = (
            f"{r['to']} {r['recipe']}",
            f"{r['layers']}{' (scaled down)' if scaled(r['layers']) else ''}",
            f"{r['seconds']:.0f}",
            ", ".join(f"{floors[name]:.0f}" for name in ("read", "quantize", "write")),
            *(f"{floors[name]:.0f} ({floors[name] / r['seconds']:.0%})" for name in ("overlapped", "in_turn")),
            human_bytes(r["peak_resident_bytes"]),
            f"{r['cores_used']} of {r['machine']['cores']} ({r['cpu_seconds']:.0f} s)",
            f"{r['bytes_written']} bytes = {r['bytes_written'] / 2**20:,.0f} MiB",
            f"{verdicts.count('ok')} ok" + "".join(f", **failed: {name}**" for name in failed),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += dict.fromkeys(_conditions(r) for r in results)  # each once
    return "\n".join(lines)


def _conditions(r):
    m, disk = r["machine"], r["disk"]
    packages = ", ".join(f"{name} {m[name]}" for name in PACKAGES if m[name])
    read, write = (" and ".join(human_bytes(n) for n in disk[f"{way}_per_second"]) for way in ("read", "write"))
    dropped = "dropped from" if disk["source_dropped_from_cache"] else "possibly in"
    return (
        f"- {r['to']} {r['recipe']}: {m['cores']} cores, {m['system']}, Python {m['python']}, {packages}; disk before "
        f"and after: reads {read}/s, writes {write}/s ({disk['cache_avoided_by']}); source {dropped} the page cache; "
        f"quantizer {_rates(r)}{_others(r)}"
    )
