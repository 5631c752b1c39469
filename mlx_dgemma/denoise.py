"""The block loop: prefill, denoise a canvas, commit it, start the next. Yields events; prints nothing.

Shapes   B rows, C canvas slots
Source   transformers 5.23.0, DiffusionGemmaGenerationMixin.generate
Differs  the last canvas is never encoded; rows finished in an earlier block no longer hold the others up; a row's
         randomness depends on its id alone (noise.py)

Knows no engine: it drives anything with the methods of `Engine`, so MLX and ggml run the same loop.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from .config import GenerationConfig
from .errors import DgemmaError
from .events import BlockDone, StepDone
from .in_play import InPlay
from .noise import NoiseStream
from .schedule import default_schedule, default_stop_rule


class Step(NamedTuple):
    """What one decoder pass returns to the host; see StepDone for shapes."""

    draft: np.ndarray
    canvas: np.ndarray
    accepted: np.ndarray
    entropy: np.ndarray


class Engine(Protocol):
    """A loaded model with a filled prefix. It keeps the canvas and the self-conditioning logits between steps."""

    canvas_length: int
    vocab_size: int
    flexible: bool  # takes canvases of other lengths, and `select`

    def use(self, config: GenerationConfig) -> None:
        """Settings of the generation that begins."""

    def start(self, canvas: np.ndarray) -> None:
        """Begin a block from `canvas` (B, C), with no self-conditioning."""

    def step(self, temperature: float, entropy_bound: float, uniforms: np.ndarray, renoise: np.ndarray) -> Step:
        """One decoder pass: sample with `uniforms` (B, C), accept, put `renoise` (B, C) elsewhere."""

    def select(self, rows: np.ndarray, length: int) -> None:
        """Go on with these rows and the first `length` slots of the canvas, until the next `start`."""

    def commit(self, tokens: np.ndarray) -> None:
        """Append (B, C) tokens to the prefix."""


def denoise_blocks(
    engine: Engine,
    config: GenerationConfig,
    stream: NoiseStream,
    rows: list[int],
    schedule: Callable[[int], float] | None = None,
    stop_rule: Callable[[], Callable] | None = None,
) -> Iterator[StepDone | BlockDone]:
    """Denoise blocks after the engine's prefix until every row met a stop id or has max_new_tokens.

    rows: the noise row id of each batch row. schedule: step → temperature. stop_rule: makes a block's stop rule.
    """
    schedule = schedule or default_schedule(config)
    began = time.perf_counter()
    finished = np.zeros(len(rows), bool)
    engine.use(config)
    lengths = canvas_lengths(config, engine.canvas_length, engine.flexible)
    n_blocks = len(lengths)
    for block, C in enumerate(lengths):
        rule = stop_rule() if stop_rule else default_stop_rule(config)
        draft, steps = yield from _denoise_block(engine, config, stream, rows, block, C, finished, schedule, rule)
        tokens, stopped = close_canvas(draft, finished, config)
        yield BlockDone(block, tokens, steps, time.perf_counter() - began)
        finished |= stopped
        if finished.all():
            return
        if block + 1 < n_blocks:
            engine.commit(tokens)


def canvas_lengths(config: GenerationConfig, longest: int, flexible: bool = True) -> list[int]:
    """Slots of each block's canvas until max_new_tokens are there. Raises DgemmaError for a first canvas too long."""
    first = config.first_canvas or longest
    if first > longest or longest % first:
        raise DgemmaError(f"first_canvas is {first}, expected a divisor of the model's canvas of {longest}")
    lengths, length = [], first if flexible else longest
    while sum(lengths) < config.max_new_tokens:
        lengths.append(length)
        length = min(2 * length, longest)
    return lengths


def _denoise_block(engine, config, stream, rows, block, C, finished, schedule, rule):
    V = engine.vocab_size
    draft = canvas = stream.canvas(rows, block, C, V)
    play = InPlay(engine, canvas, config)
    settled = finished.copy()
    steps = np.zeros(len(rows), np.int32)
    for step in range(config.max_denoising_steps):
        running = ~settled
        play.narrow(running)
        steps += running
        temperature = schedule(step)
        uniforms = stream.uniforms(rows, block, step, C)
        renoise = stream.renoise(rows, block, step, C, V)
        new = play.step(temperature, uniforms, renoise)
        # A settled row keeps what it had when it settled; the passes the others still need do not change it.
        draft = np.where(running[:, None], new.draft, draft)
        canvas = np.where(running[:, None], new.canvas, canvas)
        yield StepDone(block, step, temperature, draft, canvas, new.accepted, new.entropy, running)
        settled = settled | rule(draft, new.entropy)
        if settled.all():
            break
    return draft, steps


def close_canvas(draft: np.ndarray, finished: np.ndarray, config: GenerationConfig) -> tuple[np.ndarray, np.ndarray]:
    """Pad what follows each row's first stop id, and all of a row finished before.

    draft (B, C), finished (B,) → tokens (B, C), which rows hold a stop id (B,)
    """
    is_stop = np.isin(draft, config.stop_token_ids)
    after_stop = np.cumsum(is_stop, axis=-1) - is_stop > 0
    tokens = np.where(after_stop | finished[:, None], config.pad_token_id, draft)
    return tokens.astype(np.int32), is_stop.any(axis=-1)
