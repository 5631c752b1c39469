"""Attention of one layer, for both passes: the encoder appends to the prefix, the decoder only reads it.

Shapes   B rows, T tokens, H hidden, Nq query heads, N key-value heads, D head_dim, P prefix tokens
Source   transformers 5.23.0, DiffusionGemmaEncoderTextAttention and DiffusionGemmaDecoderTextAttention
Differs  one class for both passes; they share every weight
"""

import mlx.nn as nn

from .cache import LayerCache
from .config import LayerConfig, ModelConfig
from .layers import Linear, RMSNorm, Rope, unit_rms
from .long_attention import attention


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: LayerConfig):
        super().__init__()
        self._layer, self._n_heads, self._eps = layer, config.num_attention_heads, config.rms_norm_eps
        q_size = config.num_attention_heads * layer.head_dim
        kv_size = layer.num_key_value_heads * layer.head_dim
        self.q_proj = Linear(config.hidden_size, q_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        if layer.has_v_proj:
            self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(q_size, config.hidden_size)
        self.q_norm = RMSNorm(layer.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(layer.head_dim, config.rms_norm_eps)
        self._rope = Rope(layer)

    def __call__(self, x, cache: LayerCache, first, mask, append: bool):
        """x (B, T, H) → (B, T, H). `first` is the position of x[:, 0]; with `append` the prefix grows by x."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).reshape(B, T, self._n_heads, self._layer.head_dim))
        q = self._rope(q.swapaxes(1, 2), first)  # (B, Nq, T, D)
        k, v = self.keys_and_values(x, first)
        keys, values = cache.append(k, v) if append else cache.joined(k, v)  # (B, N, P + T, D)
        # q_norm and k_norm set the scale of the scores, so there is no 1 / sqrt(D).
        out = attention(q, keys, values, mask)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, T, -1))

    def keys_and_values(self, x, first):
        """x (B, T, H) → what the cache stores of it, 2 × (B, N, T, D)"""
        B, T, _ = x.shape
        shape = (B, T, self._layer.num_key_value_heads, self._layer.head_dim)
        k = self.k_proj(x).reshape(shape)
        # Full-attention layers ship no v_proj: v is the k projection, taken before k_norm and RoPE.
        v = self.v_proj(x).reshape(shape) if self._layer.has_v_proj else k
        k = self._rope(self.k_norm(k).swapaxes(1, 2), first)
        return k, unit_rms(v, self._eps).swapaxes(1, 2)
