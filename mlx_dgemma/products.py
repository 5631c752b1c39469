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

from .fits import Activations, ram

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
    if on_cpu():
        return ram()
    info = mx.device_info()
    return info.get("max_recommended_working_set_size") or info.get("total_memory")


def activations(dtype, packed: bool) -> Activations:
    """How the default device computes."""
    return Activations(dtype.size, on_cpu(), packed)


def packed_product(x, arrays, packing: Packing, transpose: bool = True):
    """x @ matrixᵀ, or without `transpose` x @ matrix. arrays: packed values, scales, and biases where it has them."""
    if not on_cpu():
        return mx.quantized_matmul(x, *arrays, transpose=transpose, **packing._asdict())
    wide = x.astype(mx.float32)  # in which MLX's CPU backend would otherwise not sum
    if x.size // x.shape[-1] > FEW_ROWS:
        matrix = unpacked(arrays, packing)
        return (wide @ (matrix.T if transpose else matrix)).astype(x.dtype)
    arrays = [arrays[0], *(a if a.dtype == mx.uint8 else a.astype(mx.float32) for a in arrays[1:])]
    return mx.quantized_matmul(wide, *arrays, transpose=transpose, **packing._asdict()).astype(x.dtype)


def unpacked(arrays, packing: Packing):
    """The matrix in float32."""
    return mx.dequantize(*arrays, **packing._asdict(), dtype=mx.float32)


def expert_product(x, weight, experts):
    """x (M, 1, in), weight (E, out, in), experts (M,) ascending → (M, 1, out)"""
    if on_cpu():
        return _one_by_one(x, experts, [weight], lambda arrays: arrays[0].astype(mx.float32).T)
    return mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=True)


def packed_expert_product(x, arrays, packing: Packing, experts, transpose: bool = True):
    """`expert_product` with packed matrices; without `transpose` x (M, 1, out) → (M, 1, in)."""
    if on_cpu():
        return _one_by_one(
            x, experts, arrays, lambda one: unpacked(one, packing).T if transpose else unpacked(one, packing)
        )
    how = packing._asdict()
    return mx.gather_qmm(x, *arrays, rhs_indices=experts, transpose=transpose, sorted_indices=True, **how)


def _one_by_one(x, experts, arrays, matrix):
    """One product for each expert that some token chose."""
    bounds = np.searchsorted(np.array(experts), np.arange(len(arrays[0]) + 1)).tolist()
    flat, parts = x[:, 0].astype(mx.float32), []
    for e, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            one = [a[e : e + 1].reshape(a.shape[1:]) for a in arrays]  # views: `a[e]` would copy
            if parts:  # one after the other: unpacked side by side they would all be in memory at once
                one = mx.depends(one, parts[-1:])
            parts.append(flat[start:stop] @ matrix(one))
    return mx.concatenate(parts)[:, None].astype(x.dtype)
