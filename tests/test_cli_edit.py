"""`python -m mlx_dgemma.edit`, and the same on ggml: what is printed or written, and what is refused before a model
is read, with the user's file as it was."""

import io
import json
import os
import stat
import sys
from types import SimpleNamespace

import pytest

from mlx_dgemma import cli_edit
from mlx_dgemma.cli_edit import read_range, shown_name
from mlx_dgemma.editing import split_lines
from mlx_dgemma.errors import DgemmaError
from tests.test_editing import apply

TEXT = "the sand\r\nand the tin\r\nis red"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.py"
    path.write_bytes(TEXT.encode())
    path.chmod(0o640)
    return path


@pytest.fixture
def no_model(monkeypatch):
    def load(options, context):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(cli_edit, "load_mlx", load)


@pytest.fixture
def edit(tiny, capsysbinary, monkeypatch):
    """Runs the command; returns its code, stdout and stderr."""

    def edit(*arguments, stdin=b"", instruction="say"):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        options = ["--model", tiny, "--dtype", "float32", "-i", instruction, "--steps", 3]
        code = cli_edit.main(list(map(str, [*options, *arguments])))
        return code, *(text.decode() for text in capsysbinary.readouterr())

    return edit


def test_the_diff_is_printed_and_the_file_stays(edit, path):
    code, out, err = edit(path, "--lines", "2")
    assert code == 0 and path.read_bytes() == TEXT.encode() and "| seed 0" in err
    assert out.startswith("--- a/x.py\n+++ b/x.py\n@@ ")
    new = split_lines(apply(out, TEXT))
    assert new[0] == "the sand\r\n" and new[-1] == "is red" and new[1:-1] != ["and the tin\r\n"]
    assert edit(path, "--lines", "2", "--diff")[1] == out
    as_json = json.loads(edit(path, "--lines", "2", "--json")[1])
    assert as_json["diff"] == out and as_json["text"] == apply(out, TEXT) and as_json["steps"] == 3
    assert path.read_bytes() == TEXT.encode() and os.listdir(path.parent) == ["x.py"]


def test_write(edit, path):
    _, changes, _ = edit(path, "--lines", "1:2")
    code, out, err = edit(path, "--lines", "1:2", "--write")
    assert code == 0 and out == "" and changes in err and err.endswith(f"wrote {path}\n")
    assert path.read_bytes().decode() == apply(changes, TEXT) != TEXT
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and os.listdir(path.parent) == ["x.py"]


def test_a_link_is_written_through(edit, path, tmp_path):
    link = tmp_path / "link.py"
    link.symlink_to("x.py")
    assert edit(link, "--write")[0] == 0
    assert link.is_symlink() and path.read_bytes() != TEXT.encode() and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_filter(edit, path):
    """In vim `:%!python -m mlx_dgemma.edit - --text …` takes stdout and stderr for the new text."""
    code, out, err = edit("-", "--text", stdin=TEXT.encode())
    assert code == 0 and err == "" and out == edit(path, "--text")[1]
    assert out == json.loads(edit("-", "--json", stdin=TEXT.encode())[1])["text"]
    assert edit("-", stdin=TEXT.encode())[1].startswith("--- a/stdin\n+++ b/stdin\n")


def test_nothing_changed(edit, path, monkeypatch):
    from mlx_dgemma.editing import Edited

    def same(session, text, *args, **kwargs):
        for event in real(session, text, *args, **kwargs):
            yield event if not isinstance(event, Edited) else event._replace(text=text)

    real = cli_edit.edit
    monkeypatch.setattr(cli_edit, "edit", same)
    before = path.stat()
    for options in ([], ["--write"]):
        code, out, err = edit(path, *options)
        assert code == 0 and out == "" and err.endswith("nothing changed\n")
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert edit(path, "--text")[1] == TEXT


def test_several_canvases_are_counted_together_and_the_last_is_recorded(edit, path, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_dgemma.editing.DELTAS", ())  # otherwise a canvas may be written twice
    path.write_text("the sand\n" * 9)
    code, _, err = edit(path, "--lines", "1", "--lines", "9", "--record", tmp_path / "x.html")
    assert code == 0 and "2 blocks, 6 steps" in err
    page = (tmp_path / "x.html").read_text()
    assert page.count('"settled":') == 1 and '"totals":{"steps":3,' in page


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", [], "the text is empty, expected something to edit"),
        ("\n\n", [], "lines 1:2 are blank, expected text to rewrite"),
        (b"a\0", [], "x.py: is a binary file, expected text"),
        (b"\xe9", [], "x.py: is not UTF-8 text (byte 0 is 0xE9); save it as UTF-8"),
        ("a\nb\n", ["--lines", "3"], "lines 3:3 are not in the text, which has 2 lines; expected FIRST:LAST between"),
        ("a\nb\n", ["--lines", "1:2", "--lines", "2"], "lines 2:2 overlap with a range that ends at line 2"),
        ("a\n", ["--lines", "0"], "--lines is '0', expected FIRST:LAST such as 3:7, counted from 1"),
        ("a\n", ["--lines", ""], "--lines is '', expected FIRST:LAST"),
        ("a\n", ["--noise", "2"], "--noise is 2.0, expected a share between 0 and 1"),
        ("a\n", ["--noise", "nan"], "--noise is nan, expected a share"),
        ("a\n", ["--instruction", " \n"], "--instruction is empty, expected what to change"),
        ("a\n", ["--instruction", "\udce9"], "the prompt is not valid UTF-8"),
        ("a\n", ["--steps", "0"], "--steps is 0"),
        ("a\n", ["--preset", "x"], "preset is 'x'"),
        ("a\n", ["--record", "none/x.html"], "cannot be written (No such file or directory)"),
        ("a\n", ["--record", ""], "is not a file, expected a file's name"),
    ],
)
def test_bad_input_is_found_before_the_model_is_read(edit, no_model, path, content, options, message):
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content)
    for also in ([], ["--write"]):
        code, out, err = edit(path, *options, *also)
        assert code == 1 and out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert path.read_bytes() == content and os.listdir(path.parent) == ["x.py"]


def test_files_that_cannot_be_edited(edit, no_model, path, tmp_path):
    path.chmod(0o444)
    for arguments, message in [
        ([path, "--write"], "x.py: is read-only, expected a file that may be written; change its permissions"),
        (["-", "--write"], "--write needs a file, found standard input; with --text the edited text goes to stdout"),
        ([tmp_path], "cannot be read (Is a directory)"),
        ([tmp_path / "none", "--write"], "cannot be read (No such file or directory)"),
        (["/dev/null", "--write"], "the text is empty"),
        (
            [path, "--record", tmp_path / "." / "x.py"],
            "is the text itself, expected a page's name; choose another name",
        ),
        ([path, "--record", tmp_path], "is not a file"),
    ]:
        code, out, err = edit(*arguments, stdin=b"a\n")
        assert code == 1 and out == "" and message in err and err.count("\n") == 1, err
    assert path.read_bytes() == TEXT.encode()


def test_a_read_only_file_can_be_looked_at(edit, path):
    path.chmod(0o444)
    assert edit(path)[0] == 0


@pytest.mark.parametrize("change", ["another text", None])
def test_a_file_that_changed_meanwhile_stays(edit, path, monkeypatch, change):
    load = cli_edit.load_mlx

    def meanwhile(options, context):
        path.unlink()
        if change is not None:
            path.write_text(change)
        return load(options, context)

    monkeypatch.setattr(cli_edit, "load_mlx", meanwhile)
    code, out, err = edit(path, "--write")
    assert code == 1 and out == ""
    assert ("has changed since it was read; nothing was written, run it again" if change else "cannot be read") in err
    assert path.read_text() == change if change else not path.exists()


@pytest.mark.parametrize("options", [["--write", "--diff"], ["--text", "--json"], ["--noise", "x"], ["--seed"]])
def test_wrong_usage(edit, no_model, path, options):
    with pytest.raises(SystemExit) as stopped:
        edit(path, *options)
    assert stopped.value.code == 2 and path.read_bytes() == TEXT.encode()


def test_read_range():
    assert read_range("3:7") == (3, 7) and read_range("12") == (12, 12)
    for text in ("7:3", "0:3", "3-7", "3:", ":3", "a", "-1"):
        with pytest.raises(DgemmaError, match="--lines is .*, expected FIRST:LAST such as 3:7, counted from 1"):
            read_range(text)


def test_a_name_is_seen_from_here(tmp_path, monkeypatch):
    (tmp_path / "here/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for file, name in [
        ("x", "x"),
        ("./below/x", "below/x"),
        (tmp_path / "here/below/x", "below/x"),
        ("../x", "x"),
        ("-", "stdin"),
    ]:
        assert shown_name(str(file)) == name


def test_ggml_edits_the_same(edit, path, tiny, tmp_path, capsysbinary):
    pytest.importorskip("xllamacpp")
    from convert import convert
    from gguf_export import cli as gguf_cli

    gguf = tmp_path / "tiny.gguf"
    convert(tiny, gguf, to="gguf", recipe="F32")
    want = json.loads(edit(path, "--json", "--lines", "1")[1])
    code = gguf_cli.main(
        ["edit", "-m", str(gguf), "--device", "cpu", str(path), "--lines", "1", "-i", "say", "--steps", "3", "--json"]
    )
    found = json.loads(capsysbinary.readouterr().out)
    assert code == 0 and found["text"] == want["text"]
