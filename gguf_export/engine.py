"""The ggml side of the block loop: a runner and one prefix. The loop, sampler settings and events are mlx_dgemma's.

Shapes   B rows, T prompt tokens, C canvas slots
Source   mlx_dgemma/engine.py, the same on MLX
Differs  four arrays of C numbers return from each step: the canvas, and what view and stop rule read
"""

import weakref

import numpy as np

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.denoise import Step
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.session import Session
from mlx_dgemma.tokenizer import Tokenizer

from .runner import Prefix, Runner


def check_settings(config: GenerationConfig) -> None:
    """Raises DgemmaError for what only MLX does: it would be ignored without a word."""
    for name in ("first_canvas", "conditioning_k", "drop_tail"):
        if value := getattr(config, name):
            raise DgemmaError(
                f"{name} is {value}, which is for MLX: a graph on ggml has whole canvases; leave it out, or use "
                "python -m mlx_dgemma.generate"
            )


class GgmlEngine:
    """Implements denoise.Engine, and what Session asks of an engine besides."""

    def __init__(self, runner: Runner, cache: Prefix | None = None):
        self.runner, self.cache = runner, cache
        self.canvas_length = runner.config.canvas_length
        self.vocab_size = runner.config.vocab_size
        self.flexible = False  # a graph is compiled for whole canvases

    def use(self, config: GenerationConfig) -> None:
        check_settings(config)  # schedule and stop rule are the loop's

    @property
    def cache_bytes(self) -> int:
        return 0 if self.cache is None else self.cache.nbytes

    def peak_memory(self) -> int:
        """Bytes that weights, prefix, canvas and graphs take on all devices; weights mapped from the file included."""
        return self.runner.memory(self.cache).total

    def copy(self) -> "GgmlEngine":
        """An engine with the same prefix; encoding into one leaves the other as it is."""
        return GgmlEngine(self.runner, self.cache.copy())

    def spread(self, rows: int) -> "GgmlEngine":
        """An engine with this one's only row as often as asked for."""
        twin = GgmlEngine(self.runner, self.cache.spread(rows))
        weakref.finalize(twin, self.runner.give_back, twin.cache)
        return twin

    def prefill(self, tokens: np.ndarray, padding: np.ndarray | None = None) -> None:
        """Append (B, T) tokens to the prefix; padding (B,) counts pad tokens at the left of each row."""
        if self.cache is None:
            # Room for the first canvas too, so that the prefix need not grow for it.
            self.cache = self.runner.make_cache(len(tokens), tokens.shape[1] + self.canvas_length)
            weakref.finalize(self, self.runner.give_back, self.cache)
        self.runner.prefill(tokens, self.cache, padding)

    commit = prefill

    def start(self, canvas: np.ndarray) -> None:
        self.runner.start(canvas, self.cache)

    def step(self, temperature, entropy_bound: float, uniforms: np.ndarray, renoise: np.ndarray, free=None) -> Step:
        """temperature: a number, or one per row. free: all slots by default."""
        out = self.runner.step(self.cache, temperature, entropy_bound, uniforms, renoise, free)
        return Step(out["draft"], out["next_canvas"], out["accepted"] > 0.5, out["entropy"])

    def logits(self, temperature: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Processed logits of the canvas for `tokens` (A,): (B, C, A). The graph computes those of all tokens."""
        found = self.runner.logits(self.cache)[..., tokens]
        return found / np.reshape(temperature, (-1, 1, 1)).astype(np.float32)

    def put(self, canvas: np.ndarray, shares: np.ndarray, tokens: np.ndarray) -> None:
        """What the next step reads: canvas (B, C), and self-conditioning from shares (B, C, A) of `tokens` (A,)."""
        whole = np.zeros((*shares.shape[:2], self.vocab_size), np.float32)
        whole[..., tokens] = shares
        self.runner.put(self.cache, canvas, whole)


def make_session(runner: Runner, tokenizer: Tokenizer, keep_prefix: bool = False) -> Session:
    """A session on ggml. keep_prefix is for a chat: what stays the same from turn to turn is encoded once."""
    return Session(runner.make_engine, runner.config, tokenizer, keep_prefix)
