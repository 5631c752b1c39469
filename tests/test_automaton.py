"""Regexes as automata over bytes and over tokens, against Python's own regexes and a slow walk."""

import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_dgemma import automaton
from mlx_dgemma.automaton import compile_regex, lift, token_bytes
from mlx_dgemma.config import read_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.tokenizer import Tokenizer
from tests.tiny import tiny_sentencepiece

DEMO = Path(__file__).parent.parent / "demo" / "checkpoint"


def matches(found, text: bytes):
    state = found.start
    for byte in text:
        state = found.next[state, byte]
    return bool(found.final[state])


def test_tokens_lead_through_states():
    tokens = lift(compile_regex("ab*c"), [b"a", b"b", b"c", b"bb", b"abc", b"x", None])
    # Three states: nothing yet, inside, done. `b` and `bb` do the same; `x` and None nowhere belong.
    assert tokens.class_of[1] == tokens.class_of[3] and tokens.class_of[5] == tokens.class_of[6] == -1
    assert len(tokens.next) == 4 and tokens.next.shape[1] == 4
    inside = tokens.next[tokens.start, tokens.class_of[0]]
    assert tokens.next[inside, tokens.class_of[1]] == inside
    done = tokens.next[inside, tokens.class_of[2]]
    assert tokens.final.nonzero()[0].tolist() == [done] == [tokens.next[tokens.start, tokens.class_of[4]]]


@pytest.mark.parametrize(
    "regex", ["a|ab", "a*?", "", "(ab|c)+", "^a(b|c)$", "a{2,3}|b?c", "(?i:A)b.", "[^a]b", "a|a.b", "^a|b$"]
)
def test_the_whole_text_matches_as_in_python(regex):
    found = compile_regex(regex)
    for length in range(5):
        for text in map("".join, itertools.product("abc", repeat=length)):
            assert matches(found, text.encode()) == bool(re.fullmatch(regex, text)), f"{regex=} {text=}"


def test_characters_are_utf8_and_never_nul():
    found = compile_regex("[^x]")
    assert all(matches(found, text.encode()) for text in "aé日😀")
    assert not matches(found, "é".encode()[:1]) and not matches(found, b"\0")
    assert matches(compile_regex(r"\$5\^"), b"$5^")


@pytest.mark.parametrize(
    "regex, message",
    [
        ("(a", "( without ) at character 1"), ("x[a(", "[ without ] at character 2"), ("(a(b)", "at character 1"),
        ("a)(b", "without ("), (r"a\bc", "assertion"), ("(^a|b)c", "assertion"),
        ("(?=a)b", "not valid"), (r"[^\s\S]", "empty"), ("a\0", "empty"), ("\ud800", "UTF-8"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(regex, message):
    with pytest.raises(DgemmaError, match=re.escape(message)):
        compile_regex(regex)


def test_building_is_bounded(monkeypatch):
    monkeypatch.setattr(automaton, "MAX_STATES", 50)
    with pytest.raises(DgemmaError, match=r"too large: 102 states, expected 50 states at most"):
        compile_regex("a{100}")
    monkeypatch.setattr(automaton, "SECONDS", 1)
    with pytest.raises(DgemmaError, match="more work than 1 s"):
        compile_regex("(a{1000}){1000}")
    monkeypatch.setattr(automaton, "MAX_CELLS", 10)
    with pytest.raises(DgemmaError, match="classes of tokens"):
        lift(compile_regex("abc"), [b"a", b"b", b"c"])


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DgemmaError, match="pip install outlines-core"):
        compile_regex("kept from no other test")


def test_lifting_agrees_with_a_walk_byte_by_byte():
    found = compile_regex(r'\{"a": "[a-c]{0,3}é*", "b": (1|12|123)\}')
    rng = np.random.default_rng(0)
    pieces = [
        b'{"a": "',
        b'", "b": ',
        b"}",
        b'": ',
        b"12",
        b"123",
        b"1}",
        "é".encode(),
        "éé".encode(),
        b"\xc3",
        b"\xa9",
        b"c",
        b"x",
    ]
    pieces += [bytes(rng.choice(list(b'abc", :1'), rng.integers(1, 4))) for _ in range(200)]
    tokens = lift(found, [*pieces, None])
    # Every walk of random tokens is alive in one exactly if it can be finished in the other.
    for _ in range(300):
        state, slow = tokens.start, found.start
        for piece in rng.integers(0, len(pieces), 6):
            cls = tokens.class_of[piece]
            step = tokens.next[state, cls] if cls >= 0 else len(tokens.next) - 1
            for byte in pieces[piece]:
                slow = found.next[slow, byte]
            assert (step == len(tokens.next) - 1) == (slow == len(found.next) - 1)
            if slow == len(found.next) - 1:
                slow = found.start
                state = tokens.start
                continue
            assert tokens.final[step] == found.final[slow]
            state = step


def test_a_language_that_no_token_can_write_is_empty():
    with pytest.raises(DgemmaError, match="tokenizer can write none"):
        lift(compile_regex("ab"), [b"a", None])


@pytest.fixture(params=["tokenizer.json", "tokenizer.model"])
def tokenizer(request, tmp_path, tiny):
    if request.param == "tokenizer.json":
        return Tokenizer(DEMO, read_config(DEMO))
    shutil.copy(tiny / "config.json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tiny_sentencepiece())
    return Tokenizer(tmp_path, read_config(tiny))


def test_each_tokens_bytes_are_what_it_decodes_to(tokenizer):
    texts = token_bytes(tokenizer)
    assert len(texts) == tokenizer.vocabulary.size and {len(t) for t in texts if t} > {1, 2}
    for token, text in enumerate(texts):
        if text is None:
            piece = tokenizer.vocabulary.token(token)
            assert tokenizer.decode([token]) == "" or piece.startswith("<unused"), f"{token=} {piece=}"
        else:
            assert text.decode(errors="replace") == tokenizer.decode([token]), f"{token=}"
    every_byte = {text for text in texts if text and len(text) == 1}
    assert len(every_byte) == 256
