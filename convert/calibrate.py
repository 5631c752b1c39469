"""Look at what every matrix sees while real examples are denoised; the importance matrix is its squares, summed.

Shapes   C canvas slots, E experts, M pairs of token and expert in the order of the experts
Source   llama.cpp, tools/imatrix, for what is summed; the technical report (arXiv 2608.00146) for noisy canvases and
         the two passes
Differs  llama-imatrix reads clean text, causally. Here every matrix sees what it sees in use: the prefix causally, and
         canvases at several shares of noise, with and without self-conditioning

An importance matrix leaves out the router, which no GGUF quantizes, and the token embedding, which is looked up too.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_dgemma.engine import PREFILL_CHUNK
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.model import DiffusionGemma
from mlx_dgemma.noise import NoiseStream
from mlx_dgemma.tensors import Tensor, text_tensors
from mlx_dgemma.tokenizer import Tokenizer

from .examples import NOISE_SHARES, Example, check_context, corrupt, passages, temperature_at
from .identity import ROLE, identity
from .imatrix import Entry, Imatrix

ROLES = ("attention", "dense", "expert", "self_conditioning")
# What a matrix sees, (…, row) or with experts (M,) (M, 1, row) → what is kept of it.
Look = Callable[[mx.array, mx.array | None], object]


class PassageDone(NamedTuple):
    """The only event of `run_passes`."""

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


def experts_of(tensor: Tensor) -> int:
    """How many matrices it holds: 1 where it has no experts."""
    return tensor.shape[0] if tensor.role == "expert" else 1


class _Tap:
    """Stands where a matrix stood: computes the same, and keeps what `look` makes of its inputs."""

    def __init__(self, matrix, look: Look):
        self.matrix, self.look, self.seen = matrix, look, []

    def __call__(self, x, experts=None):
        self.seen.append(self.look(x, experts))
        return self.matrix(x) if experts is None else self.matrix(x, experts)


@contextlib.contextmanager
def tapped(model: DiffusionGemma, looks: dict[Tensor, Look]) -> Iterator[dict[Tensor, _Tap]]:
    """These matrices with a tap each, until the block ends."""
    matrices = {t: place(model, t) for t in looks}
    taps = {t: _Tap(parent[name], looks[t]) for t, (parent, name) in matrices.items()}
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


def run_passes(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    examples: Iterable[Example],
    looks: dict[Tensor, Look],
    take: Callable[[Tensor, object], None],
    ts: Iterable[float] = NOISE_SHARES,
    seed: int = 0,
    limit: int | None = None,
    on_event: Callable[[PassageDone], None] = lambda event: None,
) -> int:
    """Run `model` over the examples, `limit` passages at most. → canvases denoised

    ts: shares of noise; every canvas is denoised at each, without self-conditioning and with it. `take(tensor, seen)`
    gets what a tensor's look made of one pass, not evaluated yet. The embedding sees what becomes logits. Raises
    DgemmaError.
    """
    config, stream = model.config, NoiseStream(seed)
    found = list(itertools.islice(passages(examples, tokenizer, config.canvas_length), limit))
    check_context([len(p.prompt) + p.canvases.size for p in found], config.max_position_embeddings)
    last, n = config.num_hidden_layers - 1, 0
    tables = {t: look for t, look in looks.items() if t.role == "embedding"}
    with tapped(model, {t: look for t, look in looks.items() if t not in tables}) as taps:
        # Nothing but keys and values leaves the encoder: the rest of its last layer is never computed in use.
        encoder = {t: tap for t, tap in taps.items() if t.layer != last or t.gguf_part in ("attn_k", "attn_v")}

        def take_from(used):
            for tensor, tap in taps.items():
                while tap.seen:  # handed over and forgotten: one that is remembered keeps its memory
                    seen = tap.seen.pop(0)
                    if tensor in used:
                        take(tensor, seen)

        def encode(tokens, cache):
            for start in range(0, len(tokens), PREFILL_CHUNK):
                model.encode(mx.array(tokens[None, start : start + PREFILL_CHUNK]), cache)
                take_from(encoder)
                mx.eval(cache.arrays)

        for i, passage in enumerate(found):
            cache = model.make_cache()
            encode(passage.prompt, cache)
            for block, clean in enumerate(passage.canvases):
                for t in ts:
                    canvas = mx.array(corrupt(clean[None], t, stream, [i], block, config.vocab_size)[0])
                    first = model.denoise_hidden(canvas, cache)
                    logits = model.logits(first) / temperature_at(t, model.generation_config)
                    soft = model.soft_embedding(logits.astype(model.dtype))
                    take_from(taps)
                    second = model.denoise_hidden(canvas, cache, soft)
                    take_from(taps)
                    for table, look in tables.items():
                        take(table, look(first, None))
                        take(table, look(second, None))
                    n += 2
                encode(clean, cache)
            on_event(PassageDone(i + 1, len(found)))
    return n


def collect(model: DiffusionGemma, tokenizer: Tokenizer, examples: Iterable[Example], **options) -> Imatrix:
    """The importance matrix: what the matrices of ROLES saw. options: of `run_passes`. Raises DgemmaError."""
    looks = {
        t: functools.partial(squared_inputs, n_experts=experts_of(t)) for t in text_tensors(model.config)
        if t.role in ROLES
    }  # fmt: skip
    sums = {t: np.zeros((experts_of(t), t.shape[-1])) for t in looks}  # float64
    counts = {t: np.zeros(experts_of(t)) for t in looks}

    def take(tensor, seen: Sums):
        squares = np.array(seen.squares)
        if not np.isfinite(squares).all():
            raise not_finite_inputs(tensor)
        sums[tensor] += squares
        counts[tensor] += np.array(seen.rows)

    n = run_passes(model, tokenizer, examples, looks, take, **options)
    entries = {t.gguf: Entry(s.astype(np.float32), counts[t].astype(np.float32)) for t, s in sums.items()}
    return Imatrix(None, entries, (), n, model.config.canvas_length)


def model_identity(model: DiffusionGemma) -> str:
    """identity.py's, of a loaded model: the same for its quantized copies."""
    parameters = dict(tree_flatten(model.parameters()))
    vectors = (parameters[t.mlx].astype(mx.float32) for t in text_tensors(model.config) if t.role == ROLE)
    return identity(map(np.array, vectors))


def not_finite_inputs(tensor: Tensor) -> DgemmaError:
    return DgemmaError(
        f"{tensor.gguf}: its inputs are not finite, expected numbers; load the model in bfloat16 or float32"
    )
