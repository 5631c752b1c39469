"""GGUF recipes against llama-quantize: known sizes of the 26B, and a plain reading of its rules."""

import json
from pathlib import Path

import pytest

from convert.plan_gguf import make_gguf_plan
from convert.recipes import EQUIVALENTS, WRITABLE, find_recipe
from convert.recipes_gguf import FALLBACKS, RECIPES, fallback
from convert.recipes_mlx import PRECISIONS
from mlx_dgemma.config import parse_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.types import TYPES
from tests.tiny import tiny_config, write_json

CONFIG_26B = parse_config(json.loads((Path(__file__).parent / "data/diffusiongemma-26b-config.json").read_text()))
# What llama-quantize prints for the released checkpoint, MiB of weights.
MIB = {
    "BF16": 48_184, "Q8_0": 25_619, "Q6_K": 21_590, "Q5_K_M": 18_244, "Q4_K_M": 16_013, "Q4_K_S": 14_744,
    "IQ4_XS": 13_406, "Q3_K_M": 12_664,
}  # fmt: skip


def plan_26b(recipe, *tensor_types):
    return make_gguf_plan(CONFIG_26B, find_recipe(recipe, "gguf", tensor_types))


def test_q4_k_m_of_the_26b():
    plan = plan_26b("Q4_K_M")
    assert plan.histogram() == {"F32": 423, "Q4_K": 194, "Q5_0": 33, "Q8_0": 28, "Q6_K": 14}
    assert plan.tensor_count == 692
    assert plan.parameters == 25_250_986_752 + 60  # transformers' count and the layer scalars


@pytest.mark.parametrize("recipe", MIB)
def test_sizes_of_the_26b_to_the_mebibyte(recipe):
    assert round(plan_26b(recipe).total_bytes / 2**20) == MIB[recipe]


def test_a_single_tensor_may_differ():
    plan = plan_26b("Q4_K_S", "ffn_down_exps=Q4_0")
    assert round(plan.total_bytes / 2**20) == 13_791
    found = {t.tensor.gguf_part: t.type.name for t in plan.tensors if t.tensor.layer == 29}
    assert found["ffn_down_exps"] == "Q4_0"
    assert found["ffn_gate_up_exps"] == "Q4_K"


def test_by_hand_which_layers_of_the_26b_get_more_bits():
    """25 of 30 layers have an attn_v: the first 3, the last 4, and every third between."""
    plan = plan_26b("Q4_K_M")
    six_bits = [t.tensor.layer for t in plan.tensors if t.tensor.gguf_part == "attn_v" and t.type.name == "Q6_K"]
    with_v = [layer.index for layer in CONFIG_26B.layers if layer.has_v_proj]
    assert six_bits == [with_v[i] for i in (0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23, 24)]
    down = [t.tensor.layer for t in plan.tensors if t.tensor.gguf_part == "ffn_down_exps" and t.type.name == "Q8_0"]
    assert down == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]  # Q6_K, but rows of 704 do not fit


def slowly(recipe, part, i, n, eight, gqa, imatrix):
    """llama-quantize's choice for one tensor, read top to bottom as its source has it."""
    more = i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    base = {"Q5_K_M": "Q5_K", "Q5_K_S": "Q5_K", "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q3_K_M": "Q3_K"}.get(
        recipe, recipe
    )
    if recipe in ("F32", "F16", "BF16"):
        return recipe
    if recipe == "MXFP4":
        return "MXFP4" if part.endswith("_exps") else "Q8_0"
    if part == "token_embd":
        return "Q8_0" if recipe == "Q8_0" else "Q6_K"
    if part == "attn_v":
        if eight:
            return "Q8_0"
        if recipe == "Q2_K":
            return "Q4_K" if gqa >= 4 else "Q3_K"
        if recipe == "Q3_K_M":
            return "Q5_K" if i < 2 else "Q4_K"
        if recipe in ("IQ4_NL", "IQ4_XS") and gqa >= 4:
            return "Q5_K"
        if recipe in ("Q4_K_M", "Q5_K_M") and more:
            return "Q6_K"
        if recipe == "Q4_K_S" and i < 4:
            return "Q5_K"
    elif part == "attn_k" and eight:
        return "Q8_0"
    elif part.startswith("ffn_down"):
        if recipe == "Q2_K":
            return "Q3_K"
        if recipe == "Q3_K_M":
            return "Q5_K" if i < n // 16 else "Q4_K"
        if recipe in ("Q4_K_M", "Q5_K_M") and more:
            return "Q6_K"
        if recipe in ("IQ4_NL", "IQ4_XS") and i < n // 8 and not imatrix:
            return "Q5_K"
        if recipe == "Q4_K_S" and i < n // 8:
            return "Q5_K"
        if recipe in ("Q4_0", "Q5_0") and imatrix and i < n // 8:
            return recipe[:-1] + "1"
    elif part == "attn_output":
        if eight and recipe in ("Q2_K", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS"):
            return "Q5_K"
        if not eight:
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(recipe, base)
    return base


class SomeImatrix:
    """Stands for any importance matrix: the rules ask only whether there is one."""

    def weights(self, name, experts, row):
        return object()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("experts", [8, 128])
@pytest.mark.parametrize("kv_heads", [4, 8])
@pytest.mark.parametrize("imatrix", [None, SomeImatrix()])
def test_every_tensor_gets_llama_quantizes_type(recipe, experts, kv_heads, imatrix):
    layers = {"num_hidden_layers": 32, "layer_types": None}
    text = {"num_experts": experts, "num_attention_heads": 16, "num_key_value_heads": kv_heads, **layers}
    config = parse_config(tiny_config(**(text | {"layer_types": _layer_types(32)})))
    plan = make_gguf_plan(config, RECIPES[recipe], imatrix)
    with_v = [layer.index for layer in config.layers if layer.has_v_proj]
    for t in plan.tensors:
        part, layer = t.tensor.gguf_part, t.tensor.layer
        if t.tensor.role in ("norm", "scalar", "router"):
            assert t.type.name == "F32"
            continue
        i, n = (with_v.index(layer), len(with_v)) if part == "attn_v" else (layer or 0, 32)
        want = slowly(recipe, part, i, n, experts == 8, 16 / kv_heads, imatrix is not None)
        assert t.wanted.name == want, t.tensor.gguf


def _layer_types(n):
    return ["sliding_attention" if (i + 1) % 6 and i + 1 < n else "full_attention" for i in range(n)]


@pytest.mark.parametrize(
    ("type", "row", "given"),
    [
        ("Q4_K", 256, "Q4_K"), ("Q4_K", 704, "Q5_0"), ("Q5_K", 2112, "Q5_1"), ("Q6_K", 704, "Q8_0"),
        ("Q3_K", 704, "Q4_0"), ("Q2_K", 704, "Q4_0"), ("IQ4_XS", 704, "IQ4_NL"), ("Q4_K", 72, "F16"),
        ("Q4_0", 48, "F16"), ("MXFP4", 48, "F16"), ("F32", 7, "F32"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_fall_back(type, row, given):
    assert fallback(TYPES[type], row).name == given


def test_a_fallback_is_said_in_the_plan():
    notes = plan_26b("Q4_K_M").notes
    assert "16 tensors with rows of 704: no whole number of Q4_K's blocks of 256, so Q5_0" in notes
    assert set(FALLBACKS.values()) <= set(TYPES)


# Recipes for both targets


def test_one_recipe_file_serves_both_targets(tmp_path):
    roles = {"expert": "mxfp4", "attention": "Q6_K", "dense": {"mlx": "q5-g32", "gguf": "Q5_0"}, "router": "q8"}
    write_json(tmp_path / "r.json", {"name": "mine", "roles": roles | {"ffn_down_exps": "Q5_1"}})
    config = parse_config(tiny_config())
    plan = make_gguf_plan(config, find_recipe(tmp_path / "r.json", "gguf"))
    found = {t.tensor.gguf_part: t.wanted.name for t in plan.tensors}
    assert found["ffn_gate_up_exps"] == "MXFP4"
    assert found["ffn_down_exps"] == "Q5_1"
    assert (found["attn_q"], found["ffn_gate"], found["token_embd"]) == ("Q6_K", "Q5_0", "Q8_0")
    assert found["ffn_gate_inp"] == "F32"
    assert plan.recipe.file_type == 38
    mlx = find_recipe(tmp_path / "r.json")
    names = {t.tensor.gguf_part: mlx.precision(t.tensor).name for t in plan.tensors}
    assert (names["ffn_gate_up_exps"], names["ffn_down_exps"], names["attn_q"]) == ("mxfp4", "q5-g32", "q6")
    assert (names["ffn_gate"], names["token_embd"], names["ffn_gate_inp"]) == ("q5-g32", "q8", "q8")


def test_a_recipe_file_may_start_from_a_named_recipe(tmp_path):
    base = {"mlx": "q4", "gguf": "Q4_K_M"}
    write_json(tmp_path / "r.json", {"base": base, "roles": {"self_conditioning": "q8"}})
    plan = make_gguf_plan(CONFIG_26B, find_recipe(tmp_path / "r.json", "gguf"))
    assert plan.histogram() == {"F32": 423, "Q4_K": 192, "Q5_0": 32, "Q8_0": 31, "Q6_K": 14}
    assert plan.recipe.name == "r"
    mlx = find_recipe(tmp_path / "r.json")
    assert (mlx.roles["expert"].name, mlx.overrides["self_conditioning"].name) == ("q4", "q8")


def test_every_precision_has_an_equivalent():
    assert {mlx for mlx, _ in EQUIVALENTS} == set(PRECISIONS)
    assert {gguf for _, gguf in EQUIVALENTS} == set(WRITABLE)
    assert {r.base for r in RECIPES.values()} <= set(WRITABLE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("expert", "--tensor-type 'expert' has no '=', expected ROLE=Q5_0"),
        ("router=Q8_0", "role 'router' stays F32 in a GGUF, as llama.cpp wants it, expected some of embedding"),
        ("norm=Q8_0", "role 'norm' is never quantized"),
        ("ffn_dwn=Q8_0", "role 'ffn_dwn' is not known, .* or a tensor: .*ffn_down_exps"),
        ("expert=Q7", 'precision "Q7" of expert is not known, expected one of F32, F16'),
        ("expert=IQ1_S", 'precision "IQ1_S" of expert is not known'),
    ],
)
def test_a_wrong_change_is_refused(change, message):
    with pytest.raises(DgemmaError, match=message):
        find_recipe("Q4_K_M", "gguf", (change,))


def test_names_are_taken_in_any_case():
    assert find_recipe("q4_k_m", "gguf") == RECIPES["Q4_K_M"]
    assert find_recipe("Q8_0", "gguf", ("ffn_down_exps=q4_K",)).overrides == {"ffn_down_exps": "Q4_K"}


def test_a_recipe_of_the_other_target_is_named():
    with pytest.raises(DgemmaError, match="recipe 'Q4_K_M' is for --to gguf, expected one of bf16, .* for --to mlx"):
        find_recipe("Q4_K_M", "mlx")
    with pytest.raises(DgemmaError, match="recipe 'q4' is for --to mlx, expected one of F32, .* for --to gguf"):
        find_recipe("q4", "gguf")
