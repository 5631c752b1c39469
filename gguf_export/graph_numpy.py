"""The oracle: any phase of a graph description, computed plainly in numpy, float32 throughout.

Shapes   arrays are slowest axis first, always four axes: a tensor with ne [a, b, c, d] is an array (d, c, b, a)
Source   ggml.h's comments and ggml's CPU kernels
Differs  weights are dequantized; gelu is computed, where ggml's CPU looks it up in a float16 table; sums run in numpy's
         order

Slow, and meant to be: a disagreement with it is somebody else's mistake.
"""

from collections.abc import Callable

import numpy as np

from .description import Graph
from .ops import Spec

KINDS = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "i64": np.int64}


def compute(graph: Graph, values: dict[str, np.ndarray], targets=None) -> dict[str, np.ndarray]:
    """Every node's value by name.

    values: every leaf by name, in its spec's shape (quantized weights in float32). Persistent tensors are changed in
    place. targets: compute what these nodes need; all of the graph by default.
    """
    done = dict(values)
    for node in graph.nodes if targets is None else graph.wanted(targets):
        arguments = [done[name] for name in node.inputs]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            result = COMPUTE[node.op](*arguments, **node.params)
        shape = graph.specs[node.name].ne[::-1]
        assert result.shape == shape, (node.name, node.op, result.shape, shape)
        done[node.name] = result
    return done


def kind_of(spec: Spec) -> type:
    """The numpy type of a tensor; weights are float32."""
    return KINDS.get(spec.type, np.float32)


def _float(a):
    return a.astype(np.float32, copy=False)


def _get_rows(a, ids):
    # ids (1, b2, b1, n) into a (b2, b1, rows, row)
    _, b2, b1, _ = ids.shape
    rows = np.stack([np.stack([a[j, i][ids[0, j, i]] for i in range(b1)]) for j in range(b2)])
    return rows if rows.dtype == np.int32 else _float(rows)


def _set_rows(target, rows, ids):
    target[0, 0, ids.ravel()] = rows[0, 0].astype(target.dtype)
    return target


def _repeat_heads(a, like):
    """a's batches, each as often as the batches of `like` ask for."""
    for axis in (0, 1):
        a = np.repeat(a, like.shape[axis] // a.shape[axis], axis)
    return a


def _mul_mat(a, b, precision="default"):
    return b @ np.swapaxes(_repeat_heads(_float(a), b), -1, -2)


def _mul_mat_id(experts, b, ids):
    # experts (1, E, out, in), b (1, M, 1 or K, in), ids (1, 1, M, K) → (1, M, K, out)
    chosen, (M, K) = ids[0, 0], ids.shape[2:]
    x = np.broadcast_to(b[0], (M, K, b.shape[-1]))
    out = np.empty((1, M, K, experts.shape[2]), np.float32)
    for expert in np.unique(chosen):
        token, place = np.nonzero(chosen == expert)
        out[0, token, place] = x[token, place] @ experts[0, expert].T
    return out


def _rms_norm(a, eps):
    return a / np.sqrt(np.mean(a * a, axis=-1, keepdims=True) + np.float32(eps))


def _tiled(b, like):
    return np.tile(b, [n // m for n, m in zip(like.shape, b.shape, strict=True)])


def _rope(a, positions, factors=None, *, dims, base, style):
    half = dims // 2
    frequency = base ** (-2.0 * np.arange(half) / dims)
    if factors is not None:
        frequency = frequency / factors.ravel()[:half]
    angle = positions.ravel()[:, None].astype(np.float64) * frequency  # (tokens, half)
    cos, sin = (f(angle).astype(np.float32)[None, :, None] for f in (np.cos, np.sin))
    low, high = a[..., :half], a[..., half:dims]
    return np.concatenate([low * cos - high * sin, low * sin + high * cos, a[..., dims:]], axis=-1)


def _soft_max(a, mask=None, *, scale=1.0):
    scores = a * np.float32(scale) + (0 if mask is None else _float(mask))
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _flash_attn(q, k, v, mask, *, scale):
    shares = _soft_max(q @ np.swapaxes(_repeat_heads(_float(k), q), -1, -2), mask, scale=scale)
    return np.swapaxes(shares @ _repeat_heads(_float(v), q), 1, 2)  # (B, T, N, D)


def _gelu(x):
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)))


def _geglu(a):
    gate, up = np.split(a, 2, axis=-1)
    return _gelu(gate) * up


def _shaped(a, shape):
    return a.reshape((*shape, 1, 1, 1)[:4][::-1])


def _view(a, shape, strides, offset):
    ne, steps = (*shape, 1, 1, 1)[:4], (*strides, 0, 0, 0)[:4]
    flat = np.ascontiguousarray(a).reshape(-1)[offset:]
    return np.lib.stride_tricks.as_strided(flat, ne[::-1], [s * a.itemsize for s in steps[::-1]], writeable=False)


def _permute(a, axes):
    order = [0] * 4  # ne axis axes[i] of the result is axis i of a
    for i, axis in enumerate(axes):
        order[3 - axis] = 3 - i
    return np.transpose(a, order)


def _cpy(a, target):
    target[...] = a.reshape(target.shape)
    return target


def _argsort(a, order):
    return np.argsort(-a if order == "descending" else a, axis=-1, kind="stable").astype(np.int32)


def _top_k(a, k):
    return _argsort(a, "descending")[..., :k]


COMPUTE: dict[str, Callable[..., np.ndarray]] = {
    "get_rows": _get_rows,
    "set_rows": _set_rows,
    "mul_mat": _mul_mat,
    "mul_mat_id": _mul_mat_id,
    "out_prod": lambda a, b: np.swapaxes(b, -1, -2) @ a,
    "rms_norm": _rms_norm,
    "add": lambda a, b: a + _tiled(b, a),
    "sub": lambda a, b: a - _tiled(b, a),
    "mul": lambda a, b: a * _tiled(b, a),
    "div": lambda a, b: a / _tiled(b, a),
    "scale": lambda a, factor, bias=0.0: a * np.float32(factor) + np.float32(bias),
    "rope": _rope,
    "flash_attn": _flash_attn,
    "soft_max": _soft_max,
    "geglu": _geglu,
    "geglu_split": lambda gate, up: _gelu(gate) * up,
    "reshape": _shaped,
    "view": _view,
    "permute": _permute,
    "cont": np.ascontiguousarray,
    "cast": lambda a, type: a.astype(KINDS[type]),
    "cpy": _cpy,
    "repeat": lambda a, shape: _tiled(a, np.broadcast_to(np.float32(0), (*shape, 1, 1, 1)[:4][::-1])),
    "pad": lambda a, right: np.pad(a, [(0, 0)] * 3 + [(0, right)]),
    "argsort": _argsort,
    "argsort_top_k": _top_k,
    "top_k": _top_k,
    "argmax": lambda a: a[0, 0].argmax(axis=-1).astype(np.int32)[None, None, None],
    "cumsum": lambda a: np.cumsum(a, axis=-1, dtype=np.float32),
    "sum_rows": lambda a: a.sum(axis=-1, keepdims=True),
    "log": np.log,
    "tanh": np.tanh,
    "silu": lambda a: a / (1 + np.exp(-a)),
    "step": lambda a: (a > 0).astype(np.float32),
    "clamp": lambda a, min, max: np.where(a < max, np.where(a > min, a, np.float32(min)), np.float32(max)),
    "arange": lambda stop: np.arange(stop, dtype=np.float32)[None, None, None],
}


def first_difference(graph: Graph, ours: dict, theirs: dict, tolerance: float) -> str | None:
    """The first node, in order, whose two values differ by more than `tolerance`; None where all agree.

    Both are compared where both have a value; NaN equals nothing.
    """
    for node in graph.nodes:
        if node.name in ours and node.name in theirs:
            a, b = (np.asarray(v[node.name], np.float64).ravel() for v in (ours, theirs))
            if a.shape != b.shape or not (np.abs(a - b) <= tolerance).all():
                return node.name
    return None
