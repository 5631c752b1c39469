"""Recipes and plans: pure, from config.json alone, and checked against figures worked out by hand."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convert import convert
from convert.plan import make_plan, plan_from_config, quantization_block
from convert.recipes import find_recipe
from convert.recipes_mlx import PRECISIONS, RECIPES, fallback
from mlx_dgemma.config import parse_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.tensors import QUANTIZED_ROLES, text_tensors
from tests.tiny import tiny_config, write_json

CONFIG_26B = Path(__file__).parent / "data/diffusiongemma-26b-config.json"

# Parameters of the 26B by role, from the sizes in its configuration.
HIDDEN, DENSE, EXPERT, EXPERTS, VOCABULARY = 2816, 2112, 704, 128, 262_144
SLIDING, FULL = 25, 5
PARAMETERS = {
    "embedding": VOCABULARY * HIDDEN,
    # q and o: 16 heads; k and v: 8 heads of 256; full layers have k alone: 2 heads of 512
    "attention": SLIDING * HIDDEN * 256 * (16 + 8 + 8 + 16) + FULL * HIDDEN * 512 * (16 + 2 + 16),
    "dense": 30 * 3 * HIDDEN * DENSE,
    "router": 30 * EXPERTS * HIDDEN,
    "expert": 30 * EXPERTS * 3 * HIDDEN * EXPERT,
    "self_conditioning": 3 * HIDDEN * DENSE,
    # per layer seven norms and the router's scale, one scale per expert, q and k norms; two norms of the model
    "norm": 30 * (8 * HIDDEN + EXPERTS) + SLIDING * 2 * 256 + FULL * 2 * 512 + 2 * HIDDEN,
    "scalar": 60,
}
GIGABYTES = {"fp32": 102.15, "bf16": 51.65, "q8": 27.98, "q6": 22.26, "q5": 19.40, "q4": 16.55, "q3": 13.69}
GIGABYTES |= {"mxfp8": 27.26, "mxfp4": 15.83, "nvfp4": 16.55}  # with the vision tower's 1.15


def plan_26b(recipe):
    raw = json.loads(CONFIG_26B.read_text())
    return plan_from_config(raw, parse_config(raw), find_recipe(recipe))


def tiny_plan(recipe="q4", shard_bytes=10**9, stored="F32", **overrides):
    config = parse_config(tiny_config(**overrides))
    names = {t.hf: (t.hf, stored) for t in text_tensors(config)}
    return make_plan(config, find_recipe(recipe), names, (), shard_bytes)


def test_26b_parameters_by_hand():
    plan = plan_26b("q4")
    found = {row.role: row.parameters for row in plan.by_role()}
    vision = found.pop("vision")
    assert found == PARAMETERS
    assert len(plan.tensors) == 1047
    # transformers counts 25,250,986,752 in the text model: it leaves out the 60 layer scalars, which are buffers.
    assert sum(found.values()) == 25_250_986_752 + 60
    assert plan.parameters == sum(found.values()) + vision


def test_26b_q4_bytes_by_hand():
    """8.5 bits per weight for 8-bit groups of 64 with two bfloat16 numbers each, 4.5 for 4-bit ones, else 16."""
    eight = sum(PARAMETERS[role] for role in ("embedding", "attention", "dense", "router"))
    four = PARAMETERS["expert"] + PARAMETERS["self_conditioning"]
    sixteen = PARAMETERS["norm"] + PARAMETERS["scalar"]
    text = eight * 17 // 16 + four * 9 // 16 + sixteen * 2
    plan = plan_26b("q4")
    found = {row.role: row.bytes for row in plan.by_role()}
    assert sum(found.values()) - found["vision"] == text
    assert text == 15_401_919_096 <= 15.5e9
    assert plan.notes == ()


@pytest.mark.parametrize("recipe", RECIPES)
def test_26b_sizes(recipe):
    plan = plan_26b(recipe)
    assert round(plan.total_bytes / 1e9, 2) == GIGABYTES[recipe]
    assert all(sum(t.nbytes for t in shard) <= 5e9 for shard in plan.shards)


def test_a_plan_of_the_26b_is_instant_and_needs_config_json_alone(tmp_path):
    (tmp_path / "config.json").write_bytes(CONFIG_26B.read_bytes())
    started = time.monotonic()
    report = convert(tmp_path, recipe="q4", dry_run=True)
    assert time.monotonic() - started < 2
    assert report.plan.total_bytes == plan_26b("q4").total_bytes
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_planning_needs_no_mlx():
    code = "import sys, convert.cli, convert.api; sys.exit('mlx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_q4_is_the_published_mixture():
    block = quantization_block(tiny_plan("q4"))
    eight, four = {"group_size": 64, "bits": 8, "mode": "affine"}, {"group_size": 64, "bits": 4, "mode": "affine"}
    assert {key: block[key] for key in four} == four
    layer = "model.decoder.layers.0."
    named = ("self_attn.q_proj", "mlp.up_proj", "router.proj")
    assert all(block[layer + name] == eight for name in named)
    assert block["model.decoder.embed_tokens"] == eight
    assert not any("experts" in key or "self_conditioning" in key for key in block)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_its_name_to_the_experts(name):
    roles = RECIPES[name].roles
    assert roles["expert"].name == name
    assert set(roles) == set(QUANTIZED_ROLES)
    quantized = roles["expert"].is_quantized
    assert (quantization_block(tiny_plan(name)) is not None) == quantized
    if quantized:
        assert roles["self_conditioning"].name == ("q4" if name == "q3" else name)
        assert {roles[role].name for role in ("embedding", "attention", "dense", "router")} == {"q8"}


def test_rows_that_do_not_fit_get_smaller_groups_or_stay():
    assert fallback(PRECISIONS["q4"], 128).name == "q4"
    assert fallback(PRECISIONS["q4"], 96).name == "q4-g32"
    assert fallback(PRECISIONS["q4"], 72).name == "as stored"
    assert fallback(PRECISIONS["mxfp4"], 96).name == "mxfp4"
    assert fallback(PRECISIONS["mxfp4"], 48).name == "as stored"
    assert fallback(PRECISIONS["nvfp4"], 48).name == "nvfp4"


def test_a_fallback_is_said_in_the_plan_and_in_the_block():
    plan = tiny_plan("q4", moe_intermediate_size=96)
    assert plan.notes == ("expert: 6 tensors with rows of 96 do not fit the groups of q4 and become q4-g32",)
    block = quantization_block(plan)
    assert block["model.decoder.layers.0.experts.down_proj"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    plan = tiny_plan("q4", stored="BF16", moe_intermediate_size=72)
    assert plan.notes == ("expert: 6 tensors with rows of 72 do not fit the groups of q4 and become bf16",)
    assert quantization_block(plan)["model.decoder.layers.0.experts.down_proj"] is False


def test_a_module_whose_size_is_no_multiple_of_64_is_named():
    """mlx-vlm leaves such a module unquantized unless the block names it."""
    block = quantization_block(tiny_plan("mxfp4", moe_intermediate_size=32, hidden_size=32, num_experts=7))
    assert block["mode"] == "mxfp4"
    plan = tiny_plan("q8", hidden_size=32, num_experts=7)
    odd = [t for t in plan.tensors if t.tensor.role == "router"]
    assert odd[0].tensor.size % 64
    assert quantization_block(plan)[odd[0].module]["bits"] == 8


def test_shards_keep_tensors_whole_and_in_order():
    plan = tiny_plan("bf16", shard_bytes=100_000)
    assert len(plan.shards) > 10
    assert [t for shard in plan.shards for t in shard] == list(plan.tensors)
    sizes = [sum(t.nbytes for t in shard) for shard in plan.shards]
    assert all(size <= 100_000 or len(shard) == 1 for size, shard in zip(sizes, plan.shards, strict=True))
    assert plan.shard_name(0) == f"model-00001-of-{len(plan.shards):05}.safetensors"


# Recipe files


def test_a_recipe_file(tmp_path):
    write_json(tmp_path / "r.json", {"name": "mine", "roles": {"expert": "mxfp4", "attention": "q6-g32"}})
    recipe = find_recipe(tmp_path / "r.json")
    names = {role: precision.name for role, precision in (recipe.roles | recipe.overrides).items()}
    assert recipe.name == "mine"
    assert names == dict.fromkeys(QUANTIZED_ROLES, "q8") | {"expert": "mxfp4", "attention": "q6-g32"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"roles": {"experts": "q4"}}, "role 'experts' is not known, expected some of embedding, attention"),
        ({"roles": {"norm": "q4"}}, "role 'norm' is never quantized"),
        ({"roles": {"expert": "q7"}}, 'precision "q7" of expert is not known, expected one of fp32, bf16, q8'),
        ({"roles": {"expert": ["q4"]}}, "precision .* of expert is not known"),
        ({"roles": {}, "default": "q4"}, "found the keys .*'default'"),
        ({"expert": "q4"}, "found the keys .*expected"),
        ({"name": 3, "roles": {}}, "name is 3, expected a string"),
    ],
)
def test_a_wrong_recipe_file_is_refused(tmp_path, content, message):
    write_json(tmp_path / "r.json", content)
    with pytest.raises(DgemmaError, match=message):
        find_recipe(tmp_path / "r.json")


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(DgemmaError, match="recipe 'q9' is not known, expected one of bf16, fp32, q8, .* nvfp4"):
        find_recipe("q9")
    with pytest.raises(DgemmaError, match="absent.json: not found"):
        find_recipe("absent.json")


def test_an_odd_dtype_in_the_configuration_is_named(tmp_path):
    write_json(tmp_path / "config.json", tiny_config() | {"dtype": "float8"})
    with pytest.raises(DgemmaError, match="dtype is 'float8', expected one of bfloat16, float16, float32"):
        convert(tmp_path, dry_run=True)
