"""Opening a source: what is read is what was stored, and every defect is one sentence before any work starts."""

import json

import numpy as np
import pytest

from convert import convert
from convert.checkpoint import open_checkpoint
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.floats import from_float32, to_float32
from tests.tiny import from_bfloat16, make_tiny_checkpoint, tiny_weights, to_bfloat16, write_json, write_weights


def read_all(checkpoint):
    weights = checkpoint.weights
    return {hf: to_float32(weights.rows(name)[:], weights[name].dtype) for hf, name in checkpoint.names.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_was_stored(tmp_path, dtype, shards):
    folder = make_tiny_checkpoint(tmp_path / "tiny", dtype=dtype, shards=shards)
    checkpoint = open_checkpoint(folder)
    stored = tiny_weights(checkpoint.raw_config)
    if dtype == "bfloat16":
        stored = {name: from_bfloat16(to_bfloat16(array)) for name, array in stored.items()}
    found = read_all(checkpoint)
    assert set(found) == set(stored)
    for name, array in stored.items():
        assert np.array_equal(found[name].ravel(), array.ravel()), name


def test_an_unquantized_mlx_folder_is_a_source_too(tiny, tmp_path):
    convert(tiny, tmp_path / "mlx", recipe="fp32")
    again, first = read_all(open_checkpoint(tmp_path / "mlx")), read_all(open_checkpoint(tiny))
    assert all(np.array_equal(again[name], first[name]) for name in first)


def test_tied_and_computed_tensors_are_skipped_by_name(tmp_path):
    folder = make_tiny_checkpoint(tmp_path / "tiny")
    weights = tiny_weights(json.loads((folder / "config.json").read_text()))
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    weights["model.encoder.language_model.layers.0.mlp.up_proj.weight"] = np.zeros((1,))
    weights["model.decoder.rotary_emb.full_attention_inv_freq"] = np.zeros((16,))
    write_weights(folder, weights)
    assert "lm_head.weight" not in open_checkpoint(folder).names.values()


def test_bfloat16_rounds_to_nearest_even():
    values = np.array([1.0, 1.00390625, 1.01171875, -1.00390625, 3.4e38, np.inf, np.nan], np.float32)
    rounded = to_float32(from_float32(values, "BF16"), "BF16")
    assert rounded[:6].tolist() == [1.0, 1.0, 1.015625, -1.0, np.inf, np.inf]
    assert np.isnan(rounded[6])


# Defects: what is done to a good folder, and what the message says.


def edit_config(folder, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    write_json(path, raw | changes)


def edit_weights(folder, change):
    weights = tiny_weights(json.loads((folder / "config.json").read_text()))
    change(weights)
    write_weights(folder, weights)


def edit_header(folder, change):
    """Rewrite the header's JSON text, keeping the data."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_bytes(folder, change):
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))


NORM = "model.decoder.norm.weight"

# fmt: off
DEFECTS = {
    "wrong model_type": (
        lambda f: edit_config(f, model_type="gemma4"),
        'model_type is "gemma4", expected "diffusion_gemma".*mlx_lm.generate'),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "config.json: not found; expected a model folder"),
    "config is not JSON": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json: not valid JSON.*download"),
    "already quantized": (
        lambda f: edit_config(f, quantization={"group_size": 64, "bits": 4}),
        "already quantized.*expected bfloat16 or float32.*convert the checkpoint it was made from"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "found no .safetensors file, expected the model's weights"),
    "one of a series, no index": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        "shard model-00002-of-00002.safetensors is missing .1 of 2.; download"),
    "truncated": (
        lambda f: edit_bytes(f, lambda data: data[:-1000]),
        r"model.safetensors: .* ends at byte \d+ of a \d+-byte file; .*download it again"),
    "too long": (
        lambda f: edit_bytes(f, lambda data: data + b"1234"),
        r"found \d+ bytes, expected \d+ for the 143 tensors.*download it again"),
    "empty file": (
        lambda f: edit_bytes(f, lambda data: b""),
        "its header should take 0 bytes of a 0-byte file"),
    "not safetensors": (
        lambda f: edit_bytes(f, lambda data: b"<html>Not found</html>"),
        "its header should take .* bytes of a 22-byte file"),
    "header is not JSON": (
        lambda f: edit_header(f, lambda text: text.replace('"', "'", 1)),
        "its header is not valid safetensors"),
    "a name twice": (
        lambda f: edit_header(f, lambda text: text.replace("layers.1.router.scale", "layers.0.router.scale")),
        r"found \d+ bytes, expected \d+ for the 142 tensors"),
    "wrong shape": (
        lambda f: edit_weights(f, lambda w: w.update({NORM: np.ones((65,))})),
        r"model.safetensors: model.decoder.norm.weight has shape \(65,\), expected \(64,\) from config.json"),
    "missing tensor": (
        lambda f: edit_weights(f, lambda w: w.pop(NORM)),
        "1 tensors are missing, the first is model.decoder.norm.weight.*fetch the checkpoint again"),
    "unknown tensor": (
        lambda f: edit_weights(f, lambda w: w.update({"model.decoder.surprise": np.ones((1,))})),
        "1 tensors are unknown, the first is model.decoder.surprise"),
    "not a float": (
        lambda f: edit_header(f, lambda text: text.replace('"F32"', '"I32"', 1)),
        "model.decoder.embed_tokens.weight is stored as I32, expected one of BF16, F16, F32"),
    "vision without its configuration": (
        lambda f: edit_weights(f, lambda w: w.update({"model.encoder.vision_tower.std_bias": np.ones((32,))})
                               or edit_config(f, vision_config={"model_type": "gemma4_vision"})),
        "vision_config is not complete .'hidden_size'."),
    "half a vision tower": (
        lambda f: (make_tiny_checkpoint(f, vision=True),
                   edit_weights(f, lambda w: w.pop("model.encoder.vision_tower.std_bias"))),
        "1 tensors are missing, the first is model.encoder.vision_tower.std_bias"),
}
# fmt: on


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_named_and_nothing_is_written(defect, tmp_path):
    damage, message = DEFECTS[defect]
    folder = make_tiny_checkpoint(tmp_path / "tiny")
    damage(folder)
    with pytest.raises(DgemmaError, match=message) as error:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_missing_shard_is_named(tmp_path):
    folder = make_tiny_checkpoint(tmp_path / "tiny", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(DgemmaError, match=r"shard model-00002-of-00003.safetensors is missing \(1 of 3"):
        open_checkpoint(folder)


def test_an_index_that_points_elsewhere_is_named(tmp_path):
    folder = make_tiny_checkpoint(tmp_path / "tiny", shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.decoder.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    write_json(path, index)
    with pytest.raises(DgemmaError, match="embed_tokens.weight should be in model-00002.*found in model-00001"):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    folder = make_tiny_checkpoint(tmp_path / "tiny", shards=2)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00002.safetensors").replace(folder / "copy.safetensors")
    data = (folder / "copy.safetensors").read_bytes()
    (folder / "model-00001-of-00002.safetensors").write_bytes(data)
    with pytest.raises(DgemmaError, match="is stored in copy.safetensors too"):
        open_checkpoint(folder)
