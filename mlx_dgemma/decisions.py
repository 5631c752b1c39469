"""Bounded choices from one forward pass: how likely each of a few answers is, without denoising.

Shapes   R rows, one per length that a choice has in tokens; C canvas slots; A tokens that occur in choices
Source   a canvas that is clean but for a hole is in distribution at that share of noise (docs/denoising.md)
Differs  a choice's score is the sum of its tokens' log probabilities among the A tokens, each slot read for itself:
         exact for choices of one token each, an approximation for longer ones, and rougher between lengths

The slot's fixed surroundings stand in the canvas, the slot is noise, and one batch holds all lengths. A template is
decided slot after slot from the left: what is decided stands for the next slot, and what follows that one is noise.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .config import GenerationConfig
from .errors import DgemmaError
from .language import EOS
from .noise import NoiseStream
from .structure import Slot, parts
from .tokenizer import Tokenizer


class Decision(NamedTuple):
    """One slot's choices and their probabilities, which add up to 1."""

    choices: tuple[str, ...]
    probabilities: np.ndarray  # (n,) float64
    scores: np.ndarray  # (n,) float64, nats, before the temperature
    single: bool  # every choice has one token, so that nothing is approximated

    @property
    def best(self) -> str:
        return self.choices[int(self.probabilities.argmax())]


class Surroundings(NamedTuple):
    """What stands before and behind every choice, as tokens, and each choice's own tokens."""

    before: list[int]
    choices: list[list[int]]
    after: list[int]


def decide(
    engine,
    tokenizer: Tokenizer,
    before: str,
    choices: Sequence[str],
    after: str,
    settings: GenerationConfig | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    ends: bool = True,
) -> Decision:
    """Which choice stands between `before` and `after` in the answer.

    engine: its prefix is one prompt; it is left as it is. temperature: divides the scores; above 1 for less certainty.
    ends: the answer ends with `after`; otherwise noise follows. Raises DgemmaError where the canvas is too short.
    """
    if len(choices) < 2 or len(set(choices)) < len(choices) or "" in choices:
        raise DgemmaError(f"the choices are {list(choices)}, expected at least two different texts")
    if not temperature > 0:
        raise DgemmaError(f"the temperature is {temperature}, expected one above 0")
    settings = settings or GenerationConfig()
    around = surroundings(tokenizer, before, choices, after)
    lengths = sorted({len(tokens) for tokens in around.choices})
    C, R = engine.canvas_length, len(lengths)
    canvas = NoiseStream(seed).canvas([0] * R, 0, C, engine.vocab_size)
    for row, length in enumerate(lengths):
        _fill(canvas[row], around, length, ends, settings)
    engine = engine.spread(R)
    engine.use(settings)
    engine.start(canvas)
    tokens = np.unique(np.concatenate(around.choices)).astype(np.int32)
    logits = np.asarray(engine.logits(np.ones(R, np.float32), tokens), np.float64)  # (R, C, A)
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    first = len(around.before)
    scores = [
        logits[lengths.index(len(own)), first + np.arange(len(own)), np.searchsorted(tokens, own)].sum()
        for own in around.choices
    ]
    scores = np.array(scores)
    return Decision(tuple(choices), probabilities(scores, temperature), scores, lengths == [1])


def decide_template(
    make_engine: Callable[[], object],
    tokenizer: Tokenizer,
    prompt: list[int],
    template: str,
    settings: GenerationConfig | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> tuple[str, list[Decision]]:
    """A template whose only slots are choices, one forward pass per slot: the text, and each slot's Decision.

    make_engine: returns an engine with an empty prefix. prompt: its tokens. Otherwise as `decide`.
    """
    found = parts(template)
    others = [part.kind for part in found if isinstance(part, Slot) and part.kind != "choice"]
    if others:
        raise DgemmaError(f"the template has a slot of kind {others[0]!r}, expected choices alone; denoise this one")
    engine = make_engine()
    engine.prefill(np.array([prompt], np.int32))
    text, decisions = "", []
    for i, part in enumerate(found):
        if not isinstance(part, Slot):
            text += part
            continue
        after = next((later for later in found[i + 1 : i + 2] if isinstance(later, str)), "")
        ends = not any(isinstance(later, Slot) for later in found[i + 1 :])
        decision = decide(engine, tokenizer, text, part.choices, after, settings, temperature, seed, ends)
        decisions.append(decision)
        text += decision.best
    return text, decisions


def surroundings(tokenizer: Tokenizer, before: str, choices: Sequence[str], after: str) -> Surroundings:
    """Tokens of each whole text, cut where they begin and cease to differ: merges across a border are then right."""
    texts = [tokenizer.encode(before + choice + after) for choice in choices]
    shortest = min(map(len, texts))
    first = _common(texts, shortest - 1)  # every choice keeps a token of its own
    last = _common([text[::-1] for text in texts], shortest - 1 - first)
    own = [text[first : len(text) - last] for text in texts]
    return Surroundings(texts[0][:first], own, texts[0][len(texts[0]) - last :])


def _common(texts, most):
    """How many tokens all texts begin with, at most `most`."""
    for i in range(most):
        if len({text[i] for text in texts}) > 1:
            return i
    return max(0, most)


def _fill(row, around, length, ends, settings):
    """The fixed text of one canvas row, in place; the slot stays noise."""
    n_before, n_after = len(around.before), len(around.after)
    needed = n_before + length + n_after + ends
    if needed > len(row):
        raise DgemmaError(
            f"the fixed text and a choice take {needed} tokens, expected at most {len(row)}, one canvas; shorten it"
        )
    row[:n_before] = around.before
    row[n_before + length : n_before + length + n_after] = around.after
    if ends:
        # The turn's end is the stop id that ended answers in training; `<eos>` filled the rest.
        stops = [token for token in settings.stop_token_ids if token != EOS] or [EOS]
        row[needed - 1 :] = EOS
        row[needed - 1] = stops[0]


def probabilities(scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Scores in nats (n,) → probabilities (n,)"""
    scaled = np.asarray(scores, np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    return p / p.sum()


class Bin(NamedTuple):
    """Decisions of about the same confidence."""

    low: float
    high: float
    n: int
    confidence: float  # the mean probability of the chosen answer
    accuracy: float  # the share of right answers


class Reliability(NamedTuple):
    """How far stated probabilities can be believed. ece: the expected calibration error, the bins' mean gap."""

    bins: list[Bin]
    ece: float
    n: int


def reliability(confidence: np.ndarray, right: np.ndarray, n_bins: int = 10) -> Reliability:
    """confidence (n,): the probability of each chosen answer. right (n,) bool. Empty bins are left out."""
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, bool)
    which = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    bins = []
    for i in np.unique(which):
        inside = which == i
        mean, accuracy = float(confidence[inside].mean()), float(right[inside].mean())
        bins.append(Bin(i / n_bins, (i + 1) / n_bins, int(inside.sum()), mean, accuracy))
    n = len(confidence)
    return Reliability(bins, sum(b.n * abs(b.confidence - b.accuracy) for b in bins) / max(1, n), n)
