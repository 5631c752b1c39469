"""Repacked ggml blocks: what mx.dequantize makes of them is what ggml makes of the originals, bit for bit."""

import gguf
import mlx.core as mx
import numpy as np
import pytest

from gguf_export.quantize import quantize
from mlx_dgemma.gguf.types import TYPES
from mlx_dgemma.gguf_weights import FORMS, pack

# Bytes of a block that are a float16 scale or minimum, and those that are an 8-bit scale with a largest valid code.
HALVES = {"Q8_0": 1, "Q5_1": 2, "Q5_0": 1, "Q4_1": 2, "Q4_0": 1, "Q5_K": 2, "Q4_K": 2, "MXFP4": 0, "NVFP4": 0}
SMALL_SCALES = {"MXFP4": (1, 254), "NVFP4": (4, 0x7E)}  # E8M0's 255 and E4M3's 127 mean NaN to MLX; ggml writes neither


def random_rows(name, n_rows, n_blocks, seed=0):
    """Any bits for codes and packed scales; any finite float16 for the rest. (rows, bytes of a row)"""
    rng, type = np.random.default_rng(seed), TYPES[name]
    blocks = rng.integers(0, 256, (n_rows * n_blocks, type.block_bytes), np.uint8)
    halves = HALVES[name]
    # Of either sign, from subnormal to the largest.
    bits = rng.integers(0, 0x7C00, (len(blocks), halves), np.uint16) | (rng.integers(0, 2, (len(blocks), halves)) << 15)
    blocks[:, : 2 * halves] = bits.astype("<u2").view(np.uint8)
    if name in SMALL_SCALES:
        n, largest = SMALL_SCALES[name]
        blocks[:, :n] = rng.integers(0, largest + 1, (len(blocks), n))
    return blocks.reshape(n_rows, -1)


def through_mlx(rows, name):
    how = FORMS[name].quantization._asdict()
    words, scales, *biases = (mx.array(part) for part in pack(rows, TYPES[name]))
    return np.array(mx.dequantize(words, scales, *biases, **how, dtype=mx.float32))


def through_ggml(rows, name):
    with np.errstate(over="ignore"):  # the largest MXFP4 scales reach infinity
        return gguf.dequantize(rows, gguf.GGMLQuantizationType[name])


def test_a_block_by_eye():
    # scale 0.5, codes −8 … 7 in the low halves of the bytes and 7 … −8 in the high ones
    codes = bytes(low | (15 - low) << 4 for low in range(16))
    row = np.frombuffer(np.float16(0.5).tobytes() + codes, np.uint8)[None]
    words, scales, biases = pack(row, TYPES["Q4_0"])
    assert [f"{word:08x}" for word in words[0]] == ["76543210", "fedcba98", "89abcdef", "01234567"]
    assert scales.tolist() == [[0.5]] and biases.tolist() == [[-4.0]]


@pytest.mark.parametrize("n_blocks", [1, 3, 22])
@pytest.mark.parametrize("name", FORMS)
def test_random_blocks_keep_every_value(name, n_blocks):
    rows = random_rows(name, 16, n_blocks)
    got, want = through_mlx(rows, name), through_ggml(rows, name)
    assert got.shape == want.shape == (16, n_blocks * TYPES[name].block)
    assert (got == want).all(), f"{(got != want).sum()} of {got.size} differ, the first {np.argwhere(got != want)[0]}"


@pytest.mark.parametrize("name", FORMS)
def test_quantized_weights_keep_every_value(name):
    weights = np.random.default_rng(1).standard_normal((8, 3 * TYPES[name].block), np.float32)
    rows = quantize(weights, TYPES[name])
    got = through_mlx(rows, name)
    assert (got == through_ggml(rows, name)).all()
    assert 0 < np.abs(got - weights).mean() < 0.2  # codes at their own weights' places


def test_an_odd_start_and_a_strided_row():
    # Rows of a mapped file are views that begin anywhere and may be read-only.
    rows = random_rows("Q5_K", 7, 2)
    shifted = np.frombuffer(b"\0" + rows.tobytes(), np.uint8)[1:].reshape(rows.shape)
    for view in (shifted, shifted[1::2]):
        assert (through_mlx(view, "Q5_K") == through_ggml(np.ascontiguousarray(view), "Q5_K")).all()


@pytest.mark.parametrize("name", FORMS)
def test_sizes_are_those_of_the_arrays(name):
    how, rows = FORMS[name].quantization, random_rows(name, 4, 3)
    weights = 4 * 3 * TYPES[name].block
    assert how.nbytes(weights, scale_bytes=4) == sum(part.nbytes for part in pack(rows, TYPES[name]))
