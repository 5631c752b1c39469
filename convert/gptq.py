"""Rounding that makes up for its errors: what one column gets wrong, the columns after it take back.

Shapes   rows (rows, row) float32; products (row, row): what the inputs' channels multiply to, summed over inputs;
         factor (row, row), upper triangular: the Cholesky factor of the products' inverse
Source   GPTQ (arXiv 2210.17323): the order, the factor, the updates by blocks; refit.py for scales and biases
Differs  a group's scale is fitted when its first column is reached, and columns stay in their order, because MLX's
         groups lie side by side. What somebody else rounds in whole blocks, as ggml does, gets updates between blocks.
         Damping and the other experts' share are measured here (docs/log.md)

factors.py keeps factors, correlations.py collects what they are made from; everything here is pure.
"""

from collections.abc import Callable

import numpy as np

from mlx_dgemma.floats import to_float32

from .recipes_mlx import Precision
from .refit import pack, rounded

DAMPING = 0.1  # of the mean diagonal, added to all of it
STRETCH = 512  # columns after which those behind hear of the errors at once: many passes over all of them would cost
PIECE = 1 << 22  # weights rounded at once: by small ones the interpreter, which threads share, is busy all the time
OTHERS = 0.02  # of the mean expert's products, added to every expert's: some see few inputs, or none


def with_others(products: np.ndarray) -> np.ndarray:
    """(experts, row, row) → the same, each with a share of what the others saw."""
    if len(products) == 1:
        return products
    return products + OTHERS * products.mean(axis=0)


def factor(products: np.ndarray) -> np.ndarray:
    """(row, row) → (row, row) float32 U with UᵀU = (products + damping)⁻¹; the identity where nothing was seen."""
    damped = products.astype(np.float64)
    mean = np.diag(damped).mean()
    if mean <= 0:
        return np.eye(len(products), dtype=np.float32)
    damped.flat[:: len(damped) + 1] += DAMPING * mean
    inverse = np.linalg.inv(damped)
    del damped  # of the widest inputs half a gigabyte
    return np.ascontiguousarray(np.linalg.cholesky(inverse).T, np.float32)


def gptq(
    values: np.ndarray,
    factor: np.ndarray,
    fit: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    dtype: str,
    precision: Precision,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words, scales and biases of an affine precision. values: (rows, row) float32.

    fit: one group of every row, (rows, G) float32 → its scales and biases (rows, 1), stored as `dtype`.
    """
    G, most = precision.group_size, 2**precision.bits - 1
    left = np.array(values.T, np.float32, order="C")  # (row, rows): what is still to be rounded, columns side by side
    codes, errors = np.empty(left.shape, np.uint8), np.empty_like(left)
    stored = []
    for begin in range(0, len(left), STRETCH):
        end = min(begin + STRETCH, len(left))
        for start in range(begin, end, G):
            stop = start + G
            group, local = left[start:stop], factor[start:stop, start:stop]
            stored.append(fit(np.ascontiguousarray(group.T)))
            scale, bias = (to_float32(a, dtype)[:, 0] for a in stored[-1])
            for j, column in enumerate(group):
                codes[start + j] = code = rounded(column, scale, bias, most)
                errors[start + j] = (column - (code * scale + bias)) / local[j, j]
                group[j + 1 :] -= local[j, j + 1 :, None] * errors[start + j]
            left[stop:end] -= factor[start:stop, stop:end].T @ errors[start:stop]
        left[end:] -= factor[begin:end, end:].T @ errors[begin:end]
    scales, biases = (np.concatenate(parts, axis=1) for parts in zip(*stored, strict=True))
    return pack(np.ascontiguousarray(codes.T), precision.bits), scales, biases


def gptq_by_blocks(
    values: np.ndarray, factor: np.ndarray, block: int, pack: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Rows whose blocks of columns are rounded as a whole; values: (rows, row) float32 → their blocks' bytes, in order.

    pack: (rows, block) float32 and the number of its first column → its bytes (rows, …), its values once read back.
    """
    left, done = np.array(values.T, np.float32, order="C"), []  # columns side by side
    errors = np.empty_like(left)
    for begin in range(0, len(left), STRETCH):
        end = min(begin + STRETCH, len(left))
        for start in range(begin, end, block):
            stop = start + block
            here, local = left[start:stop], factor[start:stop, start:stop]
            packed, rounded = pack(np.ascontiguousarray(here.T), start)
            done.append(packed)
            # What columns would have passed on one by one: the errors through the inverse of their part of the factor.
            errors[start:stop] = np.linalg.solve(local.T, here - rounded.T)
            left[stop:end] -= factor[start:stop, stop:end].T @ errors[start:stop]
        left[end:] -= factor[begin:end, end:].T @ errors[begin:end]
    return np.concatenate(done, axis=1)
