"""mlx-vlm 0.7.10 reads what we write and gives the same logits; we read what it writes.

A bfloat16 folder is left out: on a CPU MLX gathers expert matrices in float32 only, and mlx-vlm has no way around it.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_vlm.convert import convert as vlm_convert
from mlx_vlm.utils import load_model as vlm_load

import mlx_dgemma
from convert import convert
from convert.recipes_mlx import RECIPES
from tests.tiny import make_tiny_checkpoint, write_json

# Measured 4e-6 at most over all recipes, in float32: two orders of summation, the same weights.
ATOL = 1e-4


def inputs():
    random = np.random.RandomState(0)
    prompt = np.concatenate([[2, 105], random.randint(107, 384, 28), [106]])[None]  # longer than the window of 16
    return mx.array(prompt.astype(np.int32)), mx.array(random.randint(0, 384, (1, 16)).astype(np.int32))


def our_logits(folder):
    """The first step, and the second one, which reads the first one's logits. 2 × (1, C, V)"""
    model, _ = mlx_dgemma.load(folder)
    prompt, canvas = inputs()
    cache = model.make_cache()
    model.encode(prompt, cache)
    first = model.denoise(canvas, cache)
    return np.array(first), np.array(model.denoise(canvas, cache, self_conditioning_logits=first))


def vlm_logits(folder):
    model = vlm_load(Path(folder))
    prompt, canvas = inputs()

    def logits(hidden):
        return model._softcap(model.model.decoder.embed_tokens.as_linear(hidden))

    hidden, cache = model.model(input_ids=prompt, cache=model.make_cache(), canvas_ids=canvas)
    first = logits(hidden)
    hidden, _ = model.model(cache=cache, canvas_ids=canvas, self_conditioning_logits=first)
    return np.array(first), np.array(logits(hidden))


def assert_same_logits(ours, theirs):
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert np.abs(a - b).max() < ATOL, f"{step=}"


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "bf16"])
def test_mlx_vlm_loads_every_recipe_and_agrees(tiny, tmp_path, recipe):
    convert(tiny, tmp_path / "out", recipe=recipe)
    assert_same_logits(our_logits(tmp_path / "out"), vlm_logits(tmp_path / "out"))


@pytest.mark.parametrize(
    "roles",
    [
        {"embedding": "mxfp8", "attention": "mxfp8", "dense": "mxfp8", "router": "mxfp8", "expert": "mxfp4"},
        {"embedding": "fp32", "attention": "q5-g32", "dense": "q6-g128", "router": "fp32", "expert": "q2"},
        {"expert": "q4", "blk.1.expert": "q6", "blk.1.ffn_down_exps": "q3-g32", "blk.0.attention": "q5-g128"},
    ],
)
def test_a_mixture_of_modes_loads(tmp_path, roles):
    """Overrides in every direction: a mode, a group size, one layer, and no quantization at all beside a default."""
    source = make_tiny_checkpoint(tmp_path / "source", hidden_size=128, intermediate_size=256)
    write_json(tmp_path / "r.json", {"roles": roles})
    convert(source, tmp_path / "out", recipe=tmp_path / "r.json", verify=True)
    ours, theirs = our_logits(tmp_path / "out"), vlm_logits(tmp_path / "out")
    if roles.get("embedding") == "mxfp8":  # its embedding makes mlx-vlm's activations bfloat16
        assert np.abs(ours[0] - theirs[0]).mean() < 0.05
    else:
        assert_same_logits(ours, theirs)


def test_rows_that_do_not_fit_load(tmp_path):
    source = make_tiny_checkpoint(tmp_path / "source", moe_intermediate_size=72)
    convert(source, tmp_path / "out", recipe="q4")
    assert_same_logits(our_logits(tmp_path / "out"), vlm_logits(tmp_path / "out"))


def test_a_folder_with_a_vision_tower_loads(tmp_path):
    source = make_tiny_checkpoint(tmp_path / "source", vision=True)
    convert(source, tmp_path / "out", recipe="q4")
    assert vlm_load(tmp_path / "out").model.encoder.vision_tower is not None
    assert_same_logits(our_logits(tmp_path / "out"), vlm_logits(tmp_path / "out"))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("fp32", {}),
        ("q4", {"quantize": True}),
        ("q8", {"quantize": True, "q_bits": 8}),
        ("mxfp4", {"quantize": True, "q_mode": "mxfp4", "q_group_size": 32}),
        ("mxfp8", {"quantize": True, "q_mode": "mxfp8", "q_group_size": 32, "q_bits": 8}),
        ("nvfp4", {"quantize": True, "q_mode": "nvfp4", "q_group_size": 16}),
    ],
)
def test_what_mlx_vlm_writes_is_what_we_write(tiny, tmp_path, ours, theirs):
    """Not only does it load: the recipe of the same name gives the same bits."""
    vlm_convert(str(tiny), str(tmp_path / "theirs"), **theirs)
    convert(tiny, tmp_path / "ours", recipe=ours)
    assert_same_logits(our_logits(tmp_path / "theirs"), our_logits(tmp_path / "ours"))
    (file,) = (tmp_path / "theirs").glob("*.safetensors")
    want = mx.load(str(file))
    found = mx.load(str(tmp_path / "ours/model-00001-of-00001.safetensors"))
    assert set(found) == set(want)
    assert [name for name in want if not mx.array_equal(found[name], want[name])] == []
    blocks = [
        json.loads((tmp_path / who / "config.json").read_text()).get("quantization") for who in ("ours", "theirs")
    ]
    assert resolve(blocks[0], want) == resolve(blocks[1], want)


def resolve(block, arrays):
    """Module → settings, as a loader finds them."""
    modules = [name.removesuffix(".scales") for name in arrays if name.endswith(".scales")]
    default = {key: block[key] for key in ("group_size", "bits", "mode")} if modules else None
    return {module: {"mode": "affine"} | block.get(module, default) for module in modules}
