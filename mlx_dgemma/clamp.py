"""What is known of an answer before it is written: tokens that stand, and tokens that denoising may start from.

Shapes   B rows, n slots of the answer from its first one on, C slots of one canvas; numpy
Source   ours. A canvas whose known tokens are clean and whose hole is noise is what training shows at t = hole share:
         every slot is noise or clean, and nothing tells which (arXiv 2608.00146)
Differs  transformers' decoder_input_ids and mlx-vlm's warm start put tokens into the first canvas only; the first
         renoise may replace them

A known slot holds its token in every canvas and in the answer (what is known behind the answer's end becomes pad). It
spends nothing of the entropy budget and no stop rule looks at it, because a canvas full of sure slots would stop before
its hole is filled. Self-conditioning there is the model's own: the token itself instead was measured and changes
nothing (docs/log.md).
"""

from typing import NamedTuple

import numpy as np

from .noise import NoiseStream


class Clamp(NamedTuple):
    """One entry per slot of the answer. What is neither known nor noisy starts as its token and may change; slots
    behind the n described ones are noise."""

    tokens: np.ndarray  # (B, n) int32, what a slot holds or starts from; anything where it starts as noise
    known: np.ndarray  # (B, n) bool, slots whose token stands
    noisy: np.ndarray  # (B, n) bool, slots that start as noise

    def canvas(self, first: int, length: int) -> "Clamp":
        """The part for a canvas of `length` slots that begins at slot `first` of the answer."""
        parts = (array[:, first : first + length] for array in self)
        missing = length - max(0, min(length, self.tokens.shape[1] - first))
        padded = (
            np.pad(part, ((0, 0), (0, missing)), constant_values=value)
            for part, value in zip(parts, (0, False, True), strict=True)
        )
        return self._make(padded)

    @property
    def free(self) -> np.ndarray:
        return ~self.known

    @property
    def noise_share(self) -> np.ndarray:
        """Which share of each row's slots starts as noise. (B,)"""
        return self.noisy.mean(axis=-1)

    def text_end(self, ends: tuple[int, ...]) -> np.ndarray:
        """The slot behind each row's last known token that is none of `ends`; 0 without one. (B,)"""
        text = self.known & ~np.isin(self.tokens, ends)
        return ((np.arange(text.shape[1]) + 1) * text).max(axis=-1, initial=0)

    def with_noise(self, share: float, stream: NoiseStream) -> "Clamp":
        """A share of the slots that would start as their token starts as noise too; rows as row ids 0, 1, …"""
        rows, n = self.tokens.shape
        chosen = stream.warm(list(range(rows)), n) < share
        return self._replace(noisy=self.noisy | (chosen & self.free))

    def start(self, noise: np.ndarray) -> np.ndarray:
        """The canvas that denoising starts from. noise (B, C) → (B, C)"""
        return np.where(self.noisy, noise, self.tokens).astype(np.int32)

    def impose(self, tokens: np.ndarray) -> np.ndarray:
        """`tokens` (B, C) with the known ones in place."""
        return np.where(self.known, self.tokens, tokens).astype(np.int32)


def joined(clamps: list[Clamp]) -> Clamp:
    """Rows of equal length as one batch."""
    return Clamp(*(np.concatenate(arrays) for arrays in zip(*clamps, strict=True)))


def unclamped(rows: int) -> Clamp:
    """Nothing is known."""
    nothing = np.zeros((rows, 0))
    return Clamp(nothing.astype(np.int32), nothing.astype(bool), nothing.astype(bool))
