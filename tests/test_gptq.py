"""Rounding that makes up for its errors: the math against slow twins."""

import gguf
import mlx.core as mx
import numpy as np
import pytest

from convert.gptq import DAMPING, factor, gptq, gptq_by_blocks, with_others
from convert.recipes_mlx import PRECISIONS
from convert.to_gguf import _corrected
from convert.to_mlx import quantize
from gguf_export.quantize import quantize as quantize_gguf
from mlx_dgemma.gguf.types import TYPES


def inputs(n, row, seed=0):
    """Inputs whose channels go together."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((row, row)) + 3 * np.eye(row)
    return rng.standard_normal((n, row)) @ mixed


def weights(rows, row, seed=1):
    return np.random.default_rng(seed).standard_normal((rows, row)).astype(np.float32)


# By formula


def test_a_factor_is_that_of_the_damped_inverse():
    x = inputs(300, 64)
    wanted = x.T @ x
    found = factor(wanted).astype(np.float64)
    assert (found == np.triu(found)).all() and (np.diag(found) > 0).all()
    wanted += DAMPING * np.diag(wanted).mean() * np.eye(64)
    assert np.abs(found @ wanted @ found.T - np.eye(64)).max() < 1e-4
    assert np.array_equal(factor(np.zeros((8, 8))), np.eye(8, dtype=np.float32))


def test_an_expert_that_saw_nothing_goes_by_the_others():
    x = inputs(300, 16)
    seen = np.stack([x.T @ x, 2 * x.T @ x, np.zeros((16, 16))])
    found = with_others(seen)
    assert np.allclose(found[0], 1.02 * seen[0]) and np.allclose(found[2], 0.02 * seen[0])
    assert np.array_equal(with_others(seen[:1]), seen[:1])


# Against a slow twin


def twin(values, inverse, fit, precision):
    """One column after the other; after each, the inverse forgets it by elimination."""
    values, inverse = values.astype(np.float64).copy(), inverse.copy()
    G, codes = precision.group_size, []
    for j in range(values.shape[1]):
        if j % G == 0:
            scale, bias = fit(values[:, j : j + G].astype(np.float32))
        code = np.clip(np.rint((values[:, j] - bias[:, 0]) / scale[:, 0]), 0, 2**precision.bits - 1)
        error = values[:, j] - (code * scale[:, 0] + bias[:, 0])
        values -= np.outer(error / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        codes.append(code)
    return np.stack(codes, axis=1)


def fit_of(precision):
    """MLX's own scales."""
    return lambda group: quantize(group, "F32", precision)[1:]


def codes_of(words, bits):
    from convert.verify import _unpack

    return _unpack(words, bits)


@pytest.mark.parametrize("stretch", [64, 128, 512])
@pytest.mark.parametrize("name", ["q2", "q4", "q4-g32", "q6", "q8"])
def test_codes_are_the_twins(name, stretch, monkeypatch):
    monkeypatch.setattr("convert.gptq.STRETCH", stretch)
    precision, values, x = PRECISIONS[name], weights(20, 192), inputs(600, 192)
    damped = x.T @ x + DAMPING * np.square(x).sum(axis=0).mean() * np.eye(192)
    words, scales, biases = gptq(values, factor(x.T @ x), fit_of(precision), "F32", precision)
    assert scales.shape == biases.shape == (20, 192 // precision.group_size)
    found = codes_of(words, precision.bits)
    wanted = twin(values, np.linalg.inv(damped), fit_of(precision), precision)
    assert (found != wanted).mean() < 0.01  # float32 here, float64 there


def loss(values, x, words, scales, biases, precision):
    how = {"group_size": precision.group_size, "bits": precision.bits}
    rounded = np.array(mx.dequantize(*map(mx.array, (words, scales, biases)), **how))
    return np.square((rounded - values) @ x.T).sum()


@pytest.mark.parametrize("name", ["q3", "q4"])
def test_what_a_matrix_makes_of_its_inputs_is_closer(name):
    precision, values, x = PRECISIONS[name], weights(32, 256), inputs(2000, 256)
    plain = quantize(values, "F32", precision)
    corrected = gptq(values, factor(x.T @ x), fit_of(precision), "F32", precision)
    others = inputs(2500, 256)[2000:]  # of the same kind, and none of them seen
    assert loss(values, others, *corrected, precision) < 0.6 * loss(values, others, *plain, precision)


def test_inputs_that_do_not_go_together_leave_the_nearest_codes():
    precision, values = PRECISIONS["q4"], weights(8, 128)
    found = gptq(values, np.eye(128, dtype=np.float32), fit_of(precision), "F32", precision)
    assert loss(values, np.eye(128), *found, precision) <= loss(values, np.eye(128), *quantize(
        values, "F32", precision), precision) * (1 + 1e-6)  # fmt: skip


def test_a_group_of_equal_weights():
    precision, values = PRECISIONS["q4"], np.zeros((2, 128), np.float32)
    values[1] = 0.25
    words, scales, biases = gptq(values, factor(np.eye(128)), fit_of(precision), "F32", precision)
    assert loss(values, np.eye(128), words, scales, biases, precision) < 1e-9


# ggml's blocks


def block_twin(values, inverse, block, pack):
    """The optimal brain surgeon's update for a whole block at once, by the inverse itself."""
    values, out = values.astype(np.float64).copy(), []
    for start in range(0, values.shape[1], block):
        here, rest = slice(start, start + block), slice(start + block, None)
        packed, rounded = pack(values[:, here].astype(np.float32), start)
        out.append(packed)
        # The inverse of what is left once the columns before are gone.
        left = np.linalg.inv(np.linalg.inv(inverse)[start:, start:])
        values[:, rest] -= (values[:, here] - rounded) @ np.linalg.inv(left[:block, :block]) @ left[:block, block:]
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize("stretch", [32, 64, 512])
def test_blocks_make_up_for_the_blocks_before(stretch, monkeypatch):
    monkeypatch.setattr("convert.gptq.STRETCH", stretch)

    def pack(block, start):
        step = 0.5 + start / 200
        codes = np.rint(block / step)
        return codes.astype(np.int8), (codes * step).astype(np.float32)

    values, x = 3 * weights(12, 160), inputs(500, 160)
    damped = x.T @ x + DAMPING * np.square(x).sum(axis=0).mean() * np.eye(160)
    found = gptq_by_blocks(values, factor(x.T @ x), 32, pack)
    assert (found != block_twin(values, np.linalg.inv(damped), 32, pack)).mean() < 0.01
    if stretch == 512:
        assert np.array_equal(gptq_by_blocks(values, factor(x.T @ x), 160, pack), pack(values, 0)[0])


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "IQ4_NL", "Q4_K", "Q2_K"])
def test_what_ggml_rounds_is_closer(name):
    type, row = TYPES[name], 1024
    values, x = weights(16, row), inputs(4 * row, row)
    importance = np.square(x).mean(axis=0).astype(np.float32)
    for weighed in (None, importance):
        plain = quantize_gguf(values, type, weighed)
        corrected = _corrected(values, type, weighed, factor(x.T @ x))
        assert corrected.shape == plain.shape
        errors = [
            np.square((gguf.dequantize(data, gguf.GGMLQuantizationType[name]) - values) @ x.T).sum()
            for data in (corrected, plain)
        ]
        assert errors[0] < 0.85 * errors[1]
