"""What a phase cannot do without: its weights and the prefix read once, its products at the rate of a large one.

Shapes   bytes, FLOP, seconds; letters as in gguf_export/graph.py's DIMS
Differs  results between operations are not in it; bandwidth and rate are measured with ggml too
"""

from collections import Counter, defaultdict

import numpy as np

from gguf_export.description import Graph, Leaf, Node
from gguf_export.devices import GPUS
from gguf_export.host_inputs import layer_inputs
from gguf_export.ops import tensor
from gguf_export.quantize import quantize
from gguf_export.runner import PREFILL_CHUNK, Prefix, Runner
from mlx_dgemma.gguf.types import TYPES

from .ggml_time import PHASES, single, timed


def floor(runner: Runner, cache: Prefix) -> dict:
    """Bytes and FLOP of each phase, what they take at the measured bandwidth and rate, and which of them binds."""
    bandwidth, (rate, type) = measured_bandwidth(runner), measured_rate(runner)
    C, P = runner.config.canvas_length, cache.length
    work = {"prefill": Counter()}
    for start in range(0, P, PREFILL_CHUNK):
        chunk = cache.shape(min(PREFILL_CHUNK, P - start))._replace(prefix=start)
        work["prefill"] += needed(runner.graph("prefill", chunk), cache.padding, writes_only=True)
    for name, phase in (("denoise", "denoise"), ("sample", "sample"), ("step", "denoise+sample")):
        work[name] = needed(runner.graph(phase, cache.shape(C)), cache.padding)
    work["commit"] = needed(runner.graph("prefill", cache.shape(C)), cache.padding, writes_only=True)
    phases = {}
    for name in PHASES:
        reading, computing = work[name]["bytes"] / bandwidth * 1e3, work[name]["flop"] / rate * 1e3
        phases[name] = {
            "bytes": work[name]["bytes"], "flop": work[name]["flop"],
            "read_ms": round(reading, 4), "compute_ms": round(computing, 4),
            "bound": "memory" if reading >= computing else "compute",
        }  # fmt: skip
    return {
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 2),
        "gflop_per_s": round(rate / 1e9, 2),
        "rate_of": type,
        "phases": phases,
    }


def needed(graph: Graph, padding, writes_only=False) -> Counter:
    """Bytes that must be read and FLOP of the products, each weight once, of experts those that tokens choose."""
    nodes = graph.wanted(graph.writes if writes_only else graph.targets)
    names, readers = graph.names, defaultdict(list)
    for node in nodes:
        for name in node.inputs:
            readers[name].append(node)
    nbytes = sum(_read(leaf, graph, readers[name]) for name, leaf in graph.leaves.items() if name in readers)
    masks = {n: int((v == 0).sum()) for n, v in layer_inputs(graph, padding).items() if graph.specs[n].type == "f16"}
    flop = sum(_flop(node, [graph.specs[i] for i in node.inputs], graph.specs[node.name], masks) for node in nodes)
    assert names["B"] == 1, "the masks of one row are counted"
    return Counter(bytes=round(nbytes), flop=round(flop))


def _read(leaf: Leaf, graph, readers):
    whole, names = leaf.spec.nbytes, graph.names
    if all(node.op == "cpy" for node in readers):  # which writes into it
        return 0
    if leaf.kind == "persistent" and leaf.spec.ne[1] in (names["R_sliding"], names["R_full"]):
        return whole * min(names["P"] + names["T"], leaf.spec.ne[1]) / leaf.spec.ne[1]
    if all(node.op == "get_rows" for node in readers):
        rows = sum(graph.specs[node.inputs[1]].elements for node in readers)
        return whole * min(1, rows / (leaf.spec.elements // leaf.spec.ne[0]))
    if all(node.op == "mul_mat_id" for node in readers):
        # What even routing would use; less where tokens agree.
        chosen, experts = graph.specs[readers[0].inputs[2]].ne[0], leaf.spec.ne[2]
        return whole * (1 - (1 - chosen / experts) ** names["M"])
    return whole


def _flop(node: Node, inputs, result, masks):
    if node.op in ("mul_mat", "mul_mat_id"):
        return 2 * inputs[0].ne[0] * result.elements
    if node.op == "out_prod":
        return 2 * inputs[0].ne[1] * result.elements
    if node.op == "flash_attn":  # of the pairs that the mask lets through
        D, _, heads, _ = inputs[0].ne
        return 4 * D * heads * masks[node.inputs[3]]
    return 0


def measured_bandwidth(runner: Runner) -> float:
    """Bytes per second, of a large copy (read and written) or of a matrix times a vector, whichever is faster."""
    nbytes = 1 << 30 if runner.executor.device.kind in GPUS else 1 << 28
    row = 4096
    copy = {"a": tensor("f32", nbytes // 4)}
    matrix = {"a": tensor("f32", row, nbytes // (4 * row)), "b": tensor("f32", row)}
    copied = single(runner, "cont", ("a",), copy, _fastest)
    multiplied = single(runner, "mul_mat", ("a", "b"), matrix, _fastest)
    return max(2 * nbytes / copied, nbytes / multiplied)


def measured_rate(runner: Runner) -> tuple[float, str]:
    """FLOP per second of a large product of the type that most of the weights have, and that type."""
    held = Counter()
    for name, spec in runner.stored.items():
        held[spec.type] += spec.nbytes if len(runner.model.file.tensors[name].shape) > 1 else 0
    type = held.most_common(1)[0][0]
    n, m = (8192, 1024) if runner.executor.device.kind in GPUS else (2048, 256)
    rng = np.random.default_rng(0)
    weights = quantize(rng.standard_normal((n, n), np.float32) / n**0.5, TYPES[type.upper()])
    fill = {"a": weights, "b": rng.standard_normal((m, n), np.float32)}
    specs = {"a": tensor(type, n, n), "b": tensor("f32", n, m)}
    return 2 * n * n * m / single(runner, "mul_mat", ("a", "b"), specs, _fastest, fill), type


def _fastest(compiled, repeat=7):
    return timed(lambda: compiled.run({}), repeat).fastest / 1e3
