"""The keys of a GGUF: as the published files spell them, and back into the released config.json."""

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from mlx_dgemma.config import GenerationConfig, parse_config, parse_generation_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf import rope
from mlx_dgemma.gguf.metadata import metadata, read_metadata, size_label
from mlx_dgemma.gguf.reader import GgufFile, StoredTensor, Value, read_gguf
from mlx_dgemma.gguf.types import TYPES
from tests.tiny import tiny_config
from tests.tiny_gguf import A, make_tiny_gguf

ROOT = Path(__file__).parent.parent
CONFIGS = {
    "tiny": tiny_config(),
    # What only sliding layers would use comes back as what the others use.
    "no sliding layer": tiny_config(
        num_hidden_layers=1, layer_types=["full_attention"], head_dim=32, num_key_value_heads=1
    ),
    "demo": json.loads((ROOT / "demo/checkpoint/config.json").read_text()),
    "26B": json.loads((ROOT / "tests/data/diffusiongemma-26b-config.json").read_text()),
}
SETTINGS = GenerationConfig(
    max_denoising_steps=7, t_min=0.3, t_max=0.9, entropy_bound=0.15, stability_threshold=2, confidence_threshold=0.01
)

# general.* and model keys of the published Q8_0 file, as gguf-py's dump prints them; the order is the dump's.
PUBLISHED = {
    "general.architecture": ("str", "diffusion-gemma"),
    "general.type": ("str", "model"),
    "general.size_label": ("str", "128x2.6B"),
    A + "block_count": ("u32", 30),
    A + "context_length": ("u32", 262144),
    A + "embedding_length": ("u32", 2816),
    A + "feed_forward_length": ("u32", 2112),
    A + "attention.head_count": ("u32", 16),
    A + "attention.head_count_kv": ("arr[i32]", [8, 8, 8, 8, 8, 2] * 5),
    A + "rope.freq_base": ("f32", 1e6),
    A + "rope.freq_base_swa": ("f32", 1e4),
    A + "attention.layer_norm_rms_epsilon": ("f32", 1e-6),
    A + "expert_count": ("u32", 128),
    A + "expert_used_count": ("u32", 8),
    A + "attention.key_length": ("u32", 512),
    A + "attention.value_length": ("u32", 512),
    A + "final_logit_softcapping": ("f32", 30.0),
    A + "attention.sliding_window": ("u32", 1024),
    A + "attention.shared_kv_layers": ("u32", 0),
    A + "embedding_length_per_layer_input": ("u32", 0),
    A + "attention.sliding_window_pattern": ("arr[bool]", [True, True, True, True, True, False] * 5),
    A + "attention.key_length_swa": ("u32", 256),
    A + "attention.value_length_swa": ("u32", 256),
    A + "expert_feed_forward_length": ("u32", 704),
    A + "rope.dimension_count": ("u32", 512),
    A + "rope.dimension_count_swa": ("u32", 256),
    A + "attention.causal": ("bool", False),
    "diffusion.canvas_length": ("u32", 256),
    "general.quantization_version": ("u32", 2),
    "general.file_type": ("u32", 7),
}
SAMPLER = {
    "diffusion.eb_max_steps": ("u32", 48),
    "diffusion.eb_t_min": ("f32", 0.4),
    "diffusion.eb_t_max": ("f32", 0.8),
    "diffusion.eb_entropy_bound": ("f32", 0.1),
    "diffusion.eb_stability_threshold": ("u32", 1),
    "diffusion.eb_confidence_threshold": ("f32", 0.005),
}


def text_only(config):
    return dataclasses.replace(config, vision=None)


def file_of(folder, config, generation, tokens=("<pad>",), factors=None):
    """What reading a written file gives: numbers have been float32."""
    keys = metadata(config, generation, "a name", 7)
    keys = {k: Value(t, float(np.float32(v)) if t == "f32" else v) for k, (t, v) in keys.items()}
    keys["tokenizer.ggml.tokens"] = Value("arr[str]", list(tokens))
    path = folder / "data"
    factors = rope.frequency_factors(config) if factors is None else np.asarray(factors, np.float32)
    path.write_bytes(factors.tobytes())
    tensors = [
        StoredTensor("token_embd.weight", TYPES["F32"], (config.vocab_size, config.hidden_size), 0, 0),
        StoredTensor(rope.NAME, TYPES["F32"], factors.shape, 0, factors.nbytes),
    ]
    return GgufFile(path, keys, {t.name: t for t in tensors})


def test_the_keys_are_the_published_files():
    keys = metadata(parse_config(CONFIGS["26B"]), GenerationConfig(), "any", 7)
    assert keys.pop("general.name") == ("str", "any")
    assert keys == PUBLISHED | SAMPLER


def test_the_keys_of_one_type_have_one_python_type():
    kinds = {"u32": int, "f32": float, "str": str, "bool": bool, "arr[i32]": list, "arr[bool]": list}
    for key, (kind, value) in metadata(parse_config(CONFIGS["tiny"]), SETTINGS, "any", 7).items():
        assert type(value) is kinds[kind], key


@pytest.mark.parametrize("name", CONFIGS)
def test_both_configurations_survive_the_way_there_and_back(tmp_path, name):
    config = parse_config(CONFIGS[name])
    tokens = [f"t{i}" for i in range(107)]
    tokens[1], tokens[106], tokens[50] = "<eos>", "<turn|>", "<|tool_response>"
    if config.image_token_id == 7:
        tokens[7] = "<|image|>"
    raw_config, raw_generation = read_metadata(file_of(tmp_path, config, SETTINGS, tokens))
    assert parse_config(raw_config) == text_only(config)
    assert parse_generation_config(raw_generation) == SETTINGS
    assert json.loads(json.dumps([raw_config, raw_generation])) == [raw_config, raw_generation]


def test_a_file_by_another_writer_says_the_same_as_its_checkpoint(tmp_path):
    raw_config, raw_generation = read_metadata(read_gguf(make_tiny_gguf(tmp_path / "tiny.gguf")))
    assert parse_config(raw_config) == parse_config(tiny_config())
    assert parse_generation_config(raw_generation) == GenerationConfig(max_denoising_steps=8)


def test_config_json_is_complete(tmp_path):
    """What a text-only checkpoint in the released spelling says, and with the same values."""
    want = CONFIGS["demo"]
    config, settings = parse_config(want), GenerationConfig()
    found, generation = read_metadata(file_of(tmp_path, config, settings, ["<pad>", "<eos>", "<bos>"]))
    # Training hyperparameters, which no GGUF holds and transformers has defaults for.
    unknown = {"initializer_range", "attention_dropout"}
    text = {k: v for k, v in want["text_config"].items() if k not in unknown}
    assert found == {k: v for k, v in want.items() if k not in unknown} | {"text_config": text}
    released = json.loads((ROOT / "demo/checkpoint/generation_config.json").read_text())
    assert generation == released | {"eos_token_id": [1]}  # this vocabulary has no other


def test_size_label_is_what_gguf_py_says(tmp_path):
    path = make_tiny_gguf(tmp_path / "tiny.gguf", keys={"general.size_label": None})
    writer = gguf.GGUFWriter(tmp_path / "again.gguf", "diffusion-gemma")
    for t in gguf.GGUFReader(path).tensors:
        if t.name != rope.NAME:  # 16 numbers, which gguf-py counts and nobody trained
            writer.add_tensor(t.name, t.data)
    assert size_label(parse_config(tiny_config())) == gguf.size_label(*writer.get_total_parameter_count())
    writer.close()


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0, 1 / 3, 3 / 16])
@pytest.mark.parametrize("head_dim", [2, 32, 96, 98, 512])
def test_the_rotated_pairs_come_from_the_frequency_factors(tmp_path, share, head_dim):
    pairs = head_dim // 2
    rotated = max(1, int(share * pairs))
    config = parse_config(tiny_config(global_head_dim=head_dim))
    factors = [1.0] * rotated + [1e30] * (pairs - rotated)
    read = parse_config(read_metadata(file_of(tmp_path, config, SETTINGS, factors=factors))[0])
    assert read.layers[-1].rotated_pairs == rotated
    assert rope.frequency_factors(read).tolist() == np.float32(factors).tolist()


def changed(tmp_path, **changes):
    """read_metadata of the tiny file with keys replaced; None takes one away. `__` stands for a dot."""
    file = file_of(tmp_path, parse_config(tiny_config()), SETTINGS)
    for name, value in changes.items():
        key = name.replace("__", ".")
        key = key if key.startswith(("general", "diffusion", "tokenizer")) else A + key
        file.metadata.pop(key, None)
        if value is not None:
            file.metadata[key] = Value("any", value)
    config, generation = read_metadata(file)
    return parse_config(config), parse_generation_config(generation)


def test_keys_that_can_only_mean_one_thing_may_be_absent(tmp_path):
    want = changed(tmp_path)
    none = dict.fromkeys(["attention__value_length", "rope__dimension_count", "attention__value_length_swa"])
    none |= dict.fromkeys(["attention__shared_kv_layers", "attention__causal", "rope__dimension_count_swa"])
    assert changed(tmp_path, **none) == want
    one_length, _ = changed(tmp_path, attention__key_length_swa=None, **none)
    assert (one_length.head_dim, one_length.global_head_dim) == (32, 32)
    one_count, _ = changed(tmp_path, attention__head_count_kv=2)
    assert (one_count.num_key_value_heads, one_count.num_global_key_value_heads) == (2, 2)


def test_without_sampler_keys_the_defaults_are_the_references(tmp_path):
    _, generation = changed(tmp_path, **{key.replace(".", "__"): None for key in SAMPLER})
    assert dataclasses.replace(generation, stop_token_ids=(1, 106, 50)) == GenerationConfig()


@pytest.mark.parametrize(
    ("eos", "tokens", "want"),
    [
        (1, ["<pad>", "<eos>", "<turn|>"], (1, 2)),
        (2, ["<pad>", "<eos>", "<turn|>"], (1, 2)),  # the reference's order, whichever is called eos
        (0, ["</s>", "<|tool_response>"], (0, 1)),
        (5, [], (5,)),
    ],
)
def test_stop_ids_are_eos_and_the_tokens_that_end_a_turn(tmp_path, eos, tokens, want):
    _, generation = changed(tmp_path, tokenizer__ggml__eos_token_id=eos, tokenizer__ggml__tokens=tokens)
    assert generation.stop_token_ids == want


# fmt: off
REFUSED = {
    "Gemma 4": ({"general__architecture": "gemma4"}, "is 'gemma4', expected 'diffusion-gemma'; .*llama-cli"),
    "none": ({"general__architecture": None}, "general.architecture is None, expected 'diffusion-gemma'"),
    "imatrix": ({"general__type": "imatrix"}, "is 'imatrix', expected .*importance matrix: give the model itself"),
    "mmproj": ({"general__architecture": "clip"}, "vision projector .*give the text model's file"),
    "no canvas": ({"diffusion__canvas_length": None}, "found no metadata key diffusion.canvas_length, expected"),
    "no theta": ({"rope__freq_base_swa": None}, "found no metadata key diffusion-gemma.rope.freq_base_swa"),
    "no head length": ({k: None for k in ("attention__key_length", "attention__value_length", "rope__dimension_count")},
                       "found no metadata key diffusion-gemma.attention.key_length"),
    "text": ({"embedding_length": "64"}, "diffusion-gemma.embedding_length is '64', expected a whole number"),
    "fraction": ({"embedding_length": 64.5}, "diffusion-gemma.embedding_length is 64.5, expected a whole number"),
    "negative": ({"embedding_length": -64}, "diffusion-gemma.embedding_length is -64, expected a whole number"),
    "bool": ({"expert_count": True}, "diffusion-gemma.expert_count is True, expected a whole number"),
    "not a number": ({"rope__freq_base": float("nan")}, "diffusion-gemma.rope.freq_base is nan, expected a number"),
    "infinite": ({"diffusion__eb_t_max": float("inf")}, "diffusion.eb_t_max is inf, expected a number"),
    "zero": ({"attention__head_count": 0}, "text_config.num_attention_heads is 0, expected a positive whole number"),
    "disagree": ({"rope__dimension_count": 8},
                 "rope.dimension_count is 8, expected 32 as diffusion-gemma.attention.key_length says"),
    "shared": ({"attention__shared_kv_layers": 2}, "shared_kv_layers is 2, expected 0 as in every DiffusionGemma"),
    "no layers": ({"block_count": 0}, "block_count is 0, expected 1 to 10000"),
    "too many layers": ({"block_count": 2**32 - 1}, "block_count is 4294967295, expected 1 to 10000"),
    "more layers": ({"block_count": 7}, r"sliding_window_pattern is \[True, .*expected 7 times true or false"),
    "pattern": ({"attention__sliding_window_pattern": 6}, "sliding_window_pattern is 6, expected 6 times true"),
    "heads": ({"attention__head_count_kv": [2, 2, 2]}, r"head_count_kv is \[2, 2, 2\], expected 6 whole numbers"),
    "uneven heads": ({"attention__head_count_kv": [2, 2, 1, 2, 2, 1]}, "expected one number for all sliding"),
    "only sliding": ({"attention__sliding_window_pattern": [True] * 6, "attention__head_count_kv": 1},
                     "the last of layer_types is 'sliding_attention', expected 'full_attention'"),
    "eos": ({"tokenizer__ggml__eos_token_id": "<eos>"}, "eos_token_id is '<eos>', expected a whole number"),
    "temperatures": ({"diffusion__eb_t_min": 2.0}, "t_min is 2.0 and t_max 0.9, expected t_min <= t_max"),
}
# fmt: on


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_named(tmp_path, changes, message):
    with pytest.raises(DgemmaError, match=message):
        changed(tmp_path, **changes)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([1.0] * 4 + [1e30] * 11, r"rope_freqs.weight is F32 of shape \(15,\), expected F32 of shape \(16,\)"),
        ([1e30] * 12 + [1.0] * 4, "expected ones, then 1e\\+30"),
        ([0.0] * 16, "expected ones, then 1e\\+30"),
        ([1.0] * 4 + [8.0] * 12, "expected ones, then 1e\\+30"),
        ([1.0] * 4 + [np.nan] * 12, "expected ones, then 1e\\+30"),
    ],
)
def test_other_frequency_factors_are_another_model(tmp_path, factors, message):
    file = file_of(tmp_path, parse_config(tiny_config()), SETTINGS, factors=factors)
    with pytest.raises(DgemmaError, match=message):
        read_metadata(file)


def test_without_the_embedding_there_is_no_vocabulary_size(tmp_path):
    file = file_of(tmp_path, parse_config(tiny_config()), SETTINGS)
    del file.tensors["token_embd.weight"]
    with pytest.raises(DgemmaError, match=r"token_embd.weight: found no such tensor, expected \(vocabulary, hidden\)"):
        read_metadata(file)


def test_without_frequency_factors_the_share_is_the_released_one(tmp_path):
    file = file_of(tmp_path, parse_config(tiny_config()), SETTINGS)
    del file.tensors[rope.NAME]
    assert parse_config(read_metadata(file)[0]).full_rotary_factor == 0.25
