"""The MLX side of the block loop: a model, its prefix, and the arrays that live from step to step.

Shapes   B rows, T prompt tokens, C canvas slots, V vocabulary
Source   transformers 5.23.0, _denoising_step
"""

import mlx.core as mx
import numpy as np

from .cache import PrefixCache
from .denoise import Step
from .model import DiffusionGemma
from .sampler import accept_mask, entropies, sample

# Prompt tokens encoded at once: bounds the memory of attention scores.
PREFILL_CHUNK = 512


class MlxEngine:
    """Implements denoise.Engine."""

    def __init__(self, model: DiffusionGemma, cache: PrefixCache | None = None):
        self.model = model
        self.cache = cache or model.make_cache()
        self.canvas_length = model.config.canvas_length
        self.vocab_size = model.config.vocab_size
        self._canvas = self._conditioning = None

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
        self._canvas, self._conditioning = mx.array(canvas), None

    def step(self, temperature: float, entropy_bound: float, uniforms: np.ndarray, renoise: np.ndarray) -> Step:
        processed = self.model.denoise(self._canvas, self.cache, self._conditioning) / temperature  # (B, C, V)
        entropy = entropies(processed)
        accepted = accept_mask(entropy, entropy_bound)
        draft = mx.argmax(processed, axis=-1).astype(mx.int32)
        self._canvas = mx.where(accepted, sample(processed, mx.array(uniforms)), mx.array(renoise))
        self._conditioning = processed.astype(self.model.dtype)
        mx.eval(draft, self._canvas, accepted, entropy, self._conditioning)
        return Step(np.array(draft), np.array(self._canvas), np.array(accepted), np.array(entropy))
