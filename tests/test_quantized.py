"""Quantized folders compute what their dequantized weights compute, for every recipe."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from convert import convert
from convert.recipes_mlx import RECIPES
from mlx_dgemma.config import read_config
from mlx_dgemma.loading import check_weights
from mlx_dgemma.shards import stored_tensors
from mlx_dgemma.tensors import text_tensors
from tests.tiny import write_safetensors


def logits(folder, **options):
    """First and self-conditioned step."""
    model, _ = mlx_dgemma.load(folder, **options)
    cache, canvas = model.make_cache(), mx.arange(16)[None] + 107
    model.encode(mx.arange(20)[None] + 200, cache)
    first = model.denoise(canvas, cache)
    return np.concatenate([np.array(first), np.array(model.denoise(canvas, cache, first / 0.6))])


def dequantized(folder, out):
    """The folder's weights as a plain float32 checkpoint."""
    config = read_config(folder)
    quantized = check_weights(stored_tensors(folder), config, folder)
    arrays = {k: v for file in folder.glob("*.safetensors") for k, v in mx.load(str(file)).items()}
    weights = {}
    for tensor in text_tensors(config):
        module, value = tensor.mlx.removesuffix(".weight"), arrays[tensor.mlx]
        if module in quantized:
            how = quantized[module]._asdict()
            value = mx.dequantize(value, arrays[f"{module}.scales"], arrays.get(f"{module}.biases"), **how)
        weights[tensor.hf] = np.array(value.astype(mx.float32))
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    write_safetensors(out / "model.safetensors", weights)
    return out


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_quantized_model_is_its_dequantized_weights(tiny, tmp_path, recipe):
    convert(tiny, tmp_path / "out", recipe=recipe)
    got, want = logits(tmp_path / "out"), logits(dequantized(tmp_path / "out", tmp_path / "plain"))
    assert np.abs(got - want).max() < 1e-4
    assert (logits(tmp_path / "out", dequantize=True) == want).all()
    exact = logits(tiny)
    if recipe == "fp32":
        assert (got == exact).all()
    else:
        assert 0 < np.abs(got - exact).max() < 5  # it did quantize, and not to noise
