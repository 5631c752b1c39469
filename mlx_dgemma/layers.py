"""Matrices, norms, rotary positions and the gated MLP: the parts that know nothing of attention or experts.

Shapes   B rows, T tokens, N heads, D head_dim, H hidden, I dense MLP
Source   transformers 5.23.0, modeling_diffusion_gemma.py
Differs  cos and sin stay float32 for bfloat16 models (transformers rounds them to the model's type)
"""

import mlx.core as mx
import mlx.nn as nn

from .config import LayerConfig
from .elementary import gelu
from .products import Packing, packed_product


class Linear(nn.Linear):
    """y = x @ weightᵀ; packed by nn.quantize into a PackedLinear."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def to_quantized(self, group_size: int, bits: int, mode: str, quantize_input: bool = False):
        del quantize_input  # nn.quantize passes it to every layer
        return PackedLinear(self.weight, Packing(group_size, bits, mode))


class PackedLinear(nn.Module):
    """A quantized matrix, or one for each expert."""

    def __init__(self, weight, packing: Packing):
        super().__init__()
        self.weight, self.scales, *biases = mx.quantize(weight, **packing._asdict())
        if biases:
            self.biases = biases[0]
        self.packing = packing
        self.freeze()

    @property
    def arrays(self):
        return [self[name] for name in ("weight", "scales", "biases") if name in self]

    def __call__(self, x):
        return packed_product(x, self.arrays, self.packing)


class RMSNorm(nn.Module):
    """x / rms(x) × weight, in float32. The weight is used as stored: no + 1 as in earlier Gemma models."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = mx.ones((size,))
        self._eps = eps

    def __call__(self, x):
        return mx.fast.rms_norm(x, self.weight, self._eps)


def unit_rms(x, eps):
    """RMSNorm without a weight."""
    return mx.fast.rms_norm(x, None, eps)


class Rope:
    """Rotary positions over (B, N, T, D): pair i is (x[i], x[i + D/2]).

    Full layers rotate only the first `rotated_pairs` ("proportional" RoPE): the exponent's denominator is the whole
    head_dim and the other pairs keep frequency 0, an infinite wavelength.
    """

    def __init__(self, layer: LayerConfig):
        pair = mx.arange(layer.head_dim // 2)
        wavelength = layer.rope_theta ** (2 * pair / layer.head_dim)
        self.wavelength = mx.where(pair < layer.rotated_pairs, wavelength, mx.inf)  # (D/2,)
        self.head_dim = layer.head_dim

    def __call__(self, x, first):
        """`first` is the position of x[:, :, 0]: a number, or (B,) with one per row."""
        return mx.fast.rope(
            x, self.head_dim, traditional=False, base=None, scale=1.0, offset=first, freqs=self.wavelength
        )


def geglu(gate, up):
    """Tanh-approximated GELU of the gate, times up."""
    return gelu(gate) * up


class MLP(nn.Module):
    """(…, H) → (…, H)"""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_proj = Linear(hidden, inner)
        self.up_proj = Linear(hidden, inner)
        self.down_proj = Linear(inner, hidden)

    def __call__(self, x):
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))
