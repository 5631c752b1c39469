"""Operations of a description → nodes of a ggml graph.

Source   ggml.h; the names here are ops.py's, the functions ggml's
Differs  none of ggml's own checks is relied on: ggml ends the process where one fails, so ops.py checked before
"""

import contextlib
import ctypes
from collections.abc import Callable

from mlx_dgemma.gguf.types import BY_NUMBER

from .description import Graph
from .ggml import Ggml, InitParams
from .ops import PLAIN, Spec

TYPE_NUMBERS = {t.name.lower(): t.number for t in BY_NUMBER.values()}
MAX_NAME = 63  # characters, ggml's limit
NEOX = 2  # GGML_ROPE_TYPE_NEOX
ORDERS = {"ascending": 0, "descending": 1}
PRECISION_F32 = 10  # GGML_PREC_F32


def _rope(g, c, spec, a, positions, factors=None, *, dims, base, style):
    # no YaRN: context and betas unused, frequencies not scaled, no correction, amplitude 1
    return g.ggml_rope_ext(c, a, positions, factors, dims, NEOX, 0, base, 1.0, 0.0, 1.0, 0.0, 0.0)


def _flash_attn(g, c, spec, q, k, v, mask, *, scale):
    result = g.ggml_flash_attn_ext(c, q, k, v, mask, scale, 0.0, 0.0)
    # Scores reach tens, since attention is not scaled: half-precision sums would lose what decides.
    g.ggml_prec_set_acc(result, PRECISION_F32)
    return result


def _mul_mat(g, c, spec, a, b, precision="default"):
    result = g.ggml_mul_mat(c, a, b)
    if precision == "f32":
        g.ggml_prec_set_acc(result, PRECISION_F32)
    return result


def _view(g, c, spec, a, shape, strides, offset):
    unit = PLAIN[spec.type]
    return g.ggml_view_4d(c, a, *spec.ne, *(s * unit for s in spec.strides[1:]), offset * unit)


def _call(name):
    """A function of tensors alone."""
    return lambda g, c, spec, *inputs: getattr(g, f"ggml_{name}")(c, *inputs)


BUILD: dict[str, Callable] = {
    **{name: _call(name) for name in (
        "get_rows", "set_rows", "out_prod", "mul_mat_id", "add", "sub", "mul", "div", "geglu", "geglu_split", "cont",
        "cpy", "argmax", "cumsum", "sum_rows", "log", "tanh", "silu", "step")},
    "mul_mat": _mul_mat,
    "rms_norm": lambda g, c, spec, a, eps: g.ggml_rms_norm(c, a, eps),
    "scale": lambda g, c, spec, a, factor, bias=0.0: g.ggml_scale_bias(c, a, factor, bias),
    "rope": _rope,
    "flash_attn": _flash_attn,
    "soft_max": lambda g, c, spec, a, mask=None, *, scale=1.0: g.ggml_soft_max_ext(c, a, mask, scale, 0.0),
    "reshape": lambda g, c, spec, a, shape: g.ggml_reshape_4d(c, a, *spec.ne),
    "view": _view,
    "permute": lambda g, c, spec, a, axes: g.ggml_permute(c, a, *axes),
    "cast": lambda g, c, spec, a, type: g.ggml_cast(c, a, TYPE_NUMBERS[type]),
    "repeat": lambda g, c, spec, a, shape: g.ggml_repeat_4d(c, a, *spec.ne),
    "pad": lambda g, c, spec, a, right: g.ggml_pad(c, a, right, 0, 0, 0),
    "argsort": lambda g, c, spec, a, order: g.ggml_argsort(c, a, ORDERS[order]),
    "argsort_top_k": lambda g, c, spec, a, k: g.ggml_argsort_top_k(c, a, k),
    "top_k": lambda g, c, spec, a, k: g.ggml_top_k(c, a, k),
    "clamp": lambda g, c, spec, a, min, max: g.ggml_clamp(c, a, min, max),
    "arange": lambda g, c, spec, stop: g.ggml_arange(c, 0.0, float(stop), 1.0),
}  # fmt: skip


def build_nodes(g: Ggml, context, graph: Graph, nodes, handles: dict[str, int]) -> dict[str, int]:
    """ggml's tensors by name: `handles` (every leaf that `nodes` read) and the nodes."""
    made = dict(handles)
    for node in nodes:
        spec = graph.specs[node.name]
        tensor = build_node(g, context, node.op, spec, [made[i] for i in node.inputs], node.params)
        nbytes = g.ggml_nbytes(tensor)
        assert nbytes == spec.nbytes or not spec.contiguous, f"{node}: ggml makes {nbytes} bytes, expected {spec}"
        g.ggml_set_name(tensor, node.name.encode()[:MAX_NAME])
        made[node.name] = tensor
    return made


def new_tensor(g: Ggml, context, name: str, spec: Spec) -> int:
    """A tensor without data."""
    handle = g.ggml_new_tensor(context, TYPE_NUMBERS[spec.type], 4, (ctypes.c_int64 * 4)(*spec.ne))
    g.ggml_set_name(handle, name.encode()[:MAX_NAME])
    return handle


def new_context(g: Ggml, n_tensors: int, graph_size: int = 0) -> int:
    """Room for the headers of tensors and of one graph; no data."""
    room = g.ggml_tensor_overhead() * (n_tensors + 1)
    if graph_size:
        room += g.ggml_graph_overhead_custom(graph_size, False)
    return g.ggml_init(InitParams(room, None, True))


@contextlib.contextmanager
def dry_graph(g: Ggml, graph: Graph):
    """A graph's tensors by name, without memory for data: for questions about operations."""
    # A top-k sort is two of ggml's nodes, so there is room for twice as many.
    context = new_context(g, 2 * len(graph.nodes) + len(graph.leaves))
    try:
        leaves = {leaf.name: new_tensor(g, context, leaf.name, leaf.spec) for leaf in graph.leaves.values()}
        yield build_nodes(g, context, graph, graph.nodes, leaves)
    finally:
        g.ggml_free(context)


def build_node(g: Ggml, context, op: str, spec: Spec, inputs: list, params: dict):
    """One node; returns ggml's tensor."""
    return BUILD[op](g, context, spec, *inputs, **params)
