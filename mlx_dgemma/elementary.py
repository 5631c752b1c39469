"""e^x, and what the model makes of it: softcap and gelu.

Source   range reduction as in Cody and Waite 1980; the polynomial is a Chebyshev fit of degree 6 made here
Differs  MLX's CPU backend computes exp and tanh number by number (11 and 17 ns each, docs/log.md) but additions and
         products many at a time; there e^x is put together from those, three times as fast, to 1.2e-7 of its value.
         A GPU has instructions for it
"""

import math

import mlx.core as mx
import numpy as np

from .products import on_cpu

LEAST = -87.0  # e^LEAST is about the smallest float32 that is not denormal; what lies below counts as this
# ln 2 in two parts: the first has so few bits that k × LN2 is exact.
LN2, LN2_REST = 0.693359375, math.log(2) - 0.693359375
SMALL = 1 << 14  # numbers for which twenty operations cost more to begin than they save
ROUND = 1.5 * 2.0**23  # adding it rounds a float32 to a whole number
_points = np.cos(np.pi * (np.arange(200) + 0.5) / 200) * math.log(2) / 2
POLYNOMIAL = np.polynomial.Chebyshev.fit(_points, np.exp(_points), 6).convert(kind=np.polynomial.Polynomial).coef


def exp(x):
    """e^x for float32 up to 88; a CPU may take what lies below LEAST for LEAST."""
    if not on_cpu() or x.size < SMALL:
        return mx.exp(x)
    x = mx.clip(x, LEAST, 88.0)
    k = (x * (1 / math.log(2)) + ROUND) - ROUND
    r = x - k * LN2 - k * LN2_REST  # within ln 2 / 2 of zero
    *lower, second, first = map(float, POLYNOMIAL)
    p = r * first + second
    for factor in reversed(lower):
        p = p * r + factor
    # 2^k by its bits: the exponent of a float32 stands behind 23 others.
    return p * mx.left_shift(k.astype(mx.int32) + 127, mx.array(23, mx.int32)).view(mx.float32)


def softcap(x, cap: float, scale: float = 1.0):
    """scale × cap × tanh(x / cap), float32"""
    x = x.astype(mx.float32)
    if not on_cpu():
        return mx.tanh(x / cap) * (cap * scale)
    return (cap * scale) * (1 - 2 / (exp(x * (2 / cap)) + 1))


def gelu(x):
    """Tanh-approximated GELU, as x × sigmoid(2u); tanh(u) = 2 × sigmoid(2u) − 1."""
    if not on_cpu():
        return x * mx.sigmoid(_twice_u(x))
    wide = x.astype(mx.float32)
    return (wide / (1 + exp(-_twice_u(wide)))).astype(x.dtype)


def _twice_u(x):
    return (2 * math.sqrt(2 / math.pi)) * (x + 0.044715 * x * x * x)
