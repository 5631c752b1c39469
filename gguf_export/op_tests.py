"""A description's operations as llama.cpp's `test-backend-ops test --test-file FILE` reads them, one per line.

Source   llama.cpp pull request 19896, tests/export-graph-ops.cpp: number of the operation, type, ne, parameters,
         sources (type, ne, nb), name
Differs  the operations come from a graph description, not from a llama.cpp model

The numbers are those of the ggml that built the graph, so the file is for a llama.cpp of about the same age.
"""

import struct
from collections.abc import Iterable

from mlx_dgemma.errors import DgemmaError

from .description import Graph
from .ggml import Ggml
from .ggml_graph import dry_graph, new_context, new_tensor
from .ops import VIEWS, tensor


def op_lines(g: Ggml, graphs: Iterable[Graph]) -> list[str]:
    """One line per distinct operation. Raises DgemmaError where this library lays tensors out differently."""
    _check_layout(g)
    lines = {}
    for graph in graphs:
        with dry_graph(g, graph) as tensors:
            for node in graph.nodes:
                if node.op in VIEWS:
                    continue
                handle = tensors[node.name]
                if node.op == "argsort_top_k":  # a view of the sort, which is what computes
                    handle = g.layout(handle).src[0]
                line = _line(g, handle)
                lines.setdefault(line, node.name)
    return [f"{line} {name}" for line, name in lines.items()]


def _line(g, handle):
    t = g.layout(handle)
    sources = []
    for source in t.src:
        if not source:
            break
        s = g.layout(source)
        sources.append(f"{s.type} {_numbers(s.ne)} {_numbers(s.nb)}")
    return " ".join(
        (f"{t.op} {t.type} {_numbers(t.ne)} {len(t.op_params)} {_numbers(t.op_params)} {len(sources)}", *sources)
    )


def _numbers(array):
    return " ".join(str(n) for n in array)


def _check_layout(g):
    """What was put into a tensor must be found where TensorLayout says."""
    context = new_context(g, 4)
    try:
        a = new_tensor(g, context, "a", tensor("f16", 3, 5, 7, 11))
        b = g.ggml_rms_norm(context, new_tensor(g, context, "b", tensor("f32", 4)), 0.25)
        found, norm = g.layout(a), g.layout(b)
        eps = struct.unpack("<f", struct.pack("<i", norm.op_params[0]))[0]
        right = (found.type, [*found.ne], [*found.nb], eps, bool(norm.src[0]), norm.src[1])
        if right != (1, [3, 5, 7, 11], [2, 6, 30, 210], 0.25, True, None):
            raise DgemmaError(
                f"{g.file}: lays tensors out in a way not known here; use ggml 0.25 or 0.26 for this export"
            )
    finally:
        g.ggml_free(context)
