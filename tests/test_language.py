"""Strings of a language on a canvas: likeliest and drawn, and how sure each slot is; the oracle tries every string."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.automaton import compile_regex, lift
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.language import Ending, Language, solve

TEXTS = [None, None, b"a", b"b", b"ab", b"c", b"bb", None]  # 0 pad, 1 eos, 7 the turn's end
PAD, EOS, TURN = 0, 1, 7


def language_of(regex):
    return Language(lift(compile_regex(regex), TEXTS), (EOS, TURN), (PAD, EOS))


LANGUAGES = {regex: language_of(regex) for regex in ("a(b|c)*", "(ab)+c?|bb", "a", "")}


def text_of(string):
    """The text of a string and whether it ends properly: stop, then fill. None where it cannot be."""
    text, rest = b"", list(string)
    while rest and TEXTS[rest[0]] is not None:
        text += TEXTS[rest.pop(0)]
    if not rest:
        return text, False
    return (text, True) if rest[0] in (EOS, TURN) and set(rest[1:]) <= {PAD, EOS} else None


def shortest_end(regex, text, left):
    """Whether `text` grows into a whole one with at most `left` more tokens."""
    tails = itertools.chain.from_iterable(itertools.product([t for t in TEXTS if t], repeat=n) for n in range(left + 1))
    return any(re.fullmatch(regex, (text + b"".join(tail)).decode()) for tail in tails)


def all_strings(regex, C, ending, known=None):
    """Every allowed canvas, by trying all."""
    for string in itertools.product(range(len(TEXTS)), repeat=C):
        if known is not None and any(k >= 0 and k != t for k, t in zip(known, string, strict=True)):
            continue
        found = text_of(string)
        if found is None:
            continue
        text, ended = found
        n_text = sum(TEXTS[t] is not None for t in string)
        if n_text > ending.room or (ending.cut and not ended):
            continue
        if re.fullmatch(regex, text.decode()) if ended else shortest_end(regex, text, ending.left):
            yield string


CASES = [
    ("a(b|c)*", 4, Ending(4), None), ("a(b|c)*", 4, Ending(4, 2), None), ("a(b|c)*", 4, Ending(2), None),
    ("(ab)+c?|bb", 4, Ending(4), None), ("(ab)+c?|bb", 4, Ending(4, 1), None),
    ("(ab)+c?|bb", 4, Ending(4, cut=True), None),
       ("a", 3, Ending(3), None), ("", 3, Ending(3), None), ("a(b|c)*", 4, Ending(4), [-1, 5, -1, -1]),
    ("(ab)+c?|bb", 4, Ending(4, 1), [-1, -1, TURN, -1]),
]  # fmt: skip


@pytest.mark.parametrize("regex, C, ending, known", CASES)
def test_all_answers_match_the_enumeration(regex, C, ending, known):
    language = LANGUAGES[regex]
    strings = np.array(list(all_strings(regex, C, ending, known)))
    assert len(strings)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        weights = rng.normal(0, 3, (C, len(TEXTS)))
        uniforms = rng.random(C)
        own = weights[:, language.alive].astype(np.float32)
        found = solve(language, own, language.start, ending, uniforms, known)

        exact = np.full((C, len(TEXTS)), -np.inf)
        exact[:, language.alive] = own
        scores = exact[np.arange(C), strings].sum(axis=1)
        p = np.exp(scores - scores.max())
        p /= p.sum()
        assert tuple(found.draft) == tuple(strings[p.argmax()])

        # Each slot's own distribution: over the tokens that some string has there.
        possible = np.array([np.isin(np.arange(len(TEXTS)), strings[:, slot]) for slot in range(C)])
        shares = np.where(possible, np.exp(exact - exact[:, language.alive].max()), 0)
        shares /= shares.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found.shares, shares[:, language.alive], atol=1e-6)
        some = np.where(shares > 0, shares, 1)
        np.testing.assert_allclose(found.entropy, -(shares * np.log(some)).sum(axis=1), atol=1e-6)

        left = np.ones(len(strings), bool)
        for slot in range(C):  # slot by slot, inverting the distribution that the slots before leave
            cumulative = np.cumsum([p[left & (strings[:, slot] == token)].sum() for token in language.alive])
            place = np.searchsorted(cumulative, uniforms[slot] * cumulative[-1], side="right")
            assert found.sample[slot] == language.alive[place], f"{seed=} {slot=}"
            left &= strings[:, slot] == language.alive[place]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_the_weights_the_strings_are_in_the_language(data):
    regex = data.draw(st.sampled_from(list(LANGUAGES)))
    language, C = LANGUAGES[regex], 6
    ending = Ending(data.draw(st.integers(2, 8)), data.draw(st.integers(0, 2)))
    scale = data.draw(st.sampled_from([0.0, 1.0, 1e3, 1e30]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    weights = (scale * rng.normal(size=(C, len(language.alive)))).astype(np.float32)
    if data.draw(st.booleans()):
        weights[:, rng.integers(len(language.alive))] = -200.0  # a token the model would never say
    found = solve(language, weights, language.start, ending, rng.random(C))
    for string in (found.draft, found.sample):
        state = language.advance(language.start, string)
        assert language.fewest[state] <= ending.left
    assert np.isfinite(found.shares).all() and np.isfinite(found.entropy).all() and (found.entropy >= 0).all()
    np.testing.assert_allclose(found.shares.sum(axis=1), 1, atol=1e-5)


def test_a_token_that_underflows_can_still_be_the_only_one():
    language = LANGUAGES["a"]
    weights = np.where(language.alive == 2, -1e4, 0).astype(np.float32)[None].repeat(3, 0)
    found = solve(language, weights, language.start, Ending(3), np.full(3, 0.5))
    assert found.draft[0] == found.sample[0] == 2 and found.entropy[0] == 0
    assert found.shares[0, language.alive == 2] == 1


def test_samples_follow_the_distribution():
    language, rng = LANGUAGES["a(b|c)*"], np.random.default_rng(0)
    weights = rng.normal(0, 1, (4, len(language.alive))).astype(np.float32)
    drawn = [tuple(solve(language, weights, language.start, Ending(4), rng.random(4)).sample) for _ in range(2000)]
    strings = list(all_strings("a(b|c)*", 4, Ending(4)))
    scores = [weights[np.arange(4), language.places(string)].sum() for string in strings]
    p = np.exp(scores) / np.exp(scores).sum()
    counts = np.array([drawn.count(string) for string in strings]) / len(drawn)
    assert np.abs(counts - p).max() < 0.04 and counts.sum() == 1


def test_known_tokens_that_no_text_holds_leave_nothing():
    language, weights = LANGUAGES["a"], np.zeros((2, len(LANGUAGES["a"].alive)), np.float32)
    assert solve(language, weights, language.start, Ending(2), np.full(2, 0.5), [3, -1]) is None
    assert solve(language, weights, language.start, Ending(2), np.full(2, 0.5), [5, -1]) is None
    assert solve(language, weights, language.start, Ending(2), np.full(2, 0.5), [2, -1]) is not None


def test_states_know_their_way_to_the_end():
    language = language_of("abababc")
    assert language.fewest[language.start] == 4  # ab ab ab c
    assert language.advance(language.start, [4, 4, 4, 5, TURN, EOS, PAD]) == language.end
    with pytest.raises(DgemmaError, match="does not continue"):
        language.advance(language.start, [TURN])
    with pytest.raises(DgemmaError, match="has 4 tokens, expected at most max_new_tokens = 3"):
        language.check_room(3)


def test_a_token_cannot_be_text_and_its_end():
    with pytest.raises(ValueError, match="lift without them"):
        Language(lift(compile_regex("a"), TEXTS), (2, TURN), (PAD, EOS))


def test_alive_tokens_stand_by_class():
    language = language_of("(a|b|c)*")
    assert (np.diff(language.class_of[language.alive]) >= 0).all()
    assert set(language.alive.tolist()) == {0, 1, 2, 3, 4, 5, 6, 7}
    assert len(language.bounds) == 5  # text, turn's end, eos, pad
