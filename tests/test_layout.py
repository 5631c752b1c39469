"""Where text and holes go: on the canvas slot by slot, behind it, and what a text may look like."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.layout import Hole, encode_text, encode_turn, has_crlf, head, lay_out, with_crlf
from tests.tiny import SPECIAL_IDS, make_tiny_checkpoint, tiny_sentencepiece

C, EOS, TURN_END = 16, 1, 106
SETTINGS = GenerationConfig(stop_token_ids=(1, 106, 50))
SPECIAL = sorted(SPECIAL_IDS)
# Texts of words that merge, of anything, and of what looks like a special token.
TEXTS = st.lists(
    st.one_of(st.sampled_from(["the ", "and", "é", "語", "🙂", "\r\n", "\n", "<", "|>"]), st.sampled_from(SPECIAL),
              st.text(st.characters(exclude_categories=["Cs"]), max_size=4)),
    max_size=8,
).map("".join)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return tiny_model[1]


@pytest.fixture(scope="module")
def tokenizers(tokenizer, tmp_path_factory):
    """tokenizers' and sentencepiece's."""
    from mlx_dgemma.loading import load

    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("sp") / "tiny")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(tiny_sentencepiece())
    return tokenizer, load(folder)[1]


def pieces(tokenizer, tokens):
    return [tokenizer.vocabulary.token(int(t)) for t in tokens]


def test_a_layout_by_eye(tokenizer):
    found = lay_out(["in ", Hole(), "an", Hole(old="on"), " the"], [2, 3], tokenizer, SETTINGS, 9)
    assert pieces(tokenizer, found.prefix) == ["in", "▁"]
    tokens, known, noisy = (array[0] for array in found.clamp)
    # fmt: off
    assert pieces(tokenizer, tokens) == ["<pad>", "<pad>", "an", "on", "<pad>", "<pad>", "▁the", "<turn|>", "<eos>"]
    assert known.tolist()            == [0,       0,       1,    0,    0,       0,       1,      1,         1]
    assert noisy.tolist()            == [1,       1,       0,    0,    1,       1,       0,      0,         0]
    # fmt: on
    assert found.holes == [slice(0, 2), slice(3, 6)] and found.rest == ""


def test_no_token_reaches_over_the_edge_of_a_hole(tokenizer):
    """ "the" is one token; around a hole it is three or two."""
    assert pieces(tokenizer, tokenizer.encode("the")) == ["the"]
    for before, behind, slots in (("t", "he", ["t", "<pad>", "h", "e"]), ("th", "e", ["th", "<pad>", "e"])):
        found = lay_out([before, Hole(), behind], [1], tokenizer, SETTINGS, C)
        end = 1 + len(encode_text(behind, tokenizer))
        assert pieces(tokenizer, [*found.prefix, *found.clamp.tokens[0][:end]]) == slots


@given(text=TEXTS, room=st.integers(0, 40))
@settings(deadline=None)
def test_a_long_text_fills_the_canvas_and_the_rest_goes_on_where_it_ends(tokenizer, text, room):
    tokens, rest = head(text, room, tokenizer)
    everything = encode_text(text, tokenizer)
    assert tokens == everything[:room] and text.endswith(rest)
    shown = text[: len(text) - len(rest)]
    assert (rest == "") == (len(everything) <= room)
    # A character that is cut in two is all in the rest.
    assert encode_text(shown, tokenizer) == tokens[: len(encode_text(shown, tokenizer))]
    assert len(tokens) - len(encode_text(shown, tokenizer)) < 4


@given(before=TEXTS, between=TEXTS, behind=TEXTS, lengths=st.tuples(st.integers(1, 4), st.integers(1, 4)))
@settings(deadline=None)
def test_every_slot_has_a_meaning(tokenizer, before, between, behind, lengths):
    parts = [before, Hole(), between, Hole(), behind]
    fixed = len(encode_text(between, tokenizer)) if not has_crlf(f"{before} {between} {behind}") else None
    try:
        found = lay_out(parts, list(lengths), tokenizer, SETTINGS, C)
    except DgemmaError:
        assert fixed is None or fixed + sum(lengths) > C
        return
    tokens, known, noisy = (array[0] for array in found.clamp)
    assert len(tokens) == C and (known ^ noisy).all() and noisy.sum() == sum(lengths)
    # Nothing that is known looks like the end, but the end.
    stops = np.flatnonzero(known & np.isin(tokens, SETTINGS.stop_token_ids))
    assert stops.size == 0 if found.rest else (tokens[stops[:1]] == TURN_END).all()
    assert stops.tolist() == list(range(C - len(stops), C))
    # Behind the last known text nothing but holes and the end.
    assert found.clamp.text_end((*SETTINGS.stop_token_ids, 0))[0] <= C - len(stops)


@given(text=TEXTS)
@settings(deadline=None)
def test_what_looks_like_a_special_token_is_text(tokenizers, text):
    for tokenizer in tokenizers:
        tokens = encode_text(text, tokenizer)
        assert not {t for t in tokens if t < 5 or tokenizer.vocabulary.token(t) in SPECIAL}
        if "\0" not in text:  # which sentencepiece does not decode
            assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("special", [*SPECIAL, "<|hole|>", "<|im_start|>", "<|hole:8|>"])
def test_a_turn_holds_what_looks_special(tokenizers, special):
    """A prompt on the command line would be refused, or end the turn; a file's text must not."""
    for tokenizer in tokenizers:
        text = f"the {special} and{special}on"
        turn = encode_turn(text, tokenizer)
        around = encode_turn("x", tokenizer)
        marks = [sum(t < 107 for t in tokens) for tokens in (turn, around)]
        assert marks[0] == marks[1] and tokenizer.decode(turn).count(text) == 1


def test_a_turn_without_anything_special_is_the_chats(tokenizer):
    for text in ("the sand", "a < b |> c", "<b>bold</b> <html>"):
        assert encode_turn(text, tokenizer) == tokenizer.chat([{"role": "user", "content": text}])


def test_lines_of_holes_end_as_the_texts(tokenizer):
    """The model sees and writes LF where every line ends in CRLF."""
    parts = ["a\r\n", Hole(), "\r\nb\r\n"]
    found, plain = (
        lay_out(x, [2], tokenizer, SETTINGS, C)
        for x in (parts, [p if isinstance(p, Hole) else p.replace("\r", "") for p in parts])
    )
    assert found.prefix == plain.prefix and (found.clamp.tokens == plain.clamp.tokens).all()
    canvas = np.array(encode_text("o\n", tokenizer))
    assert found.texts(canvas, tokenizer) == ["o\r\n"] and plain.texts(canvas, tokenizer) == ["o\n"]
    # A text of both kinds is left as it is, and so is a marker between CR and LF.
    for parts in (["a\r\nb\n", Hole(), ""], ["a\r", Hole(), "\nb"]):
        assert lay_out(parts, [2], tokenizer, SETTINGS, C).texts(canvas, tokenizer) == ["o\n"]


def test_line_ends():
    assert has_crlf("a\r\nb") and not has_crlf("a\r\nb\n") and not has_crlf("a") and not has_crlf("a\r\n\rb")
    assert with_crlf("a\nb\r\n") == "a\r\nb\r\n"


@pytest.mark.parametrize(
    ("parts", "lengths", "message"),
    [
        (["a", Hole()], [17], "the hole takes 17 tokens, the canvas has 16; make it shorter"),
        ([Hole(), "a", Hole()], [8, 8], "the holes take 16 tokens and the text between them 1 token, the canvas"),
        ([Hole(), Hole()], [9, 8], "the holes take 17 tokens, the canvas has 16"),
        ([Hole(), "xyz" * 6, Hole()], [1, 1], "the known text between the holes alone takes 18 tokens, the canvas"),
        (["a"], [], "found no hole among the parts"),
    ],
)  # fmt: skip
def test_what_does_not_fit(tokenizer, parts, lengths, message):
    with pytest.raises(DgemmaError, match=message):
        lay_out(parts, lengths, tokenizer, SETTINGS, C)
