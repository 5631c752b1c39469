"""Products with weights, packed or not: one kernel on a GPU; on a CPU what MLX's backend there does fast.

Shapes   x (…, in), matrix (out, in), experts' matrices (E, out, in); M pairs of token and expert, sorted by expert
Source   mx.quantized_matmul, mx.gather_mm, mx.gather_qmm
Differs  MLX's CPU backend multiplies packed weights value by value and gathered matrices row by row, 5 to 25 times
         slower than BLAS on the unpacked ones (docs/log.md). There a matrix is unpacked for the product and forgotten
"""

from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

FEW_ROWS = 4  # up to here MLX's own packed product is no slower


class Packing(NamedTuple):
    """How a weight is quantized, as mx.quantize names it."""

    group_size: int
    bits: int
    mode: str


def on_cpu() -> bool:
    return mx.default_device().type == mx.cpu


def device_memory() -> int | None:
    """Bytes that the default device can hold; None where nobody says."""
    info = mx.device_info()
    return info.get("max_recommended_working_set_size") or info.get("total_memory")


def packed_product(x, arrays, packing: Packing, transpose: bool = True):
    """x @ matrixᵀ, or without `transpose` x @ matrix. arrays: packed values, scales, and biases where it has them."""
    how = packing._asdict()
    if on_cpu() and x.size // x.shape[-1] > FEW_ROWS:
        matrix = mx.dequantize(*arrays, **how, dtype=mx.float32)
        return (x.astype(mx.float32) @ (matrix.T if transpose else matrix)).astype(x.dtype)
    return mx.quantized_matmul(x, *arrays, transpose=transpose, **how)


def expert_product(x, weight, experts):
    """x (M, 1, in), weight (E, out, in), experts (M,) ascending → (M, 1, out)"""
    if on_cpu():
        return _one_by_one(x, experts, weight.shape[0], lambda e: _one(weight, e))
    return mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=True)


def packed_expert_product(x, arrays, packing: Packing, experts, transpose: bool = True):
    """`expert_product` with packed matrices; without `transpose` x (M, 1, out) → (M, 1, in)."""
    how = packing._asdict()
    if on_cpu():

        def unpacked(e):
            matrix = mx.dequantize(*(_one(a, e) for a in arrays), **how, dtype=mx.float32)
            return matrix if transpose else matrix.T

        return _one_by_one(x, experts, arrays[0].shape[0], unpacked)
    return mx.gather_qmm(x, *arrays, rhs_indices=experts, transpose=transpose, sorted_indices=True, **how)


def _one(arrays, e):
    """Matrix e of several, as a view: `arrays[e]` would copy it."""
    return arrays[e : e + 1].reshape(arrays.shape[1:])


def _one_by_one(x, experts, n_experts, matrix):
    """One product for each expert that some token chose."""
    bounds = np.searchsorted(np.array(experts), np.arange(n_experts + 1)).tolist()
    flat = x[:, 0].astype(mx.float32)
    parts = [flat[a:b] @ matrix(e).astype(mx.float32).T for e, (a, b) in enumerate(pairwise(bounds)) if a < b]
    return mx.concatenate(parts)[:, None].astype(x.dtype)
