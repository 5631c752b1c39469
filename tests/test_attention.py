"""Attention by chunks of keys, against MLX's own call, and the memory it takes."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma import long_attention
from mlx_dgemma.long_attention import attention
from mlx_dgemma.masks import canvas_mask, encoder_mask


def fused(q, keys, values, mask=None):
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=1.0, mask=mask)


def chunked(q, keys, values, mask=None, chunk=8):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_attention, "FEW_KEYS", 0)
        patch.setattr(long_attention, "CHUNK_KEYS", chunk)
        return attention(q, keys, values, mask)


def inputs(seed, B, G, N, T, K, D=16, dtype=mx.float32):
    rng = np.random.default_rng(seed)
    shapes = (B, N * G, T, D), (B, N, K, D), (B, N, K, D)
    q, keys, values = (mx.array(rng.standard_normal(shape, np.float32)) for shape in shapes)
    return (q * D**-0.5).astype(dtype), keys.astype(dtype), values.astype(dtype)


def difference(a, b):
    return float(mx.abs(a - b).max())


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_weights_are_shares(chunk):
    q = mx.ones((1, 1, 1, 3))
    keys = mx.diag(mx.log(mx.array([1.0, 2.0, 5.0])))[None, None]  # e^score: 1, 2 and 5
    values = mx.eye(3)[None, None]
    for mask, want in [
        (None, [1 / 8, 2 / 8, 5 / 8]),
        ([True, True, False], [1 / 3, 2 / 3, 0]),
        ([False, True, False], [0, 1, 0]),  # nothing is seen in the first chunk, nor in the last
        ([False, False, True], [0, 0, 1]),
    ]:
        got = chunked(q, keys, values, mask and mx.array([mask]), chunk)
        assert got.flatten().tolist() == pytest.approx(want, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chunks_equal_the_whole(data):
    def number(low, high):
        return data.draw(st.integers(low, high))

    B, G, N, T, K = number(1, 3), number(1, 4), number(1, 3), number(1, 9), number(1, 70)
    q, keys, values = inputs(number(0, 99), B, G, N, T, K)
    q = q * data.draw(st.sampled_from([0.0, 1.0, 4.0]))
    rng = np.random.default_rng(number(0, 99))
    shape = data.draw(st.sampled_from([None, (T, K), (B, 1, T, K), (B, 1, 1, K)]))
    mask = None
    if shape:
        mask = rng.random(shape) < data.draw(st.sampled_from([0.02, 0.5, 0.98]))
        np.put_along_axis(mask, rng.integers(0, K, (*shape[:-1], 1)), True, -1)  # each query sees a key
        mask = mx.array(mask)
    found = chunked(q, keys, values, mask, data.draw(st.sampled_from([1, 7, 8, 64, 100])))
    assert difference(found, fused(q, keys, values, mask)) < 1e-5


@pytest.mark.parametrize("window", [None, 6])
def test_left_padding(window):
    T, K, padding = 5, 30, mx.array([0, 3, 27])  # row 2 sees nothing in the first three chunks
    q, keys, values = inputs(0, 3, 2, 2, T, K)
    indices = mx.arange(K)
    for mask in (encoder_mask(indices[-T:], indices, window, padding), canvas_mask(indices, padding)):
        assert difference(chunked(q, keys, values, mask), fused(q, keys, values, mask)) < 1e-5


def test_scores_far_apart():
    """Chunks whose best scores lie 10,000 apart, rising, falling, and either way below zero."""
    _, keys, values = inputs(0, 1, 1, 1, 1, 32)
    for steps in (range(4), range(4, 0, -1), range(-4, 0), [2, -1, 3, -3]):
        keys[..., 0] = mx.repeat(mx.array(list(steps)) * 1e4, 8)
        q = mx.zeros((1, 1, 1, 16))
        q[..., 0] = 1
        assert difference(chunked(q, keys, values), fused(q, keys, values)) < 1e-5


def test_a_query_that_sees_nothing_is_finite():
    q, keys, values = inputs(0, 1, 2, 1, 3, 20)
    assert mx.isfinite(chunked(q, keys, values, mx.zeros((3, 20), mx.bool_))).all()


def test_bfloat16_is_rounded_once():
    q, keys, values = inputs(1, 2, 2, 2, 5, 37, dtype=mx.bfloat16)
    found = chunked(q, keys, values)
    exact = chunked(*(x.astype(mx.float32) for x in (q, keys, values)))
    assert found.dtype == mx.bfloat16 and mx.array_equal(found, exact.astype(mx.bfloat16))


def test_few_keys_are_left_to_mlx_on_a_gpu(monkeypatch):
    monkeypatch.setattr(long_attention, "on_cpu", lambda: False)
    for more, same in [(0, True), (1, False)]:
        q, keys, values = inputs(0, 1, 1, 1, 2, long_attention.FEW_KEYS + more)
        found, want = attention(q, keys, values), fused(q, keys, values)
        assert bool(mx.array_equal(found, want)) is same and difference(found, want) < 1e-5


def test_nothing_is_evaluated_on_the_way():
    """mx.compile refuses a function that evaluates; a prefill never computes the last layer's attention."""
    q, keys, values = inputs(0, 1, 2, 2, 3, 40)
    compiled = mx.compile(lambda *args: chunked(*args, chunk=20))
    assert difference(compiled(q, keys, values), fused(q, keys, values)) < 1e-5


@pytest.mark.parametrize("padding", [None, [0, 21]])
def test_the_model_says_the_same(tiny_model, padding, monkeypatch):
    model = tiny_model[0]
    rng = np.random.default_rng(0)
    tokens, canvas = (mx.array(rng.integers(5, 384, (2, n))) for n in (50, 16))

    def outputs():
        cache = model.make_cache()
        first = model.encode(tokens[:, :30], cache, padding and mx.array(padding))
        return [first, model.encode(tokens[:, 30:], cache), model.denoise(canvas, cache)]

    with monkeypatch.context() as patch:
        patch.setattr(long_attention, "on_cpu", lambda: False)
        want = outputs()
        mx.eval(want)
    monkeypatch.setattr(long_attention, "CHUNK_KEYS", 7)
    got = outputs()
    assert not mx.array_equal(got[-1], want[-1])  # the patch was felt
    for a, b in zip(got, want, strict=True):
        assert difference(a, b) < 2e-5


@pytest.mark.parametrize("masked", [False, True])
def test_memory_grows_with_the_keys_alone(masked):
    heads, D, T = 4, 64, 64
    chunk_scores = heads * T * long_attention.CHUNK_KEYS * 4
    for P in (8192, 16_384, 32_768):
        q, keys, values = inputs(0, 1, 1, heads, T, P, D)
        mask = encoder_mask(mx.arange(P - T, P), mx.arange(P)) if masked else None
        mx.eval(q, keys, values, *([mask] if masked else []))
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(attention(q, keys, values, mask))
        # MLX prepares about a hundred operations ahead, ten chunks'; all scores are 16, 32 and 64.
        assert (mx.get_peak_memory() - held) / chunk_scores < 15, f"{P=}"
