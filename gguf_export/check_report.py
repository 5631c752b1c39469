"""`python -m gguf_export check`: one description, one file, maybe one device, as facts and as text."""

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.model import open_gguf
from mlx_dgemma.units import count, human_bytes

from .choices import chosen_options
from .description import Graph, Shape, chain, read_description, rounded
from .expansion import expand
from .graph import describe_model
from .graph_check import check, fallbacks, stored_specs
from .memory import Split, plan
from .text import write_text


def report(
    path: str,
    description: str | None = None,
    device: str | None = None,
    prefix: int | None = None,
    ops: str | None = None,
    **given: str | None,
) -> dict:
    """Everything `check` says, as a dictionary. Raises DgemmaError for the first thing wrong.

    prefix: tokens before the canvas, for memory and device; by default 4096, or what the context allows. ops: a file to
    write the operations into. given: options as Runner takes them; the rest are what `run` would choose.
    """
    model = open_gguf(path)
    found = read_description(description) if description else describe_model(model)
    checked = check(found, model)
    longest = model.config.max_position_embeddings - model.config.canvas_length
    prefix = min(4096, longest) if prefix is None else prefix
    if not 0 <= prefix <= longest:
        raise DgemmaError(f"--prefix is {prefix}, expected 0 to {longest}: context less canvas")
    C, W = model.config.canvas_length, model.config.sliding_window
    shape = Shape(1, 512, prefix, rounded(W - 1 + max(C, 512)), rounded(prefix + max(C, 512)))
    types = stored_specs(model.file)
    library = chosen = None
    if device or ops:
        from .devices import check_version, choose, open_ggml

        library = open_ggml()
        check_version(found, library)
        chosen = choose(library, device) if device else None
    options = chosen_options(found, model, on_cpu=chosen is not None and chosen.kind == "cpu", **given)

    def graphs(**changes) -> list[Graph]:
        def make(phase):
            return expand(found, phase, shape, options | changes, types)

        return [make("prefill"), chain(make("denoise"), make("sample"))]

    result = {
        "file": str(path),
        "description": description or "made from the file",
        "format": "{name} {major}.{minor}".format(**found["format"]),
        "fingerprint": found["model"]["fingerprint"],
        "nodes": checked.nodes,
        "templates": checked.templates,
        "combinations": checked.combinations,
        "weights": checked.weights,
        "prefix": prefix,
        "options": options,
        "memory": {kind: _memory(graphs(self_conditioning=kind)) for kind in ("top-k", "exact")},
    }
    if chosen:
        rows = [row._asdict() for graph in graphs() for row in fallbacks(library, chosen, graph)]
        result |= {"device": chosen.name, "fallbacks": rows}
    if ops:
        from .op_tests import op_lines

        lines = op_lines(library, [*graphs(), *graphs(attention="exact", self_conditioning="exact", form="cpu")])
        write_text(ops, "\n".join(lines) + "\n")
        result |= {"ops": len(lines), "ops_file": ops}
    return result


def _memory(graphs):
    """Weights, prefix and the most that either graph computes in."""
    weights = {n: x for g in graphs for n, x in g.leaves.items() if x.kind in ("weight", "derived")}
    plans = [plan(list(weights.values()), graph, Split(0)) for graph in graphs]
    return plans[1]._replace(compute=max(p.compute for p in plans))._asdict()


def as_text(result: dict) -> str:
    """For people."""
    nodes = ", ".join(f"{phase} {n}" for phase, n in result["nodes"].items())
    per_layer = ", ".join(f"{n} in a {kind} layer" for kind, n in result["templates"].items())
    lines = [
        f"{result['format']}, {result['description']}: it belongs to {result['file']}",
        f"nodes          {nodes}; {per_layer}",
        f"shapes         agree in all {result['combinations']} combinations of phase, options and sizes",
        f"weights        all {result['weights']} are used",
    ]
    lines.append("options        " + ", ".join(f"{name} {value}" for name, value in result["options"].items()))
    for kind, m in result["memory"].items():
        total = human_bytes(sum(m.values()))
        parts = ", ".join(f"{name} {human_bytes(n)}" for name, n in m.items())
        lines.append(f"memory         {total} at a prefix of {result['prefix']}, self-conditioning {kind}: {parts}")
    if "device" in result:
        rows = result["fallbacks"]
        lines.append(f"{result['device']:14} " + ("runs every operation" if not rows else "leaves these to the CPU:"))
        for row in rows:
            lines.append(
                f"  {row['op']} → {row['result']}: {count(row['nodes'], 'node')} of {row['phase']}, as {row['node']}"
            )
    if "ops" in result:
        lines.append(f"operations     {result['ops']} written to {result['ops_file']}")
    return "\n".join(lines)
