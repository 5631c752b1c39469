"""The denoising cross-entropy: numbers by hand, one canvas by a slow loop, and two models on the same noise."""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from convert import convert
from demo import cross_entropy
from demo.cross_entropy import Scores, canvases, main, measure, ratio, slot_scores, summary
from demo.tasks import TASKS, held_out
from demo.tokenizer import EOS, TURN_END, render
from mlx_dgemma.noise import NoiseStream

CHECKPOINT = Path(__file__).parent.parent / "demo/checkpoint"


@pytest.fixture(scope="module")
def demo():
    return mlx_dgemma.load(CHECKPOINT, mx.float32)


@pytest.fixture(scope="module")
def found(demo):
    """The shortest canvas of each task, so that the tests are fast."""
    every = canvases(demo[1], 2, 0, 64)
    return [min((c for c in every if c.instance // 2 == task), key=lambda c: len(c.prefix)) for task in range(4)]


def test_scores_by_hand():
    clean = np.array([[0, 1, 1]])
    noisy = np.array([[True, False, True]])
    even, sure = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    got = slot_scores(clean, noisy, np.stack([even, sure, even])[None], np.stack([even, even, sure])[None])
    assert got.loss[0] == pytest.approx(-np.log([0.5, 0.75, 0.5]))
    assert got.noisy_loss[0] == pytest.approx(-np.log([0.5, 1, 0.5]))
    # KL(reference || model)
    assert got.kl[0] == pytest.approx([0, 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), 0.130812], abs=1e-6)
    assert got.same[0].tolist() == [True, False, False]


def test_huge_logits_do_not_overflow():
    got = slot_scores(np.array([[0]]), np.array([[True]]), np.array([[[1e4, 0.0]]]), np.array([[[0.0, 1e4]]]))
    assert (got.loss.item(), got.kl.item()) == (0, 1e4)


def test_the_standard_error_is_that_of_instances():
    values = np.random.default_rng(0).random(50)
    mean, error = ratio(values * 64, np.full(50, 64.0), np.arange(50))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    # Three canvases that say the same are one instance, not three.
    again = ratio(np.repeat(values * 64, 3), np.full(150, 64.0), np.repeat(np.arange(50), 3))
    assert again == pytest.approx((mean, error))


def test_answers_are_formatted_as_in_training(demo):
    """demo/pool.py, `examples`, once more."""
    tokenizer = demo[1]
    want = []
    for i, instance in enumerate(instance for task in TASKS for instance in held_out(task, 12, 3)):
        prompt, answer = (tokenizer.encode(text) for text in (render(instance.prompt), instance.answer))
        answer += [TURN_END]
        answer += [EOS] * (-len(answer) % 64)
        want += [(i, b, prompt + answer[: 64 * b], answer[64 * b : 64 * b + 64]) for b in range(len(answer) // 64)]
    got = canvases(tokenizer, 12, 3, 64)
    assert [(c.instance, c.block, c.prefix, c.clean.tolist()) for c in got] == want
    assert max(c.block for c in got) > 0


def slowly(model, canvas, t, seed):
    """Loss of one canvas, float64: (sum over slots, over noisy slots, number of noisy slots)."""
    stream, settings = NoiseStream(seed), model.generation_config
    step = round(1000 * t)
    noisy = stream.uniforms([canvas.instance], canvas.block, step, 64)[0] < t
    tokens = stream.renoise([canvas.instance], canvas.block, step, 64, 1024)[0]
    mixed = mx.array([[int(tokens[i] if noisy[i] else canvas.clean[i]) for i in range(64)]])
    cache = model.make_cache()
    model.encode(mx.array([canvas.prefix]), cache)
    first = model.denoise(mixed, cache)
    logits = np.array(model.denoise(mixed, cache, first / (settings.t_min + (settings.t_max - settings.t_min) * t)))
    losses = [math.log(sum(math.exp(x - row[c]) for x in row)) for row, c in zip(logits[0], canvas.clean, strict=True)]
    return sum(losses), sum(loss for loss, n in zip(losses, noisy, strict=True) if n), noisy.sum()


def test_a_batch_gives_what_a_slow_loop_gives(demo, found, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BATCH", 2)
    some = found[:3]
    (scores,) = measure([demo[0]], some, ts=(0.9,), seed=7)
    assert (scores.slots == 64).all() and (scores.kl == 0).all() and (scores.same == 64).all()
    for i, canvas in enumerate(some):
        loss, noisy_loss, noisy = slowly(demo[0], canvas, 0.9, 7)
        assert scores.noisy[i, 0] == noisy
        assert scores.loss[i, 0] == pytest.approx(loss, rel=1e-3, abs=1e-4)
        assert scores.noisy_loss[i, 0] == pytest.approx(noisy_loss, rel=1e-3, abs=1e-4)


def test_models_are_compared_on_the_same_noise(demo, found, tmp_path):
    convert(CHECKPOINT, tmp_path / "q3", recipe="q3")
    rough, _ = mlx_dgemma.load(tmp_path / "q3", mx.float32, dequantize=True)
    scores, reference = measure([rough, demo[0]], found[:2], ts=(0.9,), seed=1)
    (alone,) = measure([demo[0]], found[:2], ts=(0.9,), seed=1)
    assert (reference.loss == alone.loss).all() and (reference.noisy == scores.noisy).all()
    row = summary(scores, np.arange(2), reference, ts=(0.9,))
    assert 0 < row["kl"][0] < 1 and 0.8 < row["same_argmax"][0] <= 1
    assert row["difference"][0] == pytest.approx(row["loss"][0] - reference.loss.sum() / 128)
    assert "kl" not in summary(scores, np.arange(2), ts=(0.9,))


def test_noisy_slots_have_a_mean_of_their_own():
    half = np.full((2, 1), 32.0)
    scores = Scores(2 * half, half, np.array([[64.0], [192.0]]), np.array([[64.0], [160.0]]), half, half)
    row = summary(scores, np.arange(2), ts=(0.5,))
    assert (row["loss"][0], row["noisy_loss"][0], row["t"]) == (2, 3.5, {"0.5": 2})


def test_the_command_ends_with_json(capsys, monkeypatch):
    monkeypatch.setattr(cross_entropy, "TASKS", ("sudoku",))
    arguments = ["--model", str(CHECKPOINT), "--against", str(CHECKPOINT), "--n", "1", "--json"]
    main(arguments)
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert (report["n"], report["canvases"], len(report["models"]), len(table)) == (1, 1, 1, 2)
    (row,) = report["models"]
    assert row["difference"] == row["kl"] == [0, 0] and row["same_argmax"][0] == 1
    assert list(row["t"]) == ["0.1", "0.3", "0.5", "0.7", "0.9"] and 0 < row["loss"][0] < 0.1
    assert table[1].endswith("100.000%")


def test_the_command_refuses_what_is_no_model(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: .*config.json"):
        main(["--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(CHECKPOINT), "--n", "0"])
