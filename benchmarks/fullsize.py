"""A rehearsal of the 26B's conversion at its full size: python -m benchmarks.fullsize make|convert|report

    python -m benchmarks.fullsize make build/full                                    # 51.6 GB; --layers 6: 12 GB
    python -m benchmarks.fullsize convert build/full build/full-q4 --to mlx --recipe q4
    python -m benchmarks.fullsize convert build/full build/full-Q4_K_M.gguf --to gguf --recipe Q4_K_M
    python -m benchmarks.fullsize report build/rehearsal.jsonl                       # Markdown

`make` writes a checkpoint of the released layout with random weights (fullsize_make.py); each result needs up to 17 GB
more. `convert` runs `python -m convert` as a process of its own and measures time and memory beside the floor: the
bytes it must read and write at the disk's rate and the weights it must quantize at the quantizer's, rates measured on
the spot before and after (fullsize_measure.py). It checks sizes and memory, prints one JSON line, keeps it for `report`
(fullsize_report.py), and exits with 1 where a check fails.
"""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from convert.api import plan_of
from convert.checkpoint import open_checkpoint
from convert.recipes import DEFAULTS, TARGETS, find_recipe
from gguf_export.quantize import cores
from mlx_dgemma.config import parse_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.files import check_writable
from mlx_dgemma.gguf.reader import read_gguf
from mlx_dgemma.progress import Bars
from mlx_dgemma.shards import stored_tensors
from mlx_dgemma.tensors import is_vision

from .fullsize_make import ROOT, make, released_config, shards_of
from .fullsize_measure import PIECE, SAMPLE, check_system, disk_rates, drop_from_cache, quantizer_rates, watch
from .fullsize_report import PACKAGES, markdown, print_result, scaled

MOST_MEMORY = 3_000_000_000
# What the full model must come to. 15.5 GB are the text weights; the vision tower, kept in bfloat16, is 1.15 GB more.
Q4_TEXT_BYTES, Q4_K_M_MIB = 15_500_000_000, 16_013


def main(argv=None) -> int:
    options = parse(argv)
    try:
        return {"make": run_make, "convert": run_convert, "report": run_report}[options.command](options)
    except DgemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fullsize", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    layout = commands.add_parser("make", help="write a checkpoint of the 26B's layout")
    layout.add_argument("dir", type=Path, metavar="DIR")
    layout.add_argument("--layers", type=int, metavar="N", help="only so many of the 30 layers, where disk is short")
    layout.add_argument("--seed", type=int, default=0)
    conversion = commands.add_parser("convert", help="convert it, measured")
    conversion.add_argument("dir", type=Path, metavar="DIR")
    conversion.add_argument("out", type=Path, metavar="OUT")
    conversion.add_argument("--to", choices=TARGETS, default="mlx")
    conversion.add_argument("--recipe", metavar="R", help="as python -m convert takes it (default: q4, Q4_K_M)")
    kept = "keep the result here (default: DIR/../rehearsal.jsonl)"
    conversion.add_argument("--json", type=Path, metavar="FILE", help=kept)
    report = commands.add_parser("report", help="Markdown of kept results")
    report.add_argument("files", type=Path, nargs="+", metavar="FILE")
    options = parser.parse_args(argv)
    if options.command == "make" and options.seed < 0:
        layout.error(f"--seed is {options.seed}, expected 0 or more")
    return options


def run_make(options) -> int:
    raw = released_config(options.layers)
    config = parse_config(raw)
    total = sum(2 * t.size for shard in shards_of(config) for t in shard)
    if note := scaled(config.num_hidden_layers):
        print(note, file=sys.stderr)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Bars(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("make", total=total)
        made = make(options.dir, raw, options.seed, wrote=lambda n: progress.advance(task, n))
    print(json.dumps({"out": str(options.dir), **made}))
    return 0


def run_convert(options) -> int:
    check_system()
    recipe = options.recipe or DEFAULTS[options.to]
    kept = options.json or Path(os.path.abspath(options.dir)).parent / "rehearsal.jsonl"
    check_writable(kept)
    result = rehearse(options.dir, options.out, options.to, recipe, SAMPLE, PIECE)
    print_result(result)
    line = json.dumps(result)
    print(line, flush=True)  # before it is kept: a disk that has filled up meanwhile loses nothing
    try:
        with kept.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise DgemmaError(f"{kept}: cannot be written ({error.strerror}); append the line above yourself") from None
    return 1 if "failed" in result["checks"].values() else 0


def rehearse(folder: Path, out: Path, to: str, recipe: str, sample: int, piece: int) -> dict:
    """Convert `folder` and measure. Raises DgemmaError where the conversion fails.

    sample: bytes for one rate of the disk; piece: weights for one rate of the quantizer.
    """
    checkpoint = open_checkpoint(folder)
    found = find_recipe(recipe, to)
    plan = plan_of(checkpoint, to, found)
    weights = checkpoint.weights.tensors.values()
    files = sorted({t.file for t in weights})
    layers = checkpoint.config.num_hidden_layers
    if note := scaled(layers):
        print(note, file=sys.stderr)
    scratch = out.with_name(out.name + ".rate")
    dry_run = json.loads(_converted(watch(_command(folder, None, to, recipe, "--dry-run"), ROOT)).output)
    before, quantizers = disk_rates(files, scratch, sample), quantizer_rates(plan, piece)
    dropped = drop_from_cache(files)
    run = _converted(watch(_command(folder, out, to, recipe), ROOT))
    after = disk_rates(files, scratch, sample)
    # Other work on the machine only lowers a rate, and the floor wants the highest.
    quantizers = [max(pair) for pair in zip(quantizers, quantizer_rates(plan, piece), strict=True)]
    # A GGUF of this kind holds the text model only.
    read = sum(t.nbytes for name, t in checkpoint.weights.tensors.items() if to == "mlx" or not is_vision(name))
    written = tensor_bytes(out)
    seconds = {
        "read": read / max(before.read, after.read),
        "quantize": sum(q.seconds for q in quantizers),
        "write": sum(written.values()) / max(before.write, after.write),
    }
    result = {
        "layers": layers,
        "to": to,
        "recipe": recipe,
        "seconds": round(run.seconds, 2),
        "floor_seconds": {
            **{name: round(value, 2) for name, value in seconds.items()},
            "overlapped": round(max(seconds.values()), 2),
            "in_turn": round(sum(seconds.values()), 2),
        },
        "bytes_read": read,
        "bytes_written": sum(written.values()),
        "text_bytes": sum(n for name, n in written.items() if not is_vision(name)),
        "dry_run_bytes": dry_run["bytes"],
        "reported_bytes": json.loads(run.output)["bytes"],
        "file_bytes": sum(f.stat().st_size for f in (out.rglob("*") if out.is_dir() else [out])),
        "peak_resident_bytes": run.peak_bytes,
        "peak_own_bytes": run.peak_own_bytes,
        "cpu_seconds": round(run.cpu_seconds, 2),
        "system_seconds": round(run.system_seconds, 2),
        "cores_used": round(run.cpu_seconds / run.seconds, 2),
        "other_cores": None if run.other_cores is None else round(run.other_cores, 2),
        "disk_read_bytes": run.read_bytes,
        "disk_written_bytes": run.written_bytes,
        "disk": {
            "read_per_second": [round(before.read), round(after.read)],
            "write_per_second": [round(before.write), round(after.write)],
            "cache_avoided_by": before.how,
            "source_dropped_from_cache": dropped,
        },
        "quantizers": [
            {"type": q.type, "weights": q.weights, "per_second": round(q.per_second), "seconds": round(q.seconds, 2)}
            for q in quantizers
        ],
        "machine": machine(),
    }
    return result | {"checks": checks(result)}


def _command(folder, out, to, recipe, *options):
    paths = [os.path.abspath(path) for path in (folder, out) if path is not None]
    return [sys.executable, "-m", "convert", *paths, "--to", to, "--recipe", recipe, "--json", *options]


def _converted(run):
    if run.code:
        raise DgemmaError(f"the conversion ended with exit code {run.code}, expected 0; its error is above")
    return run


def tensor_bytes(out: Path) -> dict[str, int]:
    """Name → bytes of every tensor, from the headers of what was written."""
    tensors = stored_tensors(out) if out.is_dir() else read_gguf(out).tensors
    return {name: t.nbytes for name, t in tensors.items()}


def checks(result: dict) -> dict[str, str]:
    """Name → "ok", "failed" or "does not apply"."""
    full = not scaled(result["layers"])
    kind = (result["to"], result["recipe"])
    found = {
        "tensor bytes as --dry-run says": result["bytes_written"] == result["dry_run_bytes"],
        "tensor bytes as convert reports": result["bytes_written"] == result["reported_bytes"],
        "resident memory at most 3 GB": result["peak_resident_bytes"] <= MOST_MEMORY,
        "text weights of MLX q4 at most 15.5 GB": (
            result["text_bytes"] <= Q4_TEXT_BYTES if full and kind == ("mlx", "q4") else None
        ),
        "tensors of GGUF Q4_K_M 16,013 MiB": (
            round(result["bytes_written"] / 2**20) == Q4_K_M_MIB if full and kind == ("gguf", "Q4_K_M") else None
        ),
    }
    return {name: {True: "ok", False: "failed", None: "does not apply"}[value] for name, value in found.items()}


def machine() -> dict:
    system = f"{platform.system()} {platform.machine()}"
    found = {"cores": cores(), "system": system, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def run_report(options) -> int:
    print(markdown([result for path in options.files for result in _kept(path)]))
    return 0


def _kept(path):
    """The results in a file, each complete enough to be reported."""
    results = []
    try:
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                results.append(json.loads(line))
                _check_result(results[-1], f"{path}, line {i}")
    except (OSError, ValueError) as error:
        raise DgemmaError(f"{path}: cannot be read ({error}), expected lines that `convert` has kept") from None
    return results


def _check_result(result, where):
    try:
        markdown([result])
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        found = f"{type(error).__name__}: {error}"
        raise DgemmaError(f"{where}: is no result ({found}), expected lines that `convert` has kept") from None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
