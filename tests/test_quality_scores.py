"""Scores of slots: numbers by hand, one canvas by a slow loop, samples that are fair, and standard errors."""

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from benchmarks.quality_data import read_data
from benchmarks.quality_engines import MlxModel
from benchmarks.quality_models import about
from benchmarks.quality_passes import Plan, readings
from benchmarks.quality_scores import (
    Canvas,
    Sums,
    by_instance,
    compare,
    divergence,
    kl_difference,
    log_softmax,
    losses,
    noisy,
    ratio,
    read,
    score,
    shared_experts,
    summary,
)
from demo.tasks import TASKS, held_out
from demo.tokenizer import EOS, TURN_END, render
from mlx_dgemma.noise import NoiseStream

CHECKPOINT = Path(__file__).parent.parent / "demo/checkpoint"
EVEN, SURE = np.log([0.5, 0.5]), np.log([0.25, 0.75])


def test_scores_by_hand():
    got = losses(np.stack([EVEN, SURE, EVEN]).astype(np.float32), np.array([0, 1, 1]))
    assert got == pytest.approx(-np.log([0.5, 0.75, 0.5]))
    # KL(reference || candidate)
    got = divergence(np.stack([EVEN, EVEN, SURE]), np.stack([EVEN, SURE, EVEN]))
    assert got == pytest.approx([0, 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), 0.130812], abs=1e-6)


def test_huge_logits_do_not_overflow():
    logits = np.array([[1e4, 0.0]], np.float32)
    assert losses(logits, np.array([0])).item() == 0 and losses(logits, np.array([1])).item() == 1e4
    assert divergence(log_softmax(logits.astype(float)), log_softmax(-logits.astype(float))).item() == 1e4


@pytest.mark.parametrize(("dtype", "floor"), [(np.float32, 1e-12), (np.float16, 1e-6)])
def test_equal_logits_have_no_divergence_in_either_type_of_base(dtype, floor):
    logits = 6 * np.random.default_rng(0).standard_normal((20, 5_000))
    clean, slots = np.zeros(20, int), np.arange(20)
    stored = read(logits.astype(np.float32), clean, slots, dtype).shares
    assert (divergence(stored, stored) == 0).all()
    # What rounding alone makes of two models that are one.
    assert divergence(log_softmax(logits), stored).max() < floor


def test_experts_are_compared_as_sets():
    ours = np.array([[[0, 1], [2, 3]]])  # one token, two layers
    assert shared_experts(ours, np.array([[[1, 0], [3, 2]]])).tolist() == [1]
    assert shared_experts(ours, np.array([[[1, 5], [6, 7]]])).tolist() == [0.25]


def canvas(C=64, instance=3):
    return Canvas(instance, 1, [2], np.arange(C, dtype=np.int32))


@pytest.mark.parametrize("slots", [2, 9, 32, 64, 100])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_a_sample_stands_for_every_slot(slots, t):
    at = noisy(canvas(), t, NoiseStream(0), 1024, slots)
    assert len(at.sampled) == len(set(at.sampled.tolist())) == min(slots, 64)
    for kind in (at.corrupted, ~at.corrupted):
        inside = kind[at.sampled]
        assert inside.sum() >= min(slots // 2, kind.sum())
        assert at.weights[inside].sum() == pytest.approx(kind.sum())
    again = noisy(canvas(), t, NoiseStream(0), 1024, slots)
    assert (again.sampled == at.sampled).all() and (again.tokens == at.tokens).all()
    assert (at.tokens[~at.corrupted] == canvas().clean[~at.corrupted]).all()


def test_samples_are_right_on_average():
    values, found = np.random.default_rng(1).random(64), []
    for seed in range(400):
        at = noisy(canvas(), 0.3, NoiseStream(seed), 1024, 8)
        found.append((values[at.sampled] * at.weights).sum())
    assert np.mean(found) == pytest.approx(values.sum(), rel=0.03)


def test_the_standard_error_is_that_of_instances():
    values = np.random.default_rng(0).random(50)
    got = ratio(values * 64, np.full(50, 64.0), np.arange(50))
    assert got["mean"] == pytest.approx(values.mean())
    assert got["se"] == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    # Three canvases that say the same are one instance, not three.
    again = ratio(np.repeat(values * 64, 3), np.full(150, 64.0), np.repeat(np.arange(50), 3))
    assert again == pytest.approx(got)


def test_what_cannot_be_said_is_none():
    one = np.ones(1)
    assert ratio(2 * one, one, np.zeros(1, int)) == {"mean": 2, "se": None}  # a single instance has no spread
    assert ratio(0 * one, 0 * one, np.zeros(1, int)) is None  # no corrupted slot
    assert ratio(np.nan * one, one, np.zeros(1, int)) is None  # an engine that does not tell its experts


def test_two_models_are_compared_instance_by_instance():
    sums = [Sums.empty(3, 1) for _ in range(2)]
    for s, kl in zip(sums, ([1, 2, 3], [2, 4, 6]), strict=True):
        s.kl[1, :, 0, 1], s.slots[1, :, 0, 1] = kl, 10
    ours, theirs = (by_instance(s, np.array([0, 0, 1])) for s in sums)
    assert ours == [[3, 20], [3, 10]]
    assert kl_difference(ours, theirs)["mean"] == pytest.approx(-6 / 30)


# Against a slow loop


@pytest.fixture(scope="module")
def plan():
    model = about(str(CHECKPOINT))
    data = read_data(None, model.tokenizer, model.config, 4, 7)
    return Plan(data, model.config, model.settings, 64, 7, (0.9,))


def test_answers_are_formatted_as_in_training(plan):
    """demo/pool.py, `examples`, once more."""
    tokenizer = about(str(CHECKPOINT)).tokenizer
    found = read_data(None, tokenizer, plan.config, 30, 3)
    want = []
    per_task = [held_out(task, 8, 3) for task in TASKS]  # one of each in turn
    for i, instance in enumerate(x for turn in zip(*per_task, strict=True) for x in turn):
        prompt, answer = (tokenizer.encode(text) for text in (render(instance.prompt), instance.answer))
        answer += [TURN_END]
        if len(want) < 30:
            assert found.texts[i].tokens == prompt + answer or i == found.canvases[-1].instance
            assert found.texts[i].first == len(prompt)
        answer += [EOS] * (-len(answer) % 64)
        want += [(i, b, prompt + answer[: 64 * b], answer[64 * b : 64 * b + 64]) for b in range(len(answer) // 64)]
    assert [(c.instance, c.block, c.prefix, c.clean.tolist()) for c in found.canvases] == want[:30]
    assert max(c.block for c in found.canvases) > 0


def slow_logits(model, canvas, t, seed):
    """One canvas: first and second pass (64, V), experts (64, layers, 2), and where it is noise."""
    stream, settings, step = NoiseStream(seed), model.generation_config, round(1000 * t)
    corrupted = stream.uniforms([canvas.instance], canvas.block, step, 64)[0] < t
    tokens = stream.renoise([canvas.instance], canvas.block, step, 64, 1024)[0]
    mixed = mx.array([[int(tokens[i] if corrupted[i] else canvas.clean[i]) for i in range(64)]])
    cache = model.make_cache()
    model.encode(mx.array([canvas.prefix]), cache)
    first = model.denoise(mixed, cache)
    second = model.denoise(mixed, cache, first / (settings.t_min + (settings.t_max - settings.t_min) * t))
    return [np.array(x)[0].astype(np.float64) for x in (first, second)], corrupted


def test_batches_give_what_a_slow_loop_gives(plan):
    model = MlxModel(about(str(CHECKPOINT)), "float32")
    rough = np.random.default_rng(0)
    for n, _, p, at, reading in readings(model, plan, np.float32):
        canvas = plan.data.canvases[n]
        logits, corrupted = slow_logits(model.model, canvas, 0.9, 7)
        want = [
            math.log(sum(math.exp(x - row[c]) for x in row)) for row, c in zip(logits[p], canvas.clean, strict=True)
        ]
        assert reading.loss == pytest.approx(want, rel=1e-3, abs=1e-4)
        assert (reading.best == logits[p].argmax(axis=-1)).all() and (at.corrupted == corrupted).all()
        # Against a model with other logits, slot by slot.
        other = logits[p] + rough.standard_normal(logits[p].shape)
        theirs = read(other.astype(np.float32), canvas.clean, at.sampled, np.float32, reading.experts)
        slots, loss, kl, same, experts = score(theirs, reading, at)
        assert slots.tolist() == [64, corrupted.sum()] and experts.tolist() == slots.tolist()
        want_kl = np.array([slow_kl(q, r) for q, r in zip(logits[p], other, strict=True)])
        assert kl == pytest.approx([want_kl.sum(), want_kl[corrupted].sum()], rel=1e-3)
        agrees = logits[p].argmax(axis=-1) == other.argmax(axis=-1)
        assert same.tolist() == [agrees.sum(), agrees[corrupted].sum()]
        assert loss[0] == pytest.approx(theirs.loss.sum())


def slow_kl(reference, candidate):
    q, p = ([math.exp(x) for x in row] for row in (reference, candidate))
    whole_q, whole_p = sum(q), sum(p)
    return sum(a / whole_q * math.log((a / whole_q) / (b / whole_p)) for a, b in zip(q, p, strict=True))


def test_experts_are_those_of_the_routers():
    """The model's own layers, run once more by hand with a router that says what it chose."""
    model, tokenizer = mlx_dgemma.load(CHECKPOINT, mx.float32)
    opened = MlxModel(about(str(CHECKPOINT)), "float32")
    canvas = np.arange(128, dtype=np.int32).reshape(2, 64)
    prompts = [tokenizer.encode("As JSON:"), tokenizer.encode("As JSON: a longer one")]
    _, got = opened.denoise(canvas, opened.prefix(prompts))
    assert got.shape == (2, 64, 6, 2)
    cache = model.make_cache()
    model.encode(mx.array([prompts[0]]), cache)
    seen = []
    for layer in model.model.decoder.layers:
        router = layer.router

        def spy(x, router=router):
            scores = np.array(router.proj(x * mx.rsqrt(mx.square(x).mean(-1, keepdims=True) + 1e-6) * router.scale))
            seen.append(np.sort(np.argsort(-scores, axis=-1)[:, :2], axis=-1))
            return router(x)

        layer["router"] = spy
    mx.eval(model.denoise(mx.array(canvas[:1]), cache))
    assert (np.sort(got[0], axis=-1) == np.stack(seen, axis=1)).all()


def test_summaries_name_every_share_and_pass():
    sums = Sums.empty(2, 5)
    sums.slots[:], sums.loss[:], sums.same[:] = 8, 16, 4
    made = summary(sums, np.arange(2), sums)
    assert list(made) == ["first", "self_conditioned"] and list(made["first"]["t"]) == [
        "0.1",
        "0.3",
        "0.5",
        "0.7",
        "0.9",
    ]
    row = made["first"]["mean"]["corrupted"]
    assert row["cross_entropy"] == {"mean": 2, "se": 0} and row["difference"]["mean"] == 0
    assert row["same_argmax"]["mean"] == 0.5 and row["kl"]["mean"] == 0
    assert list(summary(sums, np.arange(2))["first"]["mean"]["all"]) == ["cross_entropy"]


def test_a_comparison_counts_every_instance_alike():
    """One instance decides the means; every other one says the opposite."""
    theirs = [[1.0, 10], [2.0, 20], [4.0, 10], [1.0, 10], [0.0, 0]]
    ours = [[0.5, 10], [1.0, 20], [2.0, 10], [8.0, 10], [0.0, 0]]
    found = compare(ours, theirs)
    assert found["difference"]["mean"] == pytest.approx((11.5 - 8) / 50)
    assert (found["wins"]["right"], found["wins"]["n"]) == (3, 4)
    logs = np.log([0.5, 0.5, 0.5, 8])
    assert found["ratio"]["mean"] == pytest.approx(np.exp(logs.mean()))
    half = 1.96 * logs.std(ddof=1) / 2
    assert found["ratio"]["low"] == pytest.approx(np.exp(logs.mean() - half))
    same = compare(theirs, theirs)
    assert same["wins"]["right"] == 0 and same["ratio"]["mean"] == 1 and same["difference"]["mean"] == 0
