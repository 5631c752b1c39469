"""Temperature schedules and stop rules: small objects given to the block loop, which stays as it is.

Shapes   B rows, C canvas slots; numpy
Source   transformers 5.23.0, LinearTemperatureScheduleLogitsProcessor and StableAndConfidentStoppingCriteria
"""

from typing import NamedTuple

import numpy as np

from .config import GenerationConfig


class LinearAnneal(NamedTuple):
    """From t_max down towards t_min. Step n of N (N first, 1 last) has temperature t_min + (t_max - t_min) · n / N."""

    t_min: float
    t_max: float
    n_steps: int

    def __call__(self, step):
        """`step` counts from 0, a number or an array; behind the schedule's end the temperature stays at t_min."""
        return self.t_min + (self.t_max - self.t_min) * (np.maximum(0, self.n_steps - step) / self.n_steps)


def mean_entropy(entropy: np.ndarray, free: np.ndarray | None = None) -> np.ndarray:
    """Over each row's free slots, by default all: (B, C) nats → (B,). 0 for a row without one."""
    if free is None:
        return entropy.mean(axis=-1, dtype=np.float32)
    return (entropy * free).sum(axis=-1, dtype=np.float32) / np.maximum(free.sum(axis=-1, dtype=np.float32), 1)


class StableAndConfident:
    """A row stops once its draft repeated `stability` times and its mean entropy is below `confidence` nats.

    stability = k means k + 1 equal drafts in a row; 0 asks for confidence alone. One object serves one block.
    """

    def __init__(self, stability: int, confidence: float):
        self.stability, self.confidence = stability, confidence
        self.drafts: list[np.ndarray] = []

    def __call__(self, draft: np.ndarray, entropy: np.ndarray, free: np.ndarray | None = None) -> np.ndarray:
        """draft (B, C), entropy (B, C), free (B, C) bool → which rows may stop (B,)"""
        confident = mean_entropy(entropy, free) < self.confidence
        if self.stability == 0:
            return confident
        enough = len(self.drafts) == self.stability
        stable = np.all([(old == draft).all(axis=-1) for old in self.drafts], axis=0) & enough
        self.drafts = [*self.drafts, draft][-self.stability :]
        return stable & confident


class Plateau:
    """A row stops once its draft repeated and its mean entropy no longer falls by a tenth, or is confident."""

    def __init__(self, confidence: float):
        self.confidence, self.draft, self.mean = confidence, None, None

    def __call__(self, draft: np.ndarray, entropy: np.ndarray, free: np.ndarray | None = None) -> np.ndarray:
        mean = mean_entropy(entropy, free)
        may = np.zeros(len(draft), bool)
        if self.draft is not None:
            may = (self.draft == draft).all(axis=-1) & ((mean < self.confidence) | (mean > 0.9 * self.mean))
        self.draft, self.mean = draft, mean
        return may


class Patience:
    """A row stops once every slot is sure, or kept its token for `patience` steps. Slots need not settle together."""

    def __init__(self, patience: int, confidence: float):
        self.patience, self.confidence = patience, confidence
        self.draft = self.age = None

    def __call__(self, draft: np.ndarray, entropy: np.ndarray, free: np.ndarray | None = None) -> np.ndarray:
        same = np.zeros_like(draft, bool) if self.draft is None else self.draft == draft
        self.age = same * (1 + (0 if self.age is None else self.age))  # (B, C) steps that a token lasted
        self.draft = draft
        return ((entropy < self.confidence) | (self.age >= self.patience)).all(axis=-1)


def default_schedule(config: GenerationConfig) -> LinearAnneal:
    return LinearAnneal(config.t_min, config.t_max, config.schedule_steps or config.max_denoising_steps)


def default_stop_rule(config: GenerationConfig):
    """The rule that `config.stop` names, for one block: draft, entropy, free (B, C) → which rows may stop (B,).

    A slot that is not free has entropy 0 and never changes its token.
    """
    match config.stop:
        case "confident":
            return StableAndConfident(0, config.confidence_threshold)
        case "plateau":
            return Plateau(config.confidence_threshold)
        case "patience":
            return Patience(config.patience, config.confidence_threshold)
    return StableAndConfident(config.stability_threshold, config.confidence_threshold)
