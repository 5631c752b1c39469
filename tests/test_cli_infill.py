"""`--infill`, and `--prefix` with `--suffix`: what is printed, and what is refused before a model is read."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_dgemma import cli
from mlx_dgemma.cli_infill import read_lengths
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.infilling import LENGTHS


@pytest.fixture
def write(tmp_path):
    def write(content, name="x.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture
def no_model(monkeypatch):
    def load(options, context):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(cli, "load_mlx", load)


@pytest.fixture
def generate(tiny, capsysbinary, monkeypatch):
    """Runs the command; returns its code, and the bytes of stdout and stderr."""

    def generate(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin), read=lambda: stdin.decode()))
        code = cli.main(["--model", str(tiny), "--dtype", "float32", *map(str, arguments)])
        return code, *capsysbinary.readouterr()

    return generate


@pytest.mark.parametrize(
    "text",
    [
        "the <|hole:2|> sand",
        "<|hole:3|>",
        "é<|hole:1|>🙂",
        "a\r\n<|hole:2|>\r\nb",
        "th<|hole:2|>e<|hole:1|>",
        "the <|hole:2|> and the sand is red and the sand is red and the sand is red",
        "<eos><|hole:1|><|turn><|hole:1|>",
    ],
)
def test_known_text_is_printed_byte_for_byte(generate, write, text):
    code, out, err = generate("--infill", write(text), "--json")
    assert code == 0 and err == b""
    found = json.loads(out)
    holes = iter(found["holes"])
    parts = re.split(r"<\|hole:\d\|>", text)
    want = "".join(part + next(holes, "") for part in parts)
    assert found["text"] == want and found["search_steps"] == 0
    code, out, err = generate("--infill", write(text))
    assert code == 0 and out == want.encode() and b"loaded" in err and b"| seed 0" in err
    code, out, _ = generate("--infill", "-", stdin=text.encode())
    assert code == 0 and out == want.encode()


def test_between_prefix_and_suffix_only_what_belongs_there_is_printed(generate, write):
    before, behind = write("the ", "before"), write(" sand\r\n", "behind")
    for options, stdin in (
        (["--prefix", before, "--suffix", behind], b""),
        (["--prefix", "-", "--suffix", behind], b"the "),
        (["--prefix", before, "--suffix", "-"], b" sand\r\n"),
    ):
        code, out, _ = generate(*options, "--lengths", 2, stdin=stdin)
        as_json = json.loads(generate(*options, "--lengths", 2, "--json", stdin=stdin)[1])
        assert code == 0 and out.decode() == as_json["holes"][0] and as_json["lengths"] == [2]
        assert as_json["text"] == f"the {as_json['holes'][0]} sand\r\n"
    for options in (["--prefix", before], ["--suffix", behind]):
        assert generate(*options, "--lengths", 1)[0] == 0


def test_lengths_are_tried(generate, write):
    code, out, err = generate("--infill", write("the <|hole|> sand"), "--lengths", "2-4")
    assert code == 0 and b"trying 3 lengths for each hole without one" in err
    found = json.loads(generate("--infill", write("the <|hole|> sand"), "--lengths", "2-4", "--json")[1])
    assert found["lengths"][0] in (2, 3, 4) and found["search_steps"] >= 6
    assert found["search_seconds"] > 0 and found["doubt"] > 0
    assert found["text"].encode() == out


def test_the_search_is_shown_and_so_is_a_doubt(generate, write, monkeypatch):
    """The tiny model is random: it doubts everything. A status is for terminals; what it cost for all."""
    path = write("the <|hole|> sand")
    code, _, err = generate("--infill", path, "--steps", 2, "--lengths", "2-4")
    lines = err.decode().splitlines()
    assert code == 0 and any(re.fullmatch(r"compared lengths in \d+ steps, \d+\.\d\d s", line) for line in lines)
    assert any(re.fullmatch(r"the model doubts the result \(\d+\.\d nats\): look at it twice", line) for line in lines)
    code, _, err = generate("--infill", write("the <|hole:2|> sand", "y.txt"), "--steps", 2)
    assert code == 0 and b"doubts" not in err and b"compared" not in err  # nothing was compared
    shown = []
    monkeypatch.setattr("rich.status.Status.update", lambda self, text: shown.append(text))
    generate("--infill", path, "--steps", 2, "--lengths", "2-4")
    assert shown[0] == "hole 1: 3 lengths, step 1 of 8"


def test_a_recorded_search_begins_with_the_text(generate, write, tmp_path):
    code, *_ = generate(
        "--infill", write("a<|hole|>b"), "--steps", 2, "--lengths", "2", "--record", tmp_path / "x.html"
    )
    assert code == 0 and (tmp_path / "x.html").exists()


def test_lengths_beyond_the_canvas_name_the_option(generate, write):
    code, out, err = generate("--infill", write("a<|hole|>b"), "--lengths", "70-80")
    assert code == 1 and out == b"" and b"error: --lengths is 70-80, the canvas has 16 tokens; give fewer" in err


def test_read_lengths():
    assert read_lengths("4-6") == (4, 5, 6) and read_lengths("8") == (8,) and read_lengths(None) == LENGTHS
    for text in ("0", "6-4", "x", "", "3-", "-3", "1:4"):
        with pytest.raises(DgemmaError, match="--lengths is .*, expected tokens such as 4-12 or 8"):
            read_lengths(text)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("the sand", [], "found no hole in the text, expected <|hole|> or <|hole:N|>"),
        ("", [], "found no hole in the text"),
        ("a <|hole:0|>", [], "found '<|hole:0|>', expected <|hole:N|> with N tokens"),
        (b"a\0<|hole|>", [], "is a binary file, expected text"),
        (b"\xff<|hole|>", [], "is not UTF-8 text (byte 0 is 0xFF); save it as UTF-8"),
        ("<|hole|>", ["--lengths", "0-3"], "--lengths is '0-3', expected tokens such as 4-12 or 8"),
        ("<|hole|>", ["--steps", "0"], "--steps is 0"),
        ("<|hole|>", ["--record", "none/x.html"], "cannot be written (No such file or directory)"),
        ("<|hole|>", ["--prompt", " "], "the prompt is empty"),
    ],
)
def test_bad_input_is_found_before_the_model_is_read(generate, no_model, write, content, options, message):
    path = write(content)
    code, out, err = generate("--infill", path, *options)
    assert code == 1 and out == b"" and err.startswith(b"error: ") and message in err.decode() and err.count(b"\n") == 1
    assert Path(path).read_bytes() == (content if isinstance(content, bytes) else content.encode())


def test_other_bad_files(generate, no_model, write, tmp_path):
    empty = write("", "empty")
    for options, message in [
        (["--infill", tmp_path], "cannot be read (Is a directory)"),
        (["--infill", tmp_path / "none"], "cannot be read (No such file or directory)"),
        (
            ["--prefix", empty, "--suffix", empty],
            "--prefix and --suffix are empty, expected text on one side of the hole",
        ),
        (["--infill", write("<|hole|>"), "--record", tmp_path / "x.txt"], "is the text itself, expected a page's name"),
    ]:
        code, out, err = generate(*options)
        assert code == 1 and out == b"" and message in err.decode() and err.count(b"\n") == 1
    assert (tmp_path / "x.txt").read_text() == "<|hole|>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a<|hole:17|>", "the hole takes 17 tokens, the canvas has 16; make it shorter"),
        ("<|hole:8|>xyz<|hole:8|>", "the holes take 16 tokens and the text between them 3 tokens, the canvas has 16"),
        (
            "<|hole|>" + "xyz" * 6 + "<|hole|>",
            "the known text between the holes alone takes 18 tokens, the canvas has 16",
        ),
    ],
)
def test_what_the_canvas_has_no_room_for(generate, write, tmp_path, text, message):
    record = tmp_path / "x.html"
    record.write_text("an older page")
    code, out, err = generate("--infill", write(text), "--record", record)
    errors = [line for line in err.decode().splitlines() if not line.startswith(("loaded", "trying"))]
    assert code == 1 and out == b"" and len(errors) == 1 and errors[0].startswith(f"error: {message}")
    assert record.read_text() == "an older page"


@pytest.mark.parametrize(
    "options",
    [
        ["--infill", "a", "--prefix", "b"],
        ["--infill", "a", "--chat"],
        ["--infill", "a", "--max-tokens", "3"],
        ["--suffix", "a", "--drop-tail"],
        ["--prefix", "a", "--regex", "x"],
        ["--prefix", "-", "--suffix", "-"],
        ["--infill", "-", "--prompt", "-"],
        ["--prompt", "a", "--lengths", "3"],
    ],
)
def test_options_that_exclude_each_other(generate, no_model, options):
    with pytest.raises(SystemExit) as stopped:
        generate(*options)
    assert stopped.value.code == 2


def test_a_page_is_recorded(generate, write, tmp_path):
    code, _, _ = generate("--infill", write("the <|hole:2|> sand"), "--record", tmp_path / "x.html")
    assert code == 0 and "dgemma-replay" in (tmp_path / "x.html").read_text()


def test_bytes_whatever_the_locale_says(tiny, write):
    command = [sys.executable, "-m", "mlx_dgemma.generate", "--model", tiny, "--infill", write("é<|hole:1|>語\r\n")]
    done = subprocess.run(
        command, capture_output=True, env={"PYTHONIOENCODING": "latin-1", "OPENBLAS_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("é".encode()) and done.stdout.endswith("語\r\n".encode())
