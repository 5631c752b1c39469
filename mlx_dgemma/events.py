"""What happens while text is denoised. The loop yields these; a screen, a test or a server decides what to do.

Shapes   B rows, C canvas slots. Arrays are numpy, so that every engine and every listener can share them.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class StepDone:
    """One decoder pass over a canvas."""

    block: int  # counts from 0
    step: int  # counts from 0
    temperature: np.ndarray  # (B,)
    draft: np.ndarray  # (B, C) int32, the most likely tokens: what would be committed now
    canvas: np.ndarray  # (B, C) int32, accepted tokens and new noise: what the next step reads
    accepted: np.ndarray  # (B, C) bool
    entropy: np.ndarray  # (B, C) float32, nats
    running: np.ndarray  # (B,) bool, rows that this step still changed
    known: np.ndarray | None = None  # (B, C) bool, slots whose token was given; None: no slot


@dataclass(frozen=True, slots=True)
class BlockDone:
    """One canvas from noise to commit."""

    block: int
    tokens: np.ndarray  # (B, C) int32, pad after a row's first stop id
    steps: np.ndarray  # (B,) int32, decoder passes each row needed; 0 for rows finished before
    seconds: float  # since generation began


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts of one generation, over all its rows."""

    prompt_tokens: int
    reused_tokens: int = 0  # of the prompt, found in the prefix cache
    tokens: int = 0  # generated, the stop id included, pad and known tokens excluded
    blocks: int = 0  # the longest row's
    steps: int = 0  # decoder passes, summed over rows
    seconds: float = 0.0  # prefill included
    seconds_to_first_block: float = 0.0
    peak_memory: int = 0  # bytes
    cache_bytes: int = 0  # keys and values at the end

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Done:
    """The end. `texts` and `tokens` have one entry per row, cut at the first stop id and at max_new_tokens."""

    texts: list[str]
    tokens: list[list[int]]
    stopped: list[bool]  # False: max_new_tokens came first
    stats: Stats
    text: str = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "text", self.texts[0])
