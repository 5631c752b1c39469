"""Text end to end on the tiny checkpoint: API, chat, command line, live view."""

import importlib
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import mlx_dgemma
from mlx_dgemma.api import conversations, is_batch, make_session
from mlx_dgemma.chat import chat
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.noise import NoiseStream
from mlx_dgemma.units import human_bytes
from mlx_dgemma.view import printable
from tests.tiny import write_json

GENERATE = [sys.executable, "-m", "mlx_dgemma.generate", "--dtype", "float32"]


def run(*arguments, stdin=""):
    return subprocess.run([*GENERATE, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=120)


def test_the_same_seed_gives_the_same_text(tiny_model):
    texts = [mlx_dgemma.generate(*tiny_model, "the sand", seed=seed, max_tokens=32) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_batch_row_is_the_row_alone(tiny_model):
    model, tokenizer = tiny_model
    prompts = ["the sand", "and the rest of a longer one", "on"]
    config = model.generation_config.replace(max_new_tokens=32)
    *_, batch = mlx_dgemma.stream(model, tokenizer, prompts, config, seed=3)
    for row, prompt in enumerate(prompts):
        *_, alone = mlx_dgemma.stream(model, tokenizer, prompt, config, seed=3, rows=[row])
        assert batch.tokens[row] == alone.tokens[0], f"row {row}"


def test_events_and_stats_agree(tiny_model):
    model, tokenizer = tiny_model
    config = model.generation_config.replace(max_new_tokens=40)
    events = list(mlx_dgemma.stream(model, tokenizer, "the sand", config))
    steps = [e for e in events if isinstance(e, mlx_dgemma.StepDone)]
    blocks = [e for e in events if isinstance(e, mlx_dgemma.BlockDone)]
    done = events[-1]
    assert done.stats.steps == len(steps) == sum(int(b.steps.sum()) for b in blocks)
    assert done.stats.blocks == len(blocks) == 3
    assert len(done.tokens[0]) == done.stats.tokens == 40 and not done.stopped[0]
    assert done.tokens[0] == np.concatenate([b.tokens for b in blocks], axis=1)[0, :40].tolist()
    # What the next step reads: the sampled token where accepted, the stream's noise elsewhere.
    for e in steps:
        noise = NoiseStream(0).renoise([0], e.block, e.step, 16, 384)
        assert (e.canvas[~e.accepted] == noise[~e.accepted]).all() and e.accepted.any()
    assert 0 < done.stats.seconds_to_first_block < done.stats.seconds


def test_prompt_forms():
    user = {"role": "user", "content": "a"}
    assert conversations("a") == conversations([user]) == [[user]]
    assert conversations(["a", [user]]) == [[user], [user]]
    assert is_batch(["a"]) and not is_batch("a") and not is_batch([user])


def test_a_chat_reuses_its_prefix_and_says_the_same(tiny_model):
    model, tokenizer = tiny_model
    settings = model.generation_config.replace(max_new_tokens=16)
    chat, messages, reused = make_session(model, tokenizer, keep_prefix=True), [], []
    for turn in ("the sand", "and on", "in the end"):
        messages.append({"role": "user", "content": turn})
        *_, kept = chat.stream([messages], settings, seed=1)
        *_, fresh = make_session(model, tokenizer).stream([messages], settings, seed=1)
        assert kept.tokens == fresh.tokens
        reused.append(kept.stats.reused_tokens)
        messages.append({"role": "assistant", "content": "the and"})
    assert reused[0] == 0 < reused[1] < reused[2]
    # Another conversation starts afresh.
    *_, other = chat.stream([[{"role": "user", "content": "on"}]], settings)
    assert other.stats.reused_tokens == 0


def test_a_prompt_longer_than_the_context(tiny_model):
    with pytest.raises(DgemmaError, match=r"the prompt has \d+ tokens .* context is 4096; shorten"):
        mlx_dgemma.generate(*tiny_model, "the sand " * 2000)


def test_command_line_text_and_json(tiny):
    options = ["--model", tiny, "--prompt", "the sand", "--max-tokens", 40, "--seed", 1]
    plain, again, as_json = run(*options), run(*options), run(*options, "--json")
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout == again.stdout
    report = json.loads(as_json.stdout)
    # stdout is the text and nothing else; the pieces of a character that never ends are its only freedom
    assert plain.stdout.replace("\ufffd", "") == report["text"].replace("\ufffd", "") + "\n"
    assert len(report["tokens"]) == 40 and report["seed"] == 1 and report["stats"]["blocks"] == 3
    assert "3 blocks, 24 steps, 40 tokens, 1.7 tokens per forward |" in plain.stderr and "seed 1" in plain.stderr
    assert as_json.stderr == ""


def test_command_line_options_reach_the_sampler(tiny):
    options = ["--steps", 3, "--t-min", 0.1, "--t-max", 0.2, "--entropy-bound", 0.5, "--max-tokens", 16]
    result = run("--model", tiny, "--prompt", "-", "--json", *options, stdin="the sand\n")
    settings = json.loads(result.stdout)["settings"]
    assert (settings["max_denoising_steps"], settings["t_min"], settings["t_max"]) == (3, 0.1, 0.2)
    assert settings["entropy_bound"] == 0.5 and json.loads(result.stdout)["stats"]["steps"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "  "], "error: the prompt is empty"),
        (["--prompt", "a", "--steps", "0"], "error: --steps is 0, expected a whole number"),
        (["--prompt", "a", "--t-min", "2"], "error: --t-min is 2.0 and --t-max 0.8, expected --t-min <= --t-max"),
        (["--prompt", "a", "--image", "x.png"], "error: --image x.png: image input is not supported yet"),
        (["--prompt", "a <|foo|>"], "error: the prompt holds '<|foo|>'"),
        (["--prompt", "a", "--max-tokens", "99999"], "error: the prompt has 25 tokens and 99999 new"),
    ],
)
def test_bad_input_is_one_error_line(tiny, options, message):
    result = run("--model", tiny, *options)
    assert result.returncode == 1 and result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if not line.startswith("loaded")]
    assert len(errors) == 1 and errors[0].startswith(message), result.stderr


def test_wrong_usage_exits_with_2(tiny):
    assert run("--model", tiny).returncode == 2
    assert run("--model", tiny, "--prompt", "a", "--seed", "x").returncode == 2


def test_chat_on_the_command_line(tiny):
    result = run("--model", tiny, "--chat", "--max-tokens", 16, stdin="the sand\nand on\n\n")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("tokens per forward") == 2


@pytest.mark.parametrize("package", ["mlx_dgemma", "convert"])
def test_ctrl_c_works_from_the_commands_start(package, monkeypatch, capsys):
    """Nothing slow is imported before the handler stands, and whatever comes after it is under the handler."""
    code = f"import sys, {package}.__main__; sys.exit('numpy' in sys.modules or 'rich' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

    def interrupted(*_):
        raise KeyboardInterrupt

    command = importlib.import_module(f"{package}.__main__")
    monkeypatch.setattr(f"{package}.cli.main", interrupted)
    assert command.main() == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("prompt", [b"\xff\xfe", b"a\xff"])
def test_a_prompt_that_is_no_text(tiny, prompt):
    for arguments, stdin in (["--prompt", "-"], prompt), (["--prompt", os.fsdecode(prompt)], b""):
        done = subprocess.run([*GENERATE, "--model", str(tiny), *arguments], input=stdin, capture_output=True)
        assert done.returncode == 1 and b"error: the prompt is not valid UTF-8" in done.stderr


def test_a_closed_or_leaving_reader_is_no_crash(tiny):
    command = shlex.join([*GENERATE, "--model", str(tiny), "--prompt", "the sand", "--max-tokens", "64"])
    for line in (f"{command} >&-", f"{command} | true; exit ${{PIPESTATUS[0]}}"):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr


def test_a_bad_line_does_not_end_a_chat(tiny):
    result = run("--model", tiny, "--chat", "--max-tokens", 16, stdin="the sand\nsee <|foo|>\nand on\n\n")
    assert result.returncode == 0 and result.stderr.count("tokens per forward") == 2
    assert "error: the prompt holds '<|foo|>'" in result.stderr


def test_a_chat_prompt_may_have_several_lines(tiny, monkeypatch, capsys):
    asked, lines = [], iter(["the sand\\\n", "and on\n", "\n"])

    class Typed:
        isatty = staticmethod(lambda: False)
        readline = staticmethod(lambda: next(lines))

    monkeypatch.setattr("sys.stdin", Typed)
    done = SimpleNamespace(text="yes")
    assert chat(lambda turns: asked.append(turns) or done, [], None) == 0
    assert asked == [[{"role": "user", "content": "the sand\nand on"}]]


def test_ctrl_c_stops_an_answer_and_not_the_chat(monkeypatch, capsys):
    typed, answered = iter(["one", "two", ""]), []

    def answer(turns):
        answered.append([turn["content"] for turn in turns])
        if len(answered) == 1:
            raise KeyboardInterrupt
        return SimpleNamespace(text="yes")

    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert chat(answer, [], None) == 0
    assert answered == [["one"], ["two"]]  # the stopped turn left no trace
    assert "goes on without this turn" in capsys.readouterr().err


def test_a_full_conversation_says_so(tiny):
    # Each answer takes 16 tokens of a context of 4096, a prompt of this length the most of it.
    long = "the sand " * 900
    result = run("--model", tiny, "--chat", "--max-tokens", 16, stdin=f"{long}\n{long}\n{long}\n\n")
    assert result.returncode == 1 and "this conversation is full, start a new one" in result.stderr


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "found no prompt in the batch"),
        (b"on", {}, "found bytes as a prompt, expected a text or a list of messages"),
        ([["on"]], {}, "found list as a prompt"),
        ("on", {"steps": 3}, "setting 'steps' is not known, expected some of max_new_tokens, max_denoising_steps"),
    ],
)
def test_wrong_arguments_from_python(tiny_model, prompt, settings, message):
    with pytest.raises(DgemmaError, match=message):
        mlx_dgemma.generate(*tiny_model, prompt, **settings)


def test_the_models_own_words_are_not_checked(tiny_model):
    model, tokenizer = tiny_model
    reply = {"role": "assistant", "content": "<|im_start|>"}
    messages = [{"role": "user", "content": "on"}, reply, {"role": "user", "content": "on"}]
    assert isinstance(mlx_dgemma.generate(model, tokenizer, messages, max_tokens=16), str)


def on_a_terminal(arguments, interrupt_after=None, lines=24):
    """Run with stdout and stderr on a pseudo-terminal; returns (exit code, everything it printed)."""
    control, terminal = pty.openpty()
    process = subprocess.Popen(
        [*GENERATE, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        # A test run started in the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "TERM": "xterm", "COLUMNS": "40", "LINES": str(lines)},
    )
    os.close(terminal)
    output = b""
    while True:
        try:
            piece = os.read(control, 65536)
        except OSError:
            break
        if not piece:
            break
        output += piece
        if interrupt_after and interrupt_after in output:
            process.send_signal(signal.SIGINT)
            interrupt_after = None
    os.close(control)
    return process.wait(timeout=60), output.decode(errors="replace")


def test_the_canvas_is_drawn_and_cleared_on_a_terminal(tiny):
    code, output = on_a_terminal(["--model", tiny, "--prompt", "the sand", "--max-tokens", 32])
    assert code == 0
    assert "block 1, step 1" in output and "block 2, step 8" in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 2  # the cursor comes back after each block


def test_a_small_terminal_shows_the_end_of_the_canvas(tiny):
    _, output = on_a_terminal(["--model", tiny, "--prompt", "the sand", "--max-tokens", 160], lines=6)
    # Four blocks of special-looking tokens fill more lines than there are.
    assert [f"block {block}, step {step}" in output for block in (1, 2, 3, 4) for step in (1, 8)] == [True] * 8


def test_ctrl_c_leaves_a_clean_terminal(tiny, tmp_path):
    endless = shutil.copytree(tiny, tmp_path / "endless")
    settings = json.loads((endless / "generation_config.json").read_text())
    write_json(endless / "generation_config.json", {**settings, "eos_token_id": [10**6]})  # no token stops it
    arguments = ["--model", endless, "--prompt", "the sand", "--max-tokens", 4000]
    code, output = on_a_terminal(arguments, interrupt_after=b"block 2")
    assert code == 130
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") and "Traceback" not in output
    assert output.rstrip().endswith("stopped")


def test_generated_text_cannot_command_the_terminal():
    assert printable("a\x1b[2Jb\r\n\tc\x9b\x7f") == "a·[2Jb·\n\tc··"


def test_sizes_for_people():
    assert [human_bytes(n) for n in (12, 34_816, 4_145_084, 16.2e9)] == ["12 bytes", "34.82 kB", "4.15 MB", "16.20 GB"]
