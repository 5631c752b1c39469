"""The mixture of experts beside each layer's dense MLP.

Shapes   T tokens (rows flattened), H hidden, E experts, F one expert, K experts per token
Source   transformers 5.23.0, DiffusionGemmaTextRouter and DiffusionGemmaTextExperts
Differs  tokens are sorted by expert, so each expert's weights are read once; transformers loops over experts
"""

import mlx.core as mx
import mlx.nn as nn

from .config import ModelConfig
from .layers import Linear, PackedLinear, geglu, unit_rms
from .products import Packing, expert_product, packed_expert_product


class Router(nn.Module):
    """Chooses K experts per token. It reads the raw residual, not the normalised one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.proj = Linear(config.hidden_size, config.num_experts)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))
        self._top_k, self._eps = config.top_k_experts, config.rms_norm_eps

    def __call__(self, x):
        """x (T, H) → expert numbers (T, K) and their weights (T, K) in float32."""
        scores = self.proj(unit_rms(x, self._eps) * self.scale * x.shape[-1] ** -0.5)  # (T, E)
        share = mx.softmax(scores.astype(mx.float32), axis=-1)
        experts = mx.argpartition(-share, kth=self._top_k - 1, axis=-1)[:, : self._top_k]
        weights = mx.take_along_axis(share, experts, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        return experts, weights * self.per_expert_scale[experts]


class ExpertLinear(nn.Module):
    """One matrix per expert, (E, out, in)."""

    def __init__(self, n_experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = mx.zeros((n_experts, outputs, inputs))

    def __call__(self, x, experts):
        """x (M, 1, in), experts (M,) in ascending order → (M, 1, out)"""
        return expert_product(x, self.weight, experts)

    def to_quantized(self, group_size: int, bits: int, mode: str, quantize_input: bool = False):
        del quantize_input  # nn.quantize passes it to every layer
        return PackedExpertLinear(self.weight, Packing(group_size, bits, mode))


class PackedExpertLinear(PackedLinear):
    def __call__(self, x, experts):
        return packed_expert_product(x, self.arrays, self.packing, experts)


class Experts(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        n, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = ExpertLinear(n, hidden, 2 * inner)  # gate rows first
        self.down_proj = ExpertLinear(n, inner, hidden)

    def __call__(self, x, experts, weights):
        """x (T, H), experts and weights (T, K) → (T, H)"""
        T, K = experts.shape
        order = mx.argsort(experts.reshape(-1))  # (T·K,) pairs of token and expert, by expert
        expert = experts.reshape(-1)[order]
        gate, up = mx.split(self.gate_up_proj(x[order // K][:, None], expert), 2, axis=-1)
        y = self.down_proj(geglu(gate, up), expert)[mx.argsort(order)].reshape(T, K, -1)
        return (y * weights[..., None].astype(y.dtype)).sum(axis=1)
