"""Lines are rewritten, and the others are not: cutting, parts of a canvas's size, the diff."""

import random
import re
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma.api import make_session
from mlx_dgemma.editing import Piece, _canvas_sized, cut, diff, edit, split_lines
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.layout import encode_text
from tests.test_infilling import CONFIG, any_session
from tests.test_layout import TEXTS


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return tiny_model[1]


@pytest.fixture
def same_lengths(monkeypatch):
    """New lines take as many tokens as the old ones, so that every canvas is one generation."""
    monkeypatch.setattr("mlx_dgemma.editing.DELTAS", ())


def edited(session, *args, **kwargs):
    *_, event = edit(session, *args, **kwargs)
    return event


# Cutting


def test_cut_by_eye():
    assert cut("a\nb\nc\nd\n", [(3, 3), (1, 1)]) == [
        Piece("", False), Piece("a", True), Piece("\nb\n", False), Piece("c", True), Piece("\nd\n", False),
    ]  # fmt: skip
    assert cut("a\nb", None) == [Piece("", False), Piece("a\nb", True), Piece("", False)]
    assert cut("\ufeffa\r\nb\r\n", [(1, 1)]) == [Piece("\ufeff", False), Piece("a", True), Piece("\r\nb\r\n", False)]
    assert cut("a\nb\n", []) == [Piece("a\nb\n", False)]


def test_lines_are_an_editors():
    """str.splitlines has more: a file with a form feed would have other lines than its editor shows."""
    assert split_lines("a\x0cb\u2028c\x85\rd\ne\r\n\nf") == ["a\x0cb\u2028c\x85\rd\n", "e\r\n", "\n", "f"]
    assert split_lines("") == []


@pytest.mark.parametrize(
    ("text", "lines", "message"),
    [
        ("", None, "the text is empty, expected something to edit"),
        ("a\nb\n", [(3, 3)], "lines 3:3 are not in the text, which has 2 lines; expected FIRST:LAST between 1 and 2"),
        ("a\nb\n", [(0, 1)], "lines 0:1 are not in the text"),
        ("a\nb\n", [(2, 1)], "lines 2:1 are not in the text"),
        ("a\nb\nc\n", [(2, 3), (1, 2)], "lines 2:3 overlap with a range that ends at line 2; give each line once"),
        ("a\nb\nc\n", [(1, 3), (2, 2)], "lines 2:2 overlap with a range that ends at line 3"),
        ("a\n \n\n", [(2, 3)], "lines 2:3 are blank, expected text to rewrite; to write there use --infill"),
        ("\n", None, "lines 1:1 are blank"),
    ],
)
def test_ranges_that_cannot_be(text, lines, message):
    with pytest.raises(DgemmaError, match=message):
        cut(text, lines)


@given(text=TEXTS)
@settings(deadline=None)
def test_cutting_loses_nothing(text):
    assert "".join(split_lines(text)) == text
    if text.strip():
        assert "".join(piece.text for piece in cut(text, None)) == text


# Editing


@given(
    lines=st.lists(
        st.sampled_from(["the and", "a", "", "xyz 🙂", "<eos>", "the sand and the tin on the"]), min_size=1, max_size=6
    ),
    newline=st.sampled_from(["\n", "\r\n"]),
    ends=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_no_other_line_changes_whatever_the_model_says(tokenizer, lines, newline, ends, seed):
    text = newline.join(lines) + newline * ends
    before = split_lines(text)
    numbers = [i + 1 for i, line in enumerate(before) if line.strip()]
    if not numbers:
        return
    chosen = sorted(random.Random(seed).sample(numbers, random.Random(seed).randint(1, len(numbers))))
    session, _ = any_session(tokenizer, seed)
    found = edited(session, text, "say", CONFIG, lines=[(i, i) for i in chosen], seed=seed)
    # What stands around the ranges, as a pattern: each has become anything. The line behind is a line of its own.
    kept = ["".join(line if i + 1 not in chosen else line[len(line.rstrip("\r\n")) :] for i, line in group)
            for group in _between(before, chosen)]  # fmt: skip
    assert re.fullmatch("(.*)".join(map(re.escape, kept)), found.text, re.S), (text, found.text)
    if newline == "\r\n" and newline in text:
        assert found.text.count("\n") == found.text.count("\r\n")


def _between(lines, chosen):
    """What stands before, between and behind the chosen lines; a chosen line's end belongs to what follows it."""
    groups = [[]]
    for i, line in enumerate(lines):
        if i + 1 in chosen:
            groups.append([])
        groups[-1].append((i, line))
    return groups


def test_a_byte_order_mark_stays(tokenizer):
    assert edited(any_session(tokenizer)[0], "\ufeffthe\r\nand\r\n", "say", CONFIG).text.startswith("\ufeff")


def test_without_noise_and_with_a_sure_model_nothing_changes(tokenizer):
    """What the canvas starts from is the old text, also where it looks like special tokens."""
    text = "the <eos> <|turn>\nand on\n"
    session, made = any_session(tokenizer, canvas_length=64)
    list(edit(session, text, "say", CONFIG, noise=0))
    canvas = made[0].seen[0][0]
    assert tokenizer.decode(canvas.tolist()) == text
    assert f"say\n{text.rstrip()}" in tokenizer.decode(made[0].prefix[0])


def test_a_range_longer_than_the_canvas_is_edited_in_parts(tokenizer, same_lengths):
    """Whole lines, at most half a canvas each; a line longer than that is cut where characters end."""
    text = "the sand\nand the tin\n\n" * 3 + "語🙂" * 9 + "\nin\n"
    session, made = any_session(tokenizer)
    _, piece, _ = cut(text, None)
    parts = _canvas_sized(piece, session)
    assert "".join(part.text for part in parts) + "\n" == text
    assert all(len(encode_text(part.text, tokenizer)) <= 8 for part in parts if part.editable)
    assert Piece("the sand", True) in parts or Piece("the sand\nand the", True) in parts
    found = edited(session, text, "say", CONFIG)
    assert len(found.canvases) == len(made) > 5
    assert sum(x.done.stats.steps for x in found.canvases) == found.stats.steps
    assert found.stats.blocks == len(made)


def test_a_character_larger_than_half_a_canvas(tokenizer):
    assert edited(any_session(tokenizer, canvas_length=4)[0], "🙂🙂", "say", CONFIG).canvases


def test_near_ranges_share_a_canvas(tokenizer, same_lengths):
    text = "in\n" * 12
    for ranges, canvases in ([(1, 1), (2, 2)], 1), ([(1, 1), (12, 12)], 2):
        assert len(edited(any_session(tokenizer)[0], text, "say", CONFIG, lines=ranges).canvases) == canvases
    # What one canvas wrote stands before the next one's.
    session, made = any_session(tokenizer)
    found = edited(session, text, "say", CONFIG, lines=[(1, 1), (12, 12)])
    assert tokenizer.decode(made[1].prefix[0]).endswith(found.canvases[0].holes[0] + "\nin" * 10 + "\n")
    assert found.text.startswith(found.canvases[0].holes[0] + "\nin\n")


def test_same_seed_same_text_and_other_noise_another(tiny_model):
    model, tokenizer = tiny_model
    texts = [
        edited(make_session(model, tokenizer), "the sand\nand on\n", "say", model.generation_config, seed=seed).text
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("noise", [2, -0.1, float("nan")])
def test_a_share_of_noise_that_is_none(tokenizer, noise):
    with pytest.raises(DgemmaError, match="noise is .*, expected a share between 0 and 1"):
        list(edit(any_session(tokenizer)[0], "the", "say", CONFIG, noise=noise))


# Diff


def apply(changes, before):
    """A strict `patch`: context and removed lines must be where the diff says."""
    old, new, at = split_lines(before), [], 0
    lines = split_lines(changes)[2:]
    for i, line in enumerate(lines):
        if line.startswith("\\"):
            continue
        text = line[1:]
        if i + 1 < len(lines) and lines[i + 1].startswith("\\"):
            text = text.removesuffix("\n")
        if line.startswith("@@"):
            start, n = re.match(r"@@ -(\d+)(?:,(\d+))? ", line).groups()
            start = int(start) - (n != "0")
            new, at = new + old[at:start], start
        if line[0] in " -":
            assert old[at] == text
            at += 1
        if line[0] in " +":
            new.append(text)
    return "".join(new + old[at:])


LINES = st.lists(
    st.sampled_from(["a\n", "b\n", "\n", "\r\n", "c\x0c\u2028\n", "-- x\n", "\\ y\n", "é\r\n"]), max_size=12
)


@given(before=LINES, after=LINES, ends=st.tuples(st.sampled_from(["", "z"]), st.sampled_from(["", "z"])))
@settings(deadline=None)
def test_the_diff_applies(before, after, ends):
    before, after = "".join(before) + ends[0], "".join(after) + ends[1]
    changes = diff(before, after, "x.py")
    assert (changes == "") == (before == after)
    if changes:
        assert apply(changes, before) == after
        assert changes.startswith("--- a/x.py\n+++ b/x.py\n@@ ") and changes.endswith("\n")


def test_a_diff_by_eye():
    # fmt: off
    assert diff("a\nb\nc", "a\nB\nc\n", "x.py") == (
        "--- a/x.py\n"
        "+++ b/x.py\n"
        "@@ -1,3 +1,3 @@\n"
        " a\n"
        "-b\n"
        "-c\n"
        "\\ No newline at end of file\n"
        "+B\n"
        "+c\n"
    )
    # fmt: on


@pytest.mark.skipif(not shutil.which("patch"), reason="needs the program patch")
@pytest.mark.parametrize("name", ["x.py", "a folder/x y.py", "é.py"])
@pytest.mark.parametrize(
    ("before", "after"), [("a\nb", "a\nc\n"), ("a\r\nb\r\n", "a\r\nc\r\n"), ("a\x0cb\nc\n", "a\x0cb\n")]
)
def test_patch_applies_the_diff(tmp_path, name, before, after):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(before.encode())
    done = subprocess.run(
        ["patch", "--binary", "-p1"], input=diff(before, after, name).encode(), cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stdout
    assert path.read_bytes() == after.encode()


def test_a_name_with_a_newline_stays_one_line():
    assert diff("a", "b", 'x\n"y').startswith('--- "a/x\\012\\042y"\n+++ "b/')


def test_a_last_line_without_its_end_is_edited_as_one_with_it():
    """The demo keeps a line's tail; the end that the model saw is not in the result."""
    import mlx_dgemma

    model, tokenizer = mlx_dgemma.load("demo/infill")
    text = 'def tail(word):\n    """Return the first 4 letters of word in upper case."""\n    return word.lower()[:4]'
    for end in ("", "\n"):
        edited = mlx_dgemma.edit(model, tokenizer, text + end, "Fix the bug:", lines=[3])
        assert edited == text.replace("lower", "upper") + end
