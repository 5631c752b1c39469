"""Presets and the settings behind them: what they change, what they leave, and what is refused."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from demo.tasks import TASKS, held_out
from mlx_dgemma.cli import main
from mlx_dgemma.config import GenerationConfig, parse_generation_config
from mlx_dgemma.errors import ContextError, DgemmaError
from mlx_dgemma.presets import PRESETS, with_preset


@pytest.fixture(scope="module")
def demo():
    return mlx_dgemma.load("demo/checkpoint", mx.float32)


PROMPTS = [held_out(task, 2)[i].prompt for task in TASKS for i in range(2)]


def test_exact_changes_nothing():
    config = GenerationConfig(max_new_tokens=7, t_max=0.9)
    assert with_preset(config, "exact") == with_preset(config, None) == config
    assert all(with_preset(config, name).t_max == 0.9 for name in PRESETS)
    assert with_preset(with_preset(config, "balanced"), "exact") == config


def test_a_checkpoint_cannot_choose_what_the_reference_lacks():
    found = parse_generation_config({"stop": "confident", "drop_tail": True, "t_max": 0.7, "conditioning_k": 3})
    assert found == GenerationConfig(t_max=0.7)


def test_every_preset_answers_in_no_more_steps(demo):
    steps = {}
    for name in PRESETS:
        *_, done = mlx_dgemma.stream(*demo, PROMPTS, with_preset(demo[0].generation_config, name))
        steps[name] = done.stats.steps
        assert all(text.strip() for text in done.texts)
    assert steps["fast"] <= steps["balanced"] < steps["exact"]


def test_rows_are_left_out_of_a_batch_without_a_trace(demo):
    """The batch shrinks as rows settle; texts and steps are those of each prompt alone."""
    config = demo[0].generation_config
    *_, batch = mlx_dgemma.stream(*demo, PROMPTS, config, rows=list(range(len(PROMPTS))))
    alone = [list(mlx_dgemma.stream(*demo, prompt, config, rows=[row]))[-1] for row, prompt in enumerate(PROMPTS)]
    assert batch.texts == [done.text for done in alone]
    assert batch.stats.steps == sum(done.stats.steps for done in alone)


def test_self_conditioning_from_few_blocks_answers_alike(demo):
    """The demo is sure of its tokens: 2 of 16 blocks hold all but a thousandth, and flat slots are read whole."""
    config = demo[0].generation_config
    want = mlx_dgemma.generate(*demo, PROMPTS)
    assert mlx_dgemma.generate(*demo, PROMPTS, conditioning_k=2) == want
    assert config.conditioning_k is None


def test_smaller_first_canvases_answer(demo):
    short = mlx_dgemma.generate(*demo, PROMPTS[0], first_canvas=32)
    assert short.strip()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--preset", "stop"], "preset is 'stop', expected one of exact, balanced, fast"),
        (["--preset", "best"], "preset is 'best', expected one of exact, balanced, fast"),
        (["--conditioning-k", "0"], "--conditioning-k is 0, expected a whole number of at least 1"),
        (["--conditioning-epsilon", "1.0"], "--conditioning-epsilon is 1.0, expected a number in (0, 1)"),
        (["--conditioning-epsilon", "nan"], "--conditioning-epsilon is nan"),
        (["--first-canvas", "0"], "--first-canvas is 0, expected a whole number of at least 1"),
        (["--stop", "never"], "--stop is 'never', expected one of stable, confident, plateau, patience"),
        (["--schedule-steps", "0"], "--schedule-steps is 0"),
    ],
)
def test_a_wrong_setting_is_one_line(capsys, option, message):
    assert main(["--model", "demo/checkpoint", "--prompt", "hi", *option]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_canvas_that_does_not_divide_the_models_is_refused(capsys):
    assert main(["--model", "demo/checkpoint", "--prompt", "hi", "--first-canvas", "48"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]  # only the model knows its canvas
    assert last == "error: first_canvas is 48, expected a divisor of the model's canvas of 64"


def test_growing_canvases_stay_within_the_context(demo):
    for first, fits in ((None, True), (16, False)):
        config = demo[0].generation_config.replace(max_new_tokens=64, first_canvas=first)
        events = mlx_dgemma.make_session(*demo).stream([[7] * (2048 - 64)], config)
        if fits:
            next(events)
        else:
            with pytest.raises(ContextError, match="2096 in all"):
                next(events)


def test_an_empty_prompt_in_a_batch_is_refused(demo):
    with pytest.raises(DgemmaError, match="the prompt is empty"):
        mlx_dgemma.generate(*demo, ["one", " "])


def test_a_context_too_long_for_memory_is_refused_before_it_is_encoded(demo, monkeypatch):
    import mlx_dgemma.engine as module

    model = demo[0]
    engine, tokens = module.MlxEngine(model), np.full((3, 1_000), 7, np.int32)
    assert module.device_memory() > 1 << 30
    monkeypatch.setattr(module, "device_memory", lambda: mx.get_active_memory() + (1 << 20))
    with pytest.raises(DgemmaError, match="this device has .* expected .* for 3 rows of 1000 tokens .*weights"):
        engine.prefill(tokens)
    assert engine.cache.length == 0
