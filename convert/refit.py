"""Scales and biases fitted to the rounded weights: less error for the same bytes, with MLX's affine modes.

Shapes   rows (rows, row) float32 in groups of G weights; codes (groups, G) from 0 to 2^bits − 1; code × scale + bias
Source   least squares between two roundings, as ggml's make_qkx2_quants ends each of its tries; packing as in verify.py
Differs  mx.quantize lets scale and bias span a group's range, so its extremes are exact and all else pays for it, and
         rounds both to the stored type after it has chosen the codes. ggml also tries narrower ranges: a little less
         error again, for several times the time (docs/log.md)
"""

import numpy as np

from mlx_dgemma.floats import from_float32, to_float32

from .recipes_mlx import Precision

ROUNDS = 4  # of rounding and fitting; twice as many win another half per cent


def refit(
    values: np.ndarray, scales: np.ndarray, biases: np.ndarray, dtype: str, precision: Precision
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words, scales and biases with at most the error of these scales and biases, which are stored as `dtype`.

    values: (rows, row) float32.
    """
    groups = values.reshape(-1, precision.group_size)
    most = 2**precision.bits - 1
    scale, bias = (to_float32(a, dtype).reshape(-1, 1) for a in (scales, biases))
    codes = rounded(groups, scale, bias, most)
    best, least = (codes, scale, bias), _error(groups, codes, scale, bias)
    # From the range itself: a start from mx.quantize's scales, in which zero is exact, ends in more error.
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    scale, bias = (high - low) / most, low
    codes = rounded(groups, scale, bias, most)
    for _ in range(ROUNDS):
        scale, bias = (to_float32(from_float32(a, dtype), dtype) for a in _fit(groups, codes, scale))
        codes = rounded(groups, scale, bias, most)
        error = _error(groups, codes, scale, bias)
        # A fit may come out worse where the stored type rounds it, and the next one better all the same.
        better = error < least
        least = np.where(better, error, least)
        best = tuple(np.where(better, new, old) for new, old in zip((codes, scale, bias), best, strict=True))
    codes, scale, bias = best
    words = pack(codes.astype(np.uint8).reshape(values.shape), precision.bits)
    return words, *(from_float32(a, dtype).reshape(scales.shape) for a in (scale, bias))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (rows, row) uint8 → words (rows, row × bits / 32) uint32: eight codes in `bits` bytes, the lowest first."""
    eights = codes.reshape(len(codes), -1, 8).astype(np.uint64)
    wide = (eights << (np.arange(8, dtype=np.uint64) * np.uint64(bits))).sum(axis=-1, dtype=np.uint64)
    filled = np.ascontiguousarray(wide[..., None].view(np.uint8)[..., :bits])
    return filled.reshape(len(codes), -1).view(np.uint32)


def rounded(groups, scale, bias, most):
    """Codes from 0 to `most`, as float32; 0 where a scale is."""
    with np.errstate(over="ignore"):
        codes = np.rint((groups - bias) / np.where(scale == 0, np.inf, scale))
    return np.clip(codes, 0, most).astype(np.float32, copy=False)


def _error(groups, codes, scale, bias):
    return np.square(codes * scale + bias - groups).sum(axis=-1, keepdims=True)


def _fit(groups, codes, scale):
    """The scale and bias of least squared error for these codes; the old scale where all codes are equal."""
    n = groups.shape[-1]
    mean, mean_code = groups.mean(axis=-1, keepdims=True), codes.mean(axis=-1, keepdims=True)
    centred = codes - mean_code
    spread = np.square(centred).sum(axis=-1, keepdims=True)
    fitted = np.divide((centred * groups).sum(axis=-1, keepdims=True), spread, out=scale.copy(), where=spread > 1 / n)
    return fitted, mean - fitted * mean_code
