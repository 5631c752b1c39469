"""The model against the reference's golden logits, and against itself where two ways must agree."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.config import read_config
from mlx_dgemma.engine import MlxEngine
from mlx_dgemma.layers import geglu
from mlx_dgemma.session import left_padded

GOLDEN = Path(__file__).parent / "golden"
RECIPE = json.loads((GOLDEN / "recipe.json").read_text())


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model[0]


def difference(a, b):
    return float(np.abs(np.array(a) - np.array(b)).max())


@pytest.mark.parametrize("case", ["short", "window", "long"])
def test_logits_are_the_references(model, case):
    golden = np.load(GOLDEN / f"logits_{case}.npz")
    prompt, canvas, following = (mx.array(golden[key], mx.int32) for key in ("prompt", "canvas", "next"))
    cache = model.make_cache()
    got = {"hidden": model.encode(prompt, cache), "first": model.denoise(canvas, cache)}
    processed = mx.array(golden["first"] / RECIPE["temperature"])
    got["conditioned"] = model.denoise(canvas, cache, processed)
    model.encode(canvas, cache)
    got["second"] = model.denoise(following, cache)
    for name, value in got.items():
        assert difference(value, golden[name]) < RECIPE["atol"], name
        assert (np.array(value).argmax(-1) == golden[name].argmax(-1)).all(), name


def prompt_of(n, seed=0):
    return np.random.default_rng(seed).integers(5, 384, n).tolist()


@pytest.mark.parametrize("chunks", [[40], [1, 39], [16, 16, 8], [15, 1, 17, 7], [1] * 40])
def test_prefill_in_chunks_equals_one_shot(model, chunks):
    tokens = mx.array([prompt_of(40)])
    whole, parts = model.make_cache(), model.make_cache()
    hidden = model.encode(tokens, whole)
    pieces, start = [], 0
    for n in chunks:
        pieces.append(model.encode(tokens[:, start : start + n], parts))
        start += n
    assert difference(mx.concatenate(pieces, axis=1), hidden) < 2e-5
    canvas = mx.array([prompt_of(16, 1)])
    assert difference(model.denoise(canvas, parts), model.denoise(canvas, whole)) < 2e-5


def test_denoising_leaves_the_cache_alone(model):
    cache, canvas = model.make_cache(), mx.array([prompt_of(16, 1)])
    model.encode(mx.array([prompt_of(20)]), cache)
    first, nbytes = model.denoise(canvas, cache), cache.nbytes
    model.denoise(mx.array([prompt_of(16, 2)]), cache)
    assert cache.nbytes == nbytes and cache.length == 20
    assert difference(model.denoise(canvas, cache), first) == 0


@pytest.mark.parametrize("n", [5, 15, 16, 100])
def test_the_cache_holds_the_window_and_no_more(model, n):
    config, cache = model.config, model.make_cache()
    for start in range(0, n, 7):
        model.encode(mx.array([prompt_of(n)[start : start + 7]]), cache)
    stored = [len(layer) for layer in cache.layers]
    assert stored == [min(n, 15)] * 5 + [n]
    # 2 (keys and values) x heads x head_dim x 4 bytes, per token
    sliding, full = 2 * 2 * 16 * 4, 2 * 1 * 32 * 4
    assert cache.nbytes == 5 * sliding * min(n, config.sliding_window - 1) + full * n


def test_the_cache_takes_the_memory_it_says(model):
    """A sliding layer's window must not keep the whole prompt's keys alive behind it."""
    tokens, cache = mx.array([prompt_of(2000)]), model.make_cache()
    mx.eval(tokens, model.parameters())
    before = mx.get_active_memory()
    MlxEngine(model, cache).prefill(np.array(tokens))
    assert cache.nbytes <= mx.get_active_memory() - before < 1.1 * cache.nbytes


def test_a_copied_cache_goes_its_own_way(model):
    cache = model.make_cache()
    model.encode(mx.array([prompt_of(20)]), cache)
    twin = cache.copy()
    model.encode(mx.array([prompt_of(9, 3)]), twin)
    assert (cache.length, twin.length) == (20, 29)
    canvas, alone = mx.array([prompt_of(16, 1)]), model.make_cache()
    model.encode(mx.array([prompt_of(20)]), alone)
    assert difference(model.denoise(canvas, cache), model.denoise(canvas, alone)) == 0


@pytest.mark.parametrize("lengths", [(40, 7, 23), (3, 9), (20, 20)])
def test_a_batch_row_equals_the_row_alone(model, lengths):
    prompts = [prompt_of(n, seed) for seed, n in enumerate(lengths)]
    canvas = mx.array([prompt_of(16, 10 + i) for i in range(len(lengths))])
    batch = MlxEngine(model)
    batch.prefill(*left_padded(prompts, 0))
    first = model.denoise(canvas, batch.cache)
    batch.commit(np.array(canvas))
    second = model.denoise(canvas, batch.cache, first / 0.7)
    for i, prompt in enumerate(prompts):
        alone, row = MlxEngine(model), canvas[i : i + 1]
        alone.prefill(np.array([prompt]))
        want = model.denoise(row, alone.cache)
        assert difference(first[i : i + 1], want) < 2e-5
        alone.commit(np.array(row))
        assert difference(second[i : i + 1], model.denoise(row, alone.cache, want / 0.7)) < 2e-5


def test_padding_comes_first(model):
    cache = model.make_cache()
    model.encode(mx.array([prompt_of(4)]), cache)
    with pytest.raises(ValueError, match="4 are encoded already"):
        model.encode(mx.array([prompt_of(4)]), cache, padding=mx.array([1]))


def test_sorted_experts_match_the_plain_loop(model):
    layer = model.model.decoder.layers[0]
    x = mx.random.normal((37, 64), key=mx.random.key(0))
    experts, weights = layer.router(x)
    got = layer.experts(x, experts, weights)
    gate_up, down = layer.experts.gate_up_proj.weight, layer.experts.down_proj.weight
    for t in range(37):
        want = mx.zeros(64)
        for e, w in zip(experts[t].tolist(), weights[t].tolist(), strict=True):
            gate, up = mx.split(gate_up[e] @ x[t], 2)
            want = want + w * (down[e] @ geglu(gate, up))
        assert difference(got[t], want) < 1e-5, f"token {t}"


def test_the_router_reads_the_raw_residual(model):
    """The router's weights, by hand in float64: softmax over all experts, the two best, renormalised, scaled."""
    router = model.model.decoder.layers[2].router
    x = np.random.default_rng(0).standard_normal((9, 64)) * 5
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    scores = normed * np.array(router.scale) * 64**-0.5 @ np.array(router.proj.weight).T
    share = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    experts, weights = (np.array(a) for a in router(mx.array(x, mx.float32)))
    for t in range(9):
        best = np.argsort(-share[t])[:2]
        assert set(experts[t]) == set(best)
        for e, w in zip(experts[t], weights[t], strict=True):
            assert w == pytest.approx(share[t][e] / share[t][best].sum() * router.per_expert_scale[int(e)].item(), 1e-5)


def test_full_layers_rotate_a_quarter_of_their_pairs(model):
    rope = model.model.decoder.layers[5].self_attn._rope
    x = mx.ones((1, 1, 3, 32))
    moved = np.array(rope(x, 0))[0, 0, 2] != 1  # position 2
    # fmt: off
    assert moved.astype(int).tolist() == [
        1, 1, 1, 1,  0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        1, 1, 1, 1,  0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ]
    # fmt: on
    angle = 2 * 1e6 ** (-2 / 32)  # pair 1: the denominator is the whole head_dim
    assert np.array(rope(x, 0))[0, 0, 2, 1] == pytest.approx(np.cos(angle) - np.sin(angle), abs=1e-6)


def test_both_passes_have_their_own_scalars(model, tiny):
    config = read_config(tiny)
    encoder = [s.layer_scalar.item() for s in model.model.encoder.language_model.layers]
    decoder = [layer.layer_scalar.item() for layer in model.model.decoder.layers]
    assert len(set(encoder + decoder)) == 2 * config.num_hidden_layers
