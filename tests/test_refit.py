"""Fitted scales: never worse than MLX's, packed as MLX packs, and what a conversion writes with them."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from convert import convert
from convert.cli import main
from convert.recipes_mlx import PRECISIONS
from convert.refit import pack, refit
from convert.to_mlx import quantize
from convert.verify import _unpack
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.floats import from_float32, to_float32

AFFINE = [p for p in PRECISIONS.values() if p.mode == "affine"]


def dequantized(words, scales, biases, dtype, precision):
    """By MLX."""
    scales, biases = (mx.array(to_float32(a, dtype)) for a in (scales, biases))
    how = {"group_size": precision.group_size, "bits": precision.bits, "mode": "affine"}
    return np.array(mx.dequantize(mx.array(words), scales, biases, **how))


def awkward(rows=6, row=256):
    """Groups that are normal, all one number, zero, tiny, and with an outlier."""
    values = np.random.default_rng(0).standard_normal((rows, row)).astype(np.float32)
    values[1] = 3.25
    values[2] = 0
    values[3] *= 1e-30
    values[4, ::50] *= 100
    return values


@pytest.mark.parametrize("precision", AFFINE, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_no_group_gets_worse(precision, dtype):
    stored = from_float32(awkward(), dtype)
    values = to_float32(stored, dtype)
    before = quantize(stored, dtype, precision)
    after = refit(values, *before[1:], dtype, precision)
    assert [(a.dtype, a.shape) for a in after] == [(b.dtype, b.shape) for b in before]
    errors = [
        np.square(dequantized(*parts, dtype, precision) - values).reshape(-1, precision.group_size).sum(axis=-1)
        for parts in (before, after)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-4) + 1e-12).all()


def test_four_bits_lose_a_tenth_less_on_normal_weights():
    values = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)
    precision = PRECISIONS["q4"]
    before = quantize(values, "F32", precision)
    after = refit(values, *before[1:], "F32", precision)
    errors = [np.square(dequantized(*parts, "F32", precision) - values).sum() for parts in (before, after)]
    assert 0.85 < errors[1] / errors[0] < 0.92


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_packed_as_mlx_packs(bits):
    codes = np.random.default_rng(2).integers(0, 2**bits, (5, 64)).astype(np.uint8)
    words = pack(codes, bits)
    assert words.shape == (5, 64 * bits // 32)
    assert np.array_equal(_unpack(words, bits), codes)
    ones, zeros = mx.ones((5, 1)), mx.zeros((5, 1))
    assert np.array_equal(np.array(mx.dequantize(mx.array(words), ones, zeros, 64, bits)), codes)


def test_a_folder_with_fitted_scales_is_as_large_and_closer(tmp_path):
    plain = convert("demo/checkpoint", tmp_path / "plain", recipe="q4", verify=True)
    fitted = convert("demo/checkpoint", tmp_path / "fitted", recipe="q4", verify=True, refit=True)
    assert plain.plan == fitted.plan
    before, after = ({e.role: e.relative_rms for e in report.errors} for report in (plain, fitted))
    assert after["expert"] < 0.95 * before["expert"]
    assert all(after[role] <= before[role] for role in before)
    model, _ = mlx_dgemma.load(tmp_path / "fitted")
    assert model.config.num_experts == 8


def test_an_interrupted_run_without_it_is_no_beginning_of_one_with_it(tmp_path, monkeypatch):
    from convert import to_mlx
    from convert.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(mlx_dgemma.hub.model_path("demo/checkpoint"))
    plan = convert("demo/checkpoint", recipe="q4", dry_run=True).plan
    works = [to_mlx.folder_work(checkpoint, plan, refitted) for refitted in (False, True)]
    assert works[0].digest() != works[1].digest()


def test_a_recipe_with_nothing_to_fit_says_so():
    report = convert("demo/checkpoint", recipe="bf16", refit=True, dry_run=True)
    assert "--refit fits q2 to q8, and recipe bf16 has none of it" in report.notes
    assert not convert("demo/checkpoint", recipe="q4", refit=True, dry_run=True).notes


def test_a_gguf_takes_no_refit(tmp_path, capsys):
    with pytest.raises(DgemmaError, match="--refit is for MLX folders"):
        convert("demo/checkpoint", tmp_path / "x.gguf", to="gguf", refit=True)
    assert main(["demo/checkpoint", str(tmp_path / "x.gguf"), "--refit"]) == 1
    assert "--refit is for MLX folders" in capsys.readouterr().err
