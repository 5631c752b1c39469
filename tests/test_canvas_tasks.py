"""Tasks with known parts: what is generated, how it is judged, and the three ways to solve them on the checkpoint."""

import itertools
import json

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from demo import evaluate
from demo.canvas_tasks import BLANK_BOARD, MAKERS, Part, canvas_held_out, canvas_instances, judge
from demo.evaluate_canvas import IMPOSSIBLE, WarmStart, _elsewhere, evaluate_mode, record_regex
from demo.tasks import contents, held_out
from mlx_dgemma.clamp import Clamp
from mlx_dgemma.infilling import INFILL_PROMPT


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = mlx_dgemma.load(evaluate.INFILL_CHECKPOINT, mx.float32)
    return mlx_dgemma.make_session(model, tokenizer), model.generation_config


@pytest.mark.parametrize("task", MAKERS)
def test_the_right_answer_is_right_and_another_is_not(task):
    for instance in canvas_held_out(task, 12):
        texts = [part.text for part in instance.parts]
        free = [i for i, part in enumerate(instance.parts) if part.free]
        assert judge(instance, texts)
        wrong = list(texts)
        wrong[free[0]] = "5" if task == "sudoku" else " ?"
        assert not judge(instance, wrong)
        known = [i for i, part in enumerate(instance.parts) if not part.free]
        if known:  # right or not, what was given must be as it was
            assert not judge(instance, [*texts[: known[-1]], texts[known[-1]] + " ", *texts[known[-1] + 1 :]])


@pytest.mark.parametrize("task", MAKERS)
def test_held_out_content_is_that_of_the_other_tasks(task):
    """A docstring or board is on one side of the split, whatever the task."""
    subject = "sudoku" if task == "sudoku" else "python_complete"
    training = {x.content for x in itertools.islice(canvas_instances(task, 0, held_out=False), 300)}
    assert not training & contents(subject, 300, 1, held_out=True)
    assert not {x.content for x in canvas_held_out(task, 100)} & contents(subject, 1000, 1, held_out=False)


def test_a_hole_has_text_on_both_sides():
    for instance in canvas_held_out("infill", 50):
        middle, suffix = instance.parts
        assert middle.free and not suffix.free and suffix.text.strip()
        assert instance.prompt == INFILL_PROMPT and '"""' in instance.prefix


def test_own_text_differs_from_the_docstring_outside_the_hole():
    from demo.python_tasks import behaves_like, outcomes

    for instance in canvas_held_out("infill_own", 20):
        body = instance.prefix.partition('"""\n')[2] + "".join(part.text for part in instance.parts)
        assert body.rstrip("\n") == instance.truth.body
        assert behaves_like(instance.prefix + "".join(p.text for p in instance.parts), instance.truth)
        assert outcomes(instance.truth.source, instance.truth.kind)


def test_a_sudoku_prompt_has_no_given():
    instance = canvas_held_out("sudoku", 1)[0]
    assert instance.prompt == BLANK_BOARD and not any(digit in instance.prompt for digit in "1234")
    assert 6 <= sum(part.free for part in instance.parts) <= 10


def test_words_changed_elsewhere():
    instance = canvas_held_out("edit", 1)[0]._replace(parts=(Part("a = b + 1\n", True, "a = b - 1\n"),))
    texts = "a = b + 1", "a = c + 1", "x = y - 1", "a = b * 1"
    assert [_elsewhere(instance, [text]) for text in texts] == [0, 1, 2, 0]


def test_a_plain_warm_start_has_the_whole_schedule_ahead():
    nothing = np.zeros((2, 4), bool)
    start = WarmStart(np.zeros((2, 4), np.int32), nothing, nothing)
    assert start.canvas(0, 4).noise_share.tolist() == [1, 1] and Clamp(*start).noise_share.tolist() == [0, 0]


@pytest.mark.parametrize("task, mode", sorted({*itertools.product(MAKERS, evaluate.MODES)} - {*IMPOSSIBLE}))
def test_the_modes_do_what_they_are_for(loaded, task, mode):
    row = evaluate_mode(*loaded, task, mode, n=8)
    assert row["n"] == 8 and 0 <= row["right"] <= 8
    if mode == "clamp":
        assert row["intact"] == 8 and row["right"] >= 5, "the checkpoint solves four of five"


def test_json_by_schema_is_valid(loaded):
    row = evaluate_mode(*loaded, "json", "clamp", n=4)
    assert row["valid"] == 4
    import re

    assert all(re.fullmatch(record_regex(), instance.answer) for instance in held_out("json", 50))


def test_from_the_command_line(capsys):
    evaluate.main(["--task", "infill", "--mode", "clamp", "--n", "2", "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["task", "mode"] and json.loads(lines[-1])["tasks"][0]["intact"] == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "infill"], "--task infill is for --mode"),
        (["--task", "python_fix", "--mode", "clamp"], "--task python_fix is for no --mode"),
        (["--task", "infill", "--mode", "clamp", "--engine", "transformers"], "--mode is for --engine mlx and ggml"),
        (["--task", "json", "--mode", "warm"], "there is no text to start from"),
        (["--task", "sudoku", "--mode", "prompt"], "the board would be nowhere"),
        (["--task", "edit", "--mode", "warm", "--search"], "--search is for --mode clamp and --task edit, infill"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err
