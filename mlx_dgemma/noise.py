"""The single source of randomness: a counter-based stream that every engine consumes.

Shapes   B rows, C canvas slots
Source   Philox4x64-10 (Salmon et al. 2011) as numpy.random.Philox, whose raw output numpy keeps stable
Differs  a torch or MLX generator depends on device, batch and version; here number i of a draw depends only on
         (seed, row, block, step, purpose), so a batch row equals the same row alone, and MLX, ggml and
         transformers denoise one seed alike.

Layout: key = (seed, row), counter = (0, purpose, step, block). One raw 64-bit word per canvas slot.
`python -m mlx_dgemma.noise` prints the numbers other implementations can check against.
"""

import numpy as np

CANVAS, UNIFORM, RENOISE, WARM = 0, 1, 2, 3


class NoiseStream:
    """Numbers for one seed. `rows` are row ids, one per batch row; `block` and `step` count from 0."""

    def __init__(self, seed: int):
        self.seed = int(seed) % 2**64

    def canvas(self, rows, block: int, canvas_len: int, vocab_size: int) -> np.ndarray:
        """The tokens a block starts from, uniform over the vocabulary. (B, C) int32"""
        return _tokens(self._words(rows, CANVAS, 0, block, canvas_len), vocab_size)

    def uniforms(self, rows, block: int, step: int, canvas_len: int) -> np.ndarray:
        """One number per slot for inverse-CDF sampling, never 0 and never 1. (B, C) float32"""
        return _fractions(self._words(rows, UNIFORM, step, block, canvas_len))

    def renoise(self, rows, block: int, step: int, canvas_len: int, vocab_size: int) -> np.ndarray:
        """The random tokens that replace unaccepted slots after `step`. (B, C) int32"""
        return _tokens(self._words(rows, RENOISE, step, block, canvas_len), vocab_size)

    def warm(self, rows, n: int) -> np.ndarray:
        """One number per slot of an answer: where it is below the share of noise, a warm start is noise. (B, n)"""
        return _fractions(self._words(rows, WARM, 0, 0, n))

    def _words(self, rows, purpose, step, block, n):
        def row_words(row):
            generator = np.random.Philox(
                key=np.array([self.seed, row], np.uint64), counter=np.array([0, purpose, step, block], np.uint64)
            )
            return generator.random_raw(n)

        return np.stack([row_words(row) for row in rows])  # (B, n) uint64


def _fractions(words):
    # (k + 1/2) / 2^23 has 24 significant bits: exact in float32, so every engine sees the same number.
    return ((words >> np.uint64(41)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


def _tokens(words, vocab_size):
    """Top 32 bits × vocabulary, shifted: no rejection, so slot i never depends on slot i − 1."""
    return ((words >> np.uint64(32)) * np.uint64(vocab_size) >> np.uint64(32)).astype(np.int32)


if __name__ == "__main__":
    stream = NoiseStream(0)
    print("canvas  ", stream.canvas([0], 0, 8, 262_144).tolist())
    print("uniforms", stream.uniforms([0], 0, 0, 4).tolist())
    print("renoise ", stream.renoise([0], 0, 0, 8, 262_144).tolist())
