"""Collect an importance matrix: squared inputs of every matrix, summed over the denoising of real examples.

Shapes   C canvas slots, E experts, M pairs of token and expert in the order of the experts
Source   llama.cpp, tools/imatrix, for what is summed; the technical report (arXiv 2608.00146) for noisy canvases and
         the two passes
Differs  llama-imatrix reads clean text, causally. Here every matrix sees what it sees in use: the prefix causally, and
         canvases at several shares of noise, with and without self-conditioning

The router and the token embedding are left out: the first is never quantized, the second is looked up as well.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dgemma.engine import PREFILL_CHUNK
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.model import DiffusionGemma
from mlx_dgemma.noise import NoiseStream
from mlx_dgemma.tensors import Tensor, text_tensors
from mlx_dgemma.tokenizer import Tokenizer

from .examples import NOISE_SHARES, Example, check_context, corrupt, passages, temperature_at
from .imatrix import Entry, Imatrix

ROLES = ("attention", "dense", "expert", "self_conditioning")


class PassageDone(NamedTuple):
    """The only event of `collect`."""

    done: int
    total: int


class Sums(NamedTuple):
    squares: mx.array  # (E, row) float32; E is 1 for a matrix
    rows: mx.array  # (E,) float32, how many inputs


def squared_inputs(x: mx.array, experts: mx.array | None, n_experts: int) -> Sums:
    """x (…, row), or with experts (M,) x (M, 1, row): what each channel, and expert, adds."""
    squares = mx.square(x.reshape(-1, x.shape[-1]).astype(mx.float32))
    if experts is None:
        return Sums(squares.sum(axis=0, keepdims=True), mx.full((1,), len(squares), mx.float32))
    zeros = mx.zeros((n_experts, squares.shape[-1]))
    return Sums(zeros.at[experts].add(squares), mx.zeros(n_experts).at[experts].add(1.0))


class _Tap:
    """Stands where a matrix stood: computes the same, and keeps the sums of its inputs until they are taken."""

    def __init__(self, matrix, n_experts):
        self.matrix, self.n_experts, self.kept = matrix, n_experts, []

    def __call__(self, x, experts=None):
        self.kept.append(squared_inputs(x, experts, self.n_experts))
        return self.matrix(x) if experts is None else self.matrix(x, experts)


@contextlib.contextmanager
def tapped(model: DiffusionGemma) -> Iterator[dict[Tensor, _Tap]]:
    """Every matrix of ROLES with a tap, until the block ends."""
    tensors = [t for t in text_tensors(model.config) if t.role in ROLES]
    matrices = {t: place(model, t) for t in tensors}
    taps = {t: _Tap(parent[name], t.shape[0] if t.role == "expert" else 1) for t, (parent, name) in matrices.items()}
    try:
        for tensor, (parent, name) in matrices.items():
            parent[name] = taps[tensor]
        yield taps
    finally:
        for tensor, (parent, name) in matrices.items():
            parent[name] = taps[tensor].matrix


def place(model: DiffusionGemma, tensor: Tensor) -> tuple[nn.Module, str]:
    """The module that holds a tensor's matrix, and the matrix's name in it."""
    *path, name = tensor.mlx.removesuffix(".weight").split(".")
    return functools.reduce(lambda module, part: module[int(part) if part.isdigit() else part], path, model), name


class _Collector:
    """Runs the passes and adds up what the taps saw, in float64 on the host."""

    def __init__(self, model, taps):
        self.model, self.taps = model, taps
        self.sums = {t: np.zeros((tap.n_experts, t.shape[-1])) for t, tap in taps.items()}
        self.counts = {t: np.zeros(tap.n_experts) for t, tap in taps.items()}
        last = model.config.num_hidden_layers - 1
        kv = ("attn_k", "attn_v")
        # Nothing but keys and values leaves the encoder: the rest of its last layer is never computed in use.
        self.encoder_unused = {t for t in taps if t.layer == last and t.gguf_part not in kv}
        self.canvases = 0

    def encode(self, tokens, cache):
        for start in range(0, len(tokens), PREFILL_CHUNK):
            self.model.encode(mx.array(tokens[None, start : start + PREFILL_CHUNK]), cache)
            self._take(self.encoder_unused)
            mx.eval(cache.arrays)

    def denoise(self, canvas, cache, temperature):
        """Two passes, the second with self-conditioning from the first."""
        canvas = mx.array(canvas)
        processed = self.model.denoise(canvas, cache) / temperature
        self.model.denoise_hidden(canvas, cache, self.model.soft_embedding(processed.astype(self.model.dtype)))
        self._take()
        self.canvases += 2

    def _take(self, unused=frozenset()):
        """Evaluates what was asked for, so that memory holds one pass at a time."""
        new = [(t, sums) for t, tap in self.taps.items() if t not in unused for sums in tap.kept]
        mx.eval([sums for _, sums in new])
        for tensor, sums in new:
            squares = np.array(sums.squares)
            if not np.isfinite(squares).all():
                raise DgemmaError(
                    f"{tensor.gguf}: its inputs are not finite, expected numbers; load the model in bfloat16 or float32"
                )
            self.sums[tensor] += squares
            self.counts[tensor] += np.array(sums.rows)
        for tap in self.taps.values():
            tap.kept.clear()

    def entries(self):
        return {t.gguf: Entry(s.astype(np.float32), self.counts[t].astype(np.float32)) for t, s in self.sums.items()}


def collect(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    examples: Iterable[Example],
    ts: Iterable[float] = NOISE_SHARES,
    seed: int = 0,
    limit: int | None = None,
    on_event: Callable[[PassageDone], None] = lambda event: None,
) -> Imatrix:
    """Run `model` over the examples, `limit` passages at most, and return what its matrices saw.

    ts: shares of noise; every canvas is denoised at each. Raises DgemmaError.
    """
    config, stream = model.config, NoiseStream(seed)
    found = list(itertools.islice(passages(examples, tokenizer, config.canvas_length), limit))
    check_context([len(p.prompt) + p.canvases.size for p in found], config.max_position_embeddings)
    with tapped(model) as taps:
        collector = _Collector(model, taps)
        for i, passage in enumerate(found):
            cache = model.make_cache()
            collector.encode(passage.prompt, cache)
            for block, clean in enumerate(passage.canvases):
                for t in ts:
                    canvas, _ = corrupt(clean[None], t, stream, [i], block, config.vocab_size)
                    collector.denoise(canvas, cache, temperature_at(t, model.generation_config))
                collector.encode(clean, cache)
            on_event(PassageDone(i + 1, len(found)))
    return Imatrix(None, collector.entries(), (), collector.canvases, config.canvas_length)
