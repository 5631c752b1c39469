"""The MLX side of the block loop: a model, its prefix, and the arrays that live from step to step.

Shapes   B rows, T prompt tokens, C canvas slots, V vocabulary
Source   transformers 5.23.0, _denoising_step
"""

import mlx.core as mx
import numpy as np

from .cache import PrefixCache
from .denoise import Step
from .model import DiffusionGemma
from .sampler import accept_mask
from .vocabulary import read_vocabulary

# Prompt tokens encoded at once: bounds the memory of attention scores.
PREFILL_CHUNK = 512


class MlxEngine:
    """Implements denoise.Engine."""

    def __init__(self, model: DiffusionGemma, cache: PrefixCache | None = None):
        self.model = model
        self.cache = cache or model.make_cache()
        self.canvas_length = model.config.canvas_length
        self.vocab_size = model.config.vocab_size
        self._table = model.table
        self._canvas = self._soft = None

    @property
    def cache_bytes(self) -> int:
        return self.cache.nbytes

    def peak_memory(self) -> int:
        """Most bytes MLX held at once since the process began, weights included."""
        return mx.get_peak_memory()

    def copy(self) -> "MlxEngine":
        """An engine with the same prefix; encoding into one leaves the other as it is."""
        return MlxEngine(self.model, self.cache.copy())

    def prefill(self, tokens: np.ndarray, padding: np.ndarray | None = None) -> None:
        """Append (B, T) tokens to the prefix; padding (B,) counts pad tokens at the left of each row."""
        if padding is not None:
            padding = mx.array(padding, mx.int32) if padding.any() else None
        for start in range(0, tokens.shape[1], PREFILL_CHUNK):
            chunk = mx.array(tokens[:, start : start + PREFILL_CHUNK], mx.int32)
            self.model.encode(chunk, self.cache, padding)
            padding = None
            mx.eval(self.cache.arrays)  # only keys and values: the final hidden states are never computed

    commit = prefill

    def start(self, canvas: np.ndarray) -> None:
        self._canvas, self._soft = mx.array(canvas), None

    def step(self, temperature: float, entropy_bound: float, uniforms: np.ndarray, renoise: np.ndarray) -> Step:
        hidden = self.model.denoise_hidden(self._canvas, self.cache, self._soft)  # (B, C, H)
        cap, uniform = self.model.config.final_logit_softcapping, mx.array(uniforms).reshape(-1)
        read = read_vocabulary(hidden.reshape(uniform.size, -1), self._table, cap, temperature, uniform)
        draft, entropy, sampled = (x.reshape(self._canvas.shape) for x in (read.draft, read.entropy, read.sampled))
        accepted = accept_mask(entropy, entropy_bound)
        self._canvas = mx.where(accepted, sampled, mx.array(renoise))
        self._soft = self.model.scaled(read.soft).reshape(hidden.shape)
        mx.eval(draft, self._canvas, accepted, entropy, self._soft)
        return Step(np.array(draft), np.array(self._canvas), np.array(accepted), np.array(entropy))
