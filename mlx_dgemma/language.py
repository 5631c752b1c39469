"""A regular language over tokens, and the likeliest of its strings on a canvas: dynamic programming over the slots.

Shapes   C canvas slots, A alive tokens, K classes of them, S states, E edges (state, class) → state
Source   arXiv 2505.23061 (DINGO) for the likeliest string
Differs  a second backward pass, of sums instead of maxima, gives a sample too; works on classes of tokens that no state
         tells apart; a text may end inside the canvas, or behind it

After a text comes a stop id, then fill until the canvas ends: the model was trained with `<eos>` there, and pad is
what the loop puts there. Alive tokens are sorted by class and id, so that a class is a stretch of them.
"""

import functools
from typing import NamedTuple

import numpy as np

from .automaton import TokenAutomaton
from .config import GenerationConfig
from .errors import DgemmaError

EOS = 1


class Language:
    """What a text may be. State S is behind the stop id; a state is `complete` there and where a stop id may follow."""

    def __init__(self, automaton: TokenAutomaton, stop_ids: tuple[int, ...], fill_ids: tuple[int, ...]):
        S, n_text = len(automaton.next) - 1, automaton.next.shape[1]
        self.start, self.end = automaton.start, S
        self.complete = automaton.final.copy()
        self.complete[S] = True
        # (S + 1, K): the automaton's classes, then those of special tokens; -1 where there is no edge.
        text = np.where(automaton.next == S, -1, automaton.next)
        stop = np.where(automaton.final, S, -1)
        fill = np.where(np.arange(S + 1) == S, S, -1)
        kinds = {(True, False): stop, (True, True): np.maximum(stop, fill), (False, True): fill}
        special = sorted({*stop_ids, *fill_ids})
        if any(automaton.class_of[i] >= 0 for i in special if i < len(automaton.class_of)):
            raise ValueError(f"a text holds one of the tokens {special}, which end it; lift without them")
        of_special = [(i in stop_ids, i in fill_ids) for i in special]
        self.next = np.column_stack([text, *kinds.values()])
        n_tokens = max(len(automaton.class_of), max(special) + 1)
        self.class_of = np.full(n_tokens, -1, np.int32)  # (tokens,), -1: never
        self.class_of[: len(automaton.class_of)] = automaton.class_of
        self.class_of[special] = [n_text + list(kinds).index(kind) for kind in of_special]

        alive = np.flatnonzero(self.class_of >= 0)
        self.alive = alive[np.argsort(self.class_of[alive], kind="stable")].astype(np.int32)  # (A,)
        # A class without tokens (no id is fill and not stop, say) has no place in a sum over stretches.
        used, self.class_of[alive] = np.unique(self.class_of[alive], return_inverse=True)
        self.next, sizes = self.next[:, used], np.bincount(self.class_of[alive])
        self.n_text = int((used < n_text).sum())  # classes from here on end a text
        self.bounds = np.concatenate([[0], np.cumsum(sizes)])  # (K + 1,) a class's first alive token
        self.source, self.cls = np.nonzero(self.next >= 0)  # (E,) by source
        self.target = self.next[self.source, self.cls]
        self.fewest = self._fewest()

    @classmethod
    def of(cls, automaton: TokenAutomaton, settings: GenerationConfig) -> "Language":
        return cls(automaton, settings.stop_token_ids, cls.fill_ids(settings))

    @staticmethod
    def fill_ids(settings: GenerationConfig) -> tuple[int, ...]:
        """What stands behind the stop id."""
        return (EOS, settings.pad_token_id)

    def _fewest(self):
        """Tokens from each state to a complete one, stop id excluded. (S + 1,)"""
        fewest, steps = np.where(self.complete, 0, -1), 0
        while (fewest < 0).any():
            steps += 1
            fewest[np.unique(self.source[(fewest[self.source] < 0) & (fewest[self.target] == steps - 1)])] = steps
        return fewest

    def check_room(self, max_new_tokens: int) -> None:
        """Raises DgemmaError where no text of the language has so few tokens."""
        if self.fewest[self.start] > max_new_tokens:
            raise DgemmaError(
                f"the shortest text of this structure has {self.fewest[self.start]} tokens, expected at most"
                f" max_new_tokens = {max_new_tokens}; raise it or shorten the structure"
            )

    def advance(self, state: int, tokens) -> int:
        """The state behind `tokens`. Raises DgemmaError where they leave the language."""
        for token in map(int, tokens):
            following = self.next[state, self.class_of[token]] if self._is_alive(token) else -1
            if following < 0:
                raise DgemmaError(f"token {token} does not continue this structure; expected one that does")
            state = int(following)
        return state

    def places(self, tokens) -> np.ndarray:
        """Where tokens stand among the alive ones, -1 for others."""
        return np.array([self._place.get(int(token), -1) for token in tokens], np.int64)

    def _is_alive(self, token):
        return 0 <= token < len(self.class_of) and self.class_of[token] >= 0

    @functools.cached_property
    def _place(self):
        return {int(token): place for place, token in enumerate(self.alive)}

    @functools.cached_property
    def _out(self):
        """Where each state's edges begin: every state has some, for a complete one can stop and the last can fill."""
        return np.searchsorted(self.source, np.arange(len(self.next)))


class Ending(NamedTuple):
    """How a canvas may end. room: slots that still count; what follows them only ends the text.

    left: tokens that may follow this canvas. cut: what was cut off is fill, so the text ends before.
    """

    room: int
    left: int = 0
    cut: bool = False


class Found(NamedTuple):
    """Strings of the language on one canvas, and how sure each slot is."""

    draft: np.ndarray  # (C,) int32, the likeliest string
    sample: np.ndarray  # (C,) int32, a string drawn
    shares: np.ndarray  # (C, A) float32, each slot's distribution over the alive tokens
    entropy: np.ndarray  # (C,) float64, nats


class Classes(NamedTuple):
    """A slot's log-weights, summed up by class."""

    best: np.ndarray  # (C, K) the largest
    total: np.ndarray  # (C, K) log of the sum of exponentials
    spread: np.ndarray  # (C, K) entropy within the class, nats
    shares: np.ndarray  # (C, A) float32, each token's share of its class


def solve(language: Language, weights, start: int, ending: Ending, uniforms, known=None, out=None) -> Found | None:
    """All of `Found` from log-weights (C, A); None where no string of the language fits.

    A string's probability is proportional to the product of its tokens' weights. Shares and entropy are each slot's
    own, over the tokens that some string has there. uniforms (C,): one number per slot. known (C,): tokens that stand
    already, -1 where none does. out: an array for the shares.
    """
    known = np.full(len(weights), -1) if known is None else np.asarray(known)
    classes = by_class(weights, language.bounds, out)
    _impose(classes, language, known, ending.room)
    ends = _ends(language, ending)
    sums = backward(classes.total, language, ends, _log_sum)
    if not sums[0, start] > -np.inf:
        return None
    draft = _likeliest(classes, language, weights, start, backward(classes.best, language, ends, np.maximum.reduceat))
    sample = _drawn(classes, language, start, sums, uniforms)
    by_slot = alone(classes.total, language, start, sums)
    # Entropies add up: of the class, and of the token within.
    entropy = -np.sum(by_slot * np.log(np.where(by_slot > 0, by_slot, 1)), axis=1) + (by_slot * classes.spread).sum(1)
    shares = _weighted(classes.shares, by_slot, language.bounds)
    for slot in np.flatnonzero(known >= 0):
        draft[slot] = sample[slot] = known[slot]
        shares[slot] = language.alive == known[slot]
    return Found(draft, sample, shares, np.where(known >= 0, 0, np.maximum(entropy, 0)))


def by_class(weights: np.ndarray, bounds: np.ndarray, out=None) -> Classes:
    """Weights seen from each class's largest, so that nothing overflows and no class is lost."""
    C, K = len(weights), len(bounds) - 1
    best, total, spread = (np.empty((C, K)) for _ in range(3))
    shares = np.empty(weights.shape, np.float32) if out is None else out
    starts, sizes = bounds[:-1], np.diff(bounds)
    for slot, row in enumerate(weights):  # one slot fits a CPU's cache
        top = np.maximum.reduceat(row, starts)
        below = row - np.repeat(np.where(top == -np.inf, 0, top), sizes)
        e = np.exp(below, out=shares[slot], casting="same_kind")
        sums = np.add.reduceat(e, starts, dtype=np.float64)
        below[e == 0] = 0  # 0 · −∞
        fall = np.add.reduceat(np.multiply(e, below, out=below, casting="same_kind"), starts, dtype=np.float64)
        some = np.where(sums > 0, sums, 1)
        best[slot] = top
        total[slot] = np.where(sums > 0, top + np.log(some), -np.inf)
        spread[slot] = np.log(some) - fall / some
        e *= np.repeat((1 / some).astype(np.float32), sizes)
    return Classes(best, total, spread, shares)


def _impose(classes, language, known, room):
    """What cannot be gets weight 0: other tokens than the known ones, and text where no token counts any more."""
    for slot in np.flatnonzero(known >= 0):
        classes.best[slot] = classes.total[slot] = -np.inf
        if language._is_alive(known[slot]):
            classes.best[slot, language.class_of[known[slot]]] = 0
            classes.total[slot, language.class_of[known[slot]]] = 0
    classes.best[max(0, room) :, : language.n_text] = -np.inf
    classes.total[max(0, room) :, : language.n_text] = -np.inf


def _ends(language, ending):
    """Which states may stand behind the last slot. (S + 1,)"""
    if ending.cut:
        return np.arange(len(language.next)) == language.end
    return language.fewest <= max(0, ending.left)


def backward(weights, language, ends, gather) -> np.ndarray:
    """Log-weight of all ways from each state before each slot to an end. (C + 1, S + 1)"""
    ways = np.empty((len(weights) + 1, len(ends)))
    ways[-1] = np.where(ends, 0, -np.inf)
    for slot in reversed(range(len(weights))):
        ways[slot] = gather(weights[slot][language.cls] + ways[slot + 1][language.target], language._out)
    return ways


def _log_sum(values, starts):
    top = np.maximum.reduceat(values, starts)
    safe = np.where(top == -np.inf, 0, top)
    sums = np.add.reduceat(np.exp(values - np.repeat(safe, np.diff(starts, append=len(values)))), starts)
    return np.where(sums > 0, safe + np.log(np.where(sums > 0, sums, 1)), -np.inf)


def alone(weights, language, start, sums) -> np.ndarray:
    """Each slot's own probability of each class, among those that some string has there. (C, K)"""
    here, found = np.arange(len(language.next)) == start, np.zeros(weights.shape)
    for slot, row in enumerate(weights):
        possible = here[language.source] & (sums[slot + 1] > -np.inf)[language.target] & (row > -np.inf)[language.cls]
        here, classes = np.zeros(len(here), bool), np.zeros(len(row), bool)
        here[language.target[possible]] = classes[language.cls[possible]] = True
        found[slot] = np.exp(np.where(classes, row - row[classes].max(), -np.inf))
    return found / found.sum(axis=1, keepdims=True)


def _likeliest(classes, language, weights, state, best):
    """The string along the largest weights."""
    tokens = np.empty(len(weights), np.int32)
    for slot, row in enumerate(classes.best):
        ways = _ways(row, language, state, best[slot + 1])
        cls = int(ways.argmax())
        first, last = language.bounds[cls : cls + 2]
        tokens[slot] = language.alive[first + weights[slot, first:last].argmax()]
        state = language.next[state, cls]
    return tokens


def _drawn(classes, language, start, sums, uniforms):
    """A string, each slot's class and token within it by inverting one cumulative distribution."""
    tokens, state = np.empty(len(uniforms), np.int32), start
    for slot, row in enumerate(classes.total):
        ways = _ways(row, language, state, sums[slot + 1])
        cls, rest = _invert(np.exp(ways - ways.max()), float(uniforms[slot]))
        first, last = language.bounds[cls : cls + 2]
        place, _ = _invert(classes.shares[slot, first:last].astype(np.float64), rest)
        tokens[slot] = language.alive[first + place]
        state = language.next[state, cls]
    return tokens


def _ways(row, language, state, following):
    """Log-weight of going on from `state` by each class. (K,)"""
    target = language.next[state]
    return np.where(target >= 0, row + following[target], -np.inf)


def _invert(p, uniform):
    """The entry of p (n,) that a share `uniform` of its sum falls into, and where inside it, 0 to 1."""
    cumulative = np.cumsum(p)
    target = uniform * cumulative[-1]
    place = min(int(np.searchsorted(cumulative, target, side="right")), len(p) - 1)
    while p[place] == 0:  # rounding at the upper end
        place -= 1
    return place, float(np.clip((target - cumulative[place] + p[place]) / p[place], 0, 1))


def _weighted(shares, by_slot, bounds):
    """Shares within classes → within slots, in place. (C, A)"""
    sizes = np.diff(bounds)
    for slot, row in enumerate(shares):
        row *= np.repeat(by_slot[slot].astype(np.float32), sizes)
    return shares
