"""config.json and generation_config.json: both spellings, and what a wrong file says."""

import json

import pytest

from mlx_dgemma.config import (
    GenerationConfig,
    parse_config,
    parse_generation_config,
    read_config,
    read_generation_config,
    released_spelling,
)
from mlx_dgemma.errors import DgemmaError
from tests.tiny import tiny_config


def test_both_spellings_mean_the_same_model():
    released, per_layer = tiny_config(), tiny_config(spelling="per_layer")
    assert "global_head_dim" not in per_layer["text_config"]
    assert parse_config(released) == parse_config(per_layer)
    assert released_spelling(per_layer)["text_config"] == released["text_config"]


def test_per_layer_facts():
    layers = parse_config(tiny_config()).layers
    assert [layer.is_sliding for layer in layers] == [True] * 5 + [False]
    assert (layers[0].head_dim, layers[0].num_key_value_heads, layers[0].rotated_pairs) == (16, 2, 8)
    # A quarter of the 16 frequency pairs of the full layer rotate, and it has no v_proj.
    assert (layers[5].head_dim, layers[5].num_key_value_heads, layers[5].rotated_pairs) == (32, 1, 4)
    assert layers[0].has_v_proj and not layers[5].has_v_proj


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma4"}, 'model_type is "gemma4", expected "diffusion_gemma".*mlx_lm.generate'),
        ({"model_type": None}, "model_type is null"),
        ({"model_type": []}, r"model_type is \[\]"),
        ({"text_config": None}, "text_config is None, expected a JSON object"),
        ({"canvas_length": -1}, "canvas_length is -1, expected a positive whole number"),
    ],
)
def test_a_wrong_config_is_named(change, message):
    with pytest.raises(DgemmaError, match=message):
        parse_config(tiny_config() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": "many"}, "vocab_size is 'many', expected a positive whole number"),
        ({"num_hidden_layers": 10**9, "layer_types": None}, "at most 10000"),
        ({"layer_types": ["sliding_attention"]}, "expected 6 of"),
        ({"layer_types": 5}, "layer_types is 5, expected 6 of"),
        ({"layer_types": ["sliding_attention"] * 6}, "the last of layer_types is .sliding_attention., expected .full"),
        ({"rope_parameters": []}, r"text_config.rope_parameters is \[\], expected a JSON object"),
        ({"per_layer_config": [1]}, "per_layer_config is .1., expected a JSON object"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x', expected a number above 0"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping is 0, expected a number above 0"),
        ({"top_k_experts": 99}, "top_k_experts 99 is above num_experts 8"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"use_bidirectional_attention": "all"}, "expected .vision. or null"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "must treat the layers .'5'. alike"),
    ],
)
def test_a_wrong_text_config_is_named(change, message):
    raw = tiny_config()
    raw["text_config"] |= change
    with pytest.raises(DgemmaError, match=message):
        parse_config(raw)


def test_the_last_layer_is_full_by_default():
    raw = tiny_config()
    raw["text_config"] |= {"num_hidden_layers": 7, "layer_types": None}
    assert [layer.is_sliding for layer in parse_config(raw).layers] == [True] * 5 + [False] * 2


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(DgemmaError, match=r"config.json: not found; expected a model folder"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DgemmaError, match=r"not valid JSON .*download the file again"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DgemmaError, match="found a list, expected a JSON object"):
        read_config(tmp_path)


def test_generation_config_defaults_file_and_overrides(tmp_path):
    assert read_generation_config(tmp_path) == GenerationConfig()
    raw = {"max_denoising_steps": 8, "sampler_config": {"entropy_bound": 0.2}, "eos_token_id": 7, "t_max": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    read = read_generation_config(tmp_path)
    assert (read.max_denoising_steps, read.entropy_bound, read.stop_token_ids, read.t_max) == (8, 0.2, (7,), 0.8)
    assert read.replace(t_max=0.9, t_min=None).t_max == 0.9
    assert read.replace(t_min=None) == read


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"max_denoising_steps": 0}, "max_denoising_steps is 0, expected a whole number of at least 1"),
        ({"t_min": 0.9}, "t_min is 0.9 and t_max 0.8"),
        ({"t_max": float("nan")}, "t_max is nan"),
        ({"sampler_config": {"_cls_name": "Other"}}, "sampler 'Other' is not known"),
        ({"sampler_config": "x"}, "sampler_config is 'x', expected a JSON object"),
        ({"pad_token_id": "x"}, r"pad token id is \['x'\]"),
        ({"eos_token_id": "x"}, r"stop token id is \('x',\)"),
    ],
)
def test_a_wrong_generation_config_is_named(raw, message):
    with pytest.raises(DgemmaError, match=message):
        parse_generation_config(raw)
