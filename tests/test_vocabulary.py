"""The one pass over the vocabulary against whole arrays in float64, and against the two functions it replaces."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dgemma import vocabulary
from mlx_dgemma.vocabulary import Reader, Table, block_of, chunk_of

CAP, TEMPERATURE = 30.0, 0.6


def inputs(seed, M, V, H, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((M, H)).astype(np.float32) * scale
    weight = rng.standard_normal((V, H)).astype(np.float32)
    return hidden, weight, rng.uniform(1e-4, 1 - 1e-4, M).astype(np.float32)


def slowly(hidden, weight, uniforms, temperature=TEMPERATURE):
    """Logits, entropy, cumulative distribution and expected embedding, in float64."""
    z = CAP * np.tanh(hidden.astype(np.float64) @ weight.T.astype(np.float64) / CAP) / temperature
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return z, -(p * np.log(np.maximum(p, 1e-300))).sum(-1), p.cumsum(-1), p @ weight


def agrees(found, hidden, weight, uniforms, tolerance=1e-5):
    z, entropy, up_to, soft = slowly(hidden, weight, uniforms)
    # At the cap many logits are one number in float32: any of them is the likeliest.
    assert (z.max(-1) - np.take_along_axis(z, np.array(found.draft)[:, None], -1)[:, 0] < 1e-4).all()
    assert np.abs(np.array(found.entropy) - entropy).max() < tolerance * 10
    assert np.abs(np.array(found.soft) - soft).max() < tolerance
    sampled = np.array(found.sampled)
    above = np.take_along_axis(up_to, sampled[:, None], -1)[:, 0]
    below = above - np.take_along_axis(np.diff(up_to, axis=-1, prepend=0), sampled[:, None], -1)[:, 0]
    assert ((below < uniforms + 1e-6) & (uniforms - 1e-6 < above)).all()


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 300.0])  # flat, in between, sure, at the cap
@pytest.mark.parametrize("V", [384, 1024, 1000, 257])
def test_one_pass_reads_what_whole_arrays_say(V, scale, monkeypatch):
    hidden, weight, uniforms = inputs(V, 9, V, 32, scale)
    if scale == 0.0:
        hidden[:] = 1e-3  # all but equal: no draft is decided by rounding
    for elements in (1, 9 * 100, 1 << 20):
        monkeypatch.setattr(vocabulary, "CPU_CHUNK", elements)
        embedding = nn.Embedding(V, 32)
        embedding.weight = mx.array(weight)
        found = Reader(mx.array(hidden), Table(embedding), CAP, TEMPERATURE).read(mx.array(uniforms))
        agrees(found, hidden, weight, uniforms)


@pytest.mark.parametrize("bits, mode", [(4, "affine"), (8, "affine"), (4, "mxfp4")])
def test_a_packed_table_is_read_as_it_is(bits, mode):
    hidden, weight, uniforms = inputs(1, 5, 512, 64)
    plain = nn.Embedding(512, 64)
    plain.weight = mx.array(weight)
    packed = plain.to_quantized(group_size=32, bits=bits, mode=mode)
    names = [packed[n] for n in ("weight", "scales", "biases") if n in packed]
    weight = np.array(mx.dequantize(*names, group_size=32, bits=bits, mode=mode, dtype=mx.float32))
    found = Reader(mx.array(hidden), Table(packed), CAP, TEMPERATURE).read(mx.array(uniforms))
    agrees(found, hidden, weight, uniforms, 1e-4)


def test_what_has_no_mass_is_never_drawn():
    embedding = nn.Embedding(1024, 4)
    weight = np.full((1024, 4), -100.0, np.float32)
    weight[700] = 100.0
    embedding.weight = mx.array(weight)
    for u in (6e-8, 0.5, 1 - 6e-8):
        found = Reader(mx.ones((3, 4)), Table(embedding), CAP, 0.4).read(mx.full((3,), u))
        assert found.sampled.tolist() == found.draft.tolist() == [700] * 3
        assert np.abs(np.array(found.entropy)).max() < 1e-6


@pytest.mark.parametrize("temperature", [0.01, 0.4, 3.0])
def test_no_temperature_overflows(temperature):
    hidden, weight, uniforms = inputs(2, 4, 512, 16, 30.0)
    embedding = nn.Embedding(512, 16)
    embedding.weight = mx.array(-np.abs(weight))
    found = Reader(mx.array(np.abs(hidden)), Table(embedding), CAP, temperature).read(mx.array(uniforms))
    assert all(np.isfinite(np.array(x)).all() for x in found)


def test_shapes_of_chunks():
    for V in (1, 7, 384, 1000, 32_768, 262_144, 262_147):
        block = block_of(V)
        assert V % block == 0 and V // block <= max(vocabulary.BLOCKS, V if V % 2 else 0)
        for M in (1, 64, 256, 1024):
            K = chunk_of(M, V, block)
            assert K == V or (K % block == 0 and (M * K <= vocabulary.CPU_CHUNK or block == K))


@pytest.mark.parametrize("packed", [False, True])
def test_few_blocks_hold_what_they_say(packed):
    hidden, weight, uniforms = inputs(5, 40, 1024, 64, 2.0)
    embedding = nn.Embedding(1024, 64)
    embedding.weight = mx.array(weight)
    if packed:
        embedding = embedding.to_quantized(group_size=64, bits=8)
        weight = np.array(mx.dequantize(*Table(embedding).arrays, group_size=64, bits=8))
    reader = Reader(mx.array(hidden), Table(embedding), CAP, TEMPERATURE)
    found = reader.read(mx.array(uniforms), mix=False)
    assert found.soft is None
    z, _, _, exact = slowly(hidden, weight, uniforms)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    blocks = np.sort(p.reshape(40, -1, 64).sum(-1), axis=-1)
    for k in (1, 3, 16, 99):
        soft, covered = reader.mix_blocks(found, k)
        covered = np.array(covered)
        assert np.abs(covered - blocks[:, -k:].sum(-1)).max() < 1e-4
        # What is left out weighs 1 - covered, and no row of the table is longer than the longest.
        error = np.linalg.norm(np.array(soft) - exact, axis=-1)
        assert (error < 2 * (1 - covered) * np.linalg.norm(weight, axis=-1).max() + 2e-3).all()
    assert covered.min() > 0.9999
    slots = np.flatnonzero(np.arange(40) % 3 == 0)
    mended = np.array(reader.mix_slots(found, mx.zeros((40, 64)), slots))
    assert np.abs(mended[slots] - exact[slots]).max() < (2e-3 if packed else 1e-5)
    assert (np.delete(mended, slots, axis=0) == 0).all()


def test_no_array_of_the_whole_vocabulary():
    """Extra memory of a pass: a few chunks and the masses, not (M, V)."""
    M, V, H = 256, 65_536, 64
    embedding = nn.Embedding(V, H)
    for table in (Table(embedding), Table(embedding.to_quantized(group_size=64, bits=8))):
        reader, uniforms = Reader(mx.random.normal((M, H)), table, CAP, TEMPERATURE), mx.full((M,), 0.5)
        mx.eval(reader.hidden, uniforms, table.arrays)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(reader.read(uniforms))
        assert mx.get_peak_memory() - before < M * V * 4 / 2


def test_experts_are_unpacked_one_by_one():
    from mlx_dgemma.products import Packing, packed_expert_product

    E, inner, outer, packing = 64, 512, 512, Packing(64, 4, "affine")
    arrays = mx.quantize(mx.random.normal((E, outer, inner)), *packing[:2])
    x, experts = mx.random.normal((E * 4, 1, inner)), mx.repeat(mx.arange(E), 4)
    mx.eval(x, arrays, experts)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(packed_expert_product(x, arrays, packing, experts))
    assert mx.get_peak_memory() - before < E * inner * outer * 4 / 4


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("M", [3, 40])
def test_half_precision_draws_only_what_has_mass(dtype, M):
    hidden, weight, _ = inputs(7, M, 1024, 64, 3.0)
    embedding = nn.Embedding(1024, 64)
    embedding.weight = mx.array(weight).astype(dtype)
    packed = embedding.to_quantized(group_size=64, bits=4)
    weight = np.array(mx.dequantize(*Table(packed).arrays, group_size=64, bits=4, dtype=mx.float32))
    x = mx.array(hidden).astype(dtype)
    z = CAP * np.tanh(np.array(x.astype(mx.float32)) @ weight.T / CAP) / TEMPERATURE
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    for u in np.linspace(0.001, 0.999, 40):
        found = Reader(x, Table(packed), CAP, TEMPERATURE).read(mx.full((M,), float(u)))
        drawn = np.take_along_axis(p, np.array(found.sampled)[:, None], -1)
        assert drawn.min() > 1e-7
