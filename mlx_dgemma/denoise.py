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

from .clamp import Clamp, unclamped
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

    def step(
        self, temperature: np.ndarray, entropy_bound: float, uniforms: np.ndarray, renoise: np.ndarray, free: np.ndarray
    ) -> Step:
        """One decoder pass: sample with `uniforms` (B, C), accept, put `renoise` (B, C) elsewhere.

        temperature (B,). free (B, C) bool: the other slots spend no entropy and are never accepted.
        """

    def select(self, rows: np.ndarray, length: int) -> None:
        """Go on with these rows and the first `length` slots of the canvas, until the next `start`."""

    def commit(self, tokens: np.ndarray) -> None:
        """Append (B, C) tokens to the prefix."""


def denoise_blocks(
    engine: Engine,
    config: GenerationConfig,
    stream: NoiseStream,
    rows: list[int],
    schedule: Callable[[np.ndarray], np.ndarray] | None = None,
    stop_rule: Callable[[], Callable] | None = None,
    clamp: Clamp | None = None,
) -> Iterator[StepDone | BlockDone]:
    """Denoise blocks after the engine's prefix until every row met a stop id or has max_new_tokens.

    rows: the noise row id of each batch row. schedule: steps (B,) → temperatures (B,). stop_rule: makes a
    block's stop rule. clamp: what is known of the answers. A canvas that starts with less noise starts that much later
    in the schedule.
    """
    schedule = schedule or default_schedule(config)
    began = time.perf_counter()
    finished = np.zeros(len(rows), bool)
    engine.use(config)
    lengths = canvas_lengths(config, engine.canvas_length, engine.flexible)
    n_blocks, first = len(lengths), 0
    if clamp is not None and config.drop_tail:
        config = config.replace(drop_tail=False)  # known text may stand behind what looks like the end
    clamp = clamp or unclamped(len(rows))
    known_until = clamp.text_end((*config.stop_token_ids, config.pad_token_id))
    for block, C in enumerate(lengths):
        rule = stop_rule() if stop_rule else default_stop_rule(config)
        held = clamp.canvas(first, C)
        draft, steps = yield from _denoise_block(engine, config, stream, rows, block, held, finished, schedule, rule)
        tokens, stopped = close_canvas(draft, finished, config, known_until - first)
        first += C
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


def _denoise_block(engine, config, stream, rows, block, held, finished, schedule, rule):
    V, C, free = engine.vocab_size, held.tokens.shape[1], held.free
    draft = canvas = held.start(stream.canvas(rows, block, C, V))
    skipped = (1 - held.noise_share) * (config.schedule_steps or config.max_denoising_steps)
    play = InPlay(engine, canvas, free, config)
    settled = finished | held.known.all(axis=-1)
    steps = np.zeros(len(rows), np.int32)
    for step in range(config.max_denoising_steps):
        if settled.all():
            break
        running = ~settled
        play.narrow(running)
        steps += running
        temperature = np.broadcast_to(schedule(step + skipped), len(rows))
        uniforms = stream.uniforms(rows, block, step, C)
        renoise = held.impose(stream.renoise(rows, block, step, C, V))
        new = play.step(temperature, uniforms, renoise)
        # A settled row keeps what it had when it settled; the passes the others still need do not change it.
        draft = np.where(running[:, None], held.impose(new.draft), draft)
        canvas = np.where(running[:, None], new.canvas, canvas)
        entropy = np.where(free, new.entropy, 0)
        yield StepDone(block, step, temperature, draft, canvas, new.accepted, entropy, running, held.known)
        settled = settled | rule(draft, entropy, free)
    return draft, steps


def close_canvas(
    draft: np.ndarray, finished: np.ndarray, config: GenerationConfig, known_until: np.ndarray | int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Pad what follows each row's first stop id, and all of a row finished before.

    draft (B, C), finished (B,) → tokens (B, C), which rows hold a stop id (B,). known_until (B,): a stop id in front
    of this slot ends nothing, because known text follows it.
    """
    at = np.arange(draft.shape[1])
    is_stop = np.isin(draft, config.stop_token_ids) & (at >= np.reshape(known_until, (-1, 1)))
    after_stop = np.cumsum(is_stop, axis=-1) - is_stop > 0
    tokens = np.where(after_stop | finished[:, None], config.pad_token_id, draft)
    return tokens.astype(np.int32), is_stop.any(axis=-1)
