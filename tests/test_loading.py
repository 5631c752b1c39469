"""Loading a folder: what works, and one clear error for each thing that can be wrong with it."""

import json
import re
import shutil
import socket

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.hub import model_path
from tests.tiny import make_tiny_checkpoint, tiny_config, tiny_weights, write_json, write_safetensors


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def logits(folder, **options):
    model, _ = mlx_dgemma.load(folder, **options)
    cache = model.make_cache()
    model.encode(mx.arange(20)[None] + 200, cache)
    return np.array(model.denoise(mx.arange(16)[None] + 107, cache))


def fails(folder, message):
    with pytest.raises(DgemmaError, match=message) as caught:
        mlx_dgemma.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"shards": 3}, {"spelling": "per_layer"}, {"vision": True}])
def test_layouts_of_one_checkpoint_load_alike(tiny, tmp_path, options):
    other = make_tiny_checkpoint(tmp_path / "other", **options)
    assert (logits(other) == logits(tiny)).all()


def test_bfloat16_weights_load_exactly(tmp_path):
    folder = make_tiny_checkpoint(tmp_path / "bf16", dtype="bfloat16")
    model, _ = mlx_dgemma.load(folder)
    stored = mx.load(str(folder / "model.safetensors"))["model.decoder.norm.weight"]
    assert stored.dtype == mx.bfloat16 and model.dtype == mx.float32
    assert mx.array_equal(model.model.decoder.norm.weight, stored.astype(mx.float32))


def test_tied_copies_and_sidecars_are_skipped(tiny, copy):
    weights = tiny_weights(tiny_config())
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    weights["model.encoder.language_model.norm.weight"] = weights["model.decoder.norm.weight"]
    write_safetensors(copy / "model.safetensors", weights)
    # mlx-optiq's vision tower, under names without a prefix
    write_safetensors(copy / "optiq_vision.safetensors", {"patch_embedder.input_proj.weight": np.zeros((4, 4))})
    assert (logits(copy) == logits(tiny)).all()


def test_half_precision_activations_stay_close(tiny):
    assert np.abs(logits(tiny) - logits(tiny, dtype=mx.float16)).max() < 0.2


def test_a_missing_shard_is_named(tmp_path):
    folder = make_tiny_checkpoint(tmp_path / "sharded", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    fails(folder, r"model-00002-of-00003.safetensors.* missing.*again")


def test_no_weights_at_all(copy):
    (copy / "model.safetensors").unlink()
    fails(copy, "no .safetensors file")


@pytest.mark.parametrize("keep", [4, 100, 50_000, -1])
def test_a_truncated_file_is_named(copy, keep):
    path = copy / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    fails(copy, r"model.safetensors: .*again")


def test_a_corrupt_header_is_named(copy):
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"!!!!"
    path.write_bytes(data)
    fails(copy, r"model.safetensors: .*header.*again")


def test_a_wrong_shape_is_named(copy):
    weights = tiny_weights(tiny_config())
    name = "model.decoder.layers.3.mlp.up_proj.weight"
    weights[name] = weights[name][:-1]
    write_safetensors(copy / "model.safetensors", weights)
    fails(copy, rf"{name} has shape \(191, 64\), expected \(192, 64\)")


def test_missing_and_unknown_tensors_are_named(copy):
    weights = tiny_weights(tiny_config())
    norm = weights.pop("model.decoder.norm.weight")
    write_safetensors(copy / "model.safetensors", weights)
    fails(copy, "1 tensors are missing, the first is model.decoder.norm.weight")
    write_safetensors(copy / "model.safetensors", {**weights, "model.decoder.norm.weight": norm, "stray": norm})
    fails(copy, "1 tensors are unknown, the first is stray")


def test_a_type_that_is_no_float_is_named(copy):
    path = copy / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.decoder.norm.weight"]["dtype"] = "I32"
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    fails(copy, "model.decoder.norm.weight is stored as I32, expected BF16, F16, F32 or an MLX quantization")


def test_another_model_is_sent_to_its_tool(copy):
    write_json(copy / "config.json", {**tiny_config(), "model_type": "gemma4"})
    fails(copy, 'model_type is "gemma4", expected "diffusion_gemma".*mlx_lm.generate')


def test_a_tokenizer_of_another_model_is_refused(copy):
    raw = json.loads((copy / "tokenizer.json").read_text())
    raw["model"]["vocab"]["extra"] = 384
    write_json(copy / "tokenizer.json", raw)
    fails(copy, "the tokenizer has 385 tokens and the model 384")
    (copy / "tokenizer.json").write_text("{}")
    fails(copy, "tokenizer.json: not a tokenizer")
    (copy / "tokenizer.json").unlink()
    fails(copy, "no tokenizer.json and no tokenizer.model")


def test_paths_that_are_no_model(tmp_path, monkeypatch):
    fails(tmp_path / "nowhere", "nowhere: no such folder")
    (tmp_path / "file").write_text("x")
    fails(tmp_path / "file", "expected a GGUF file")
    import huggingface_hub.constants  # noqa: F401  before the variable is set: it is read once, for all that follow

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("some-owner/no-such-model", "some-owner/no-such-model: .*HF_HUB_OFFLINE")


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (socket.gaierror(-3, "Temporary failure in name resolution"), "its name is not found: no network?"),
        (ConnectionRefusedError(111, "Connection refused"), "connection refused"),
        (TimeoutError("timed out"), "no answer in time"),
        (RuntimeError("no such words"), "RuntimeError"),
    ],
)
def test_an_unreachable_hub_says_why(monkeypatch, cause, words):
    """Wrapped, as the HTTP library does."""
    import huggingface_hub

    def download(*_, **__):
        try:
            raise cause
        except Exception as error:
            raise OSError("wrapped") from error

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DgemmaError, match=f"owner/name: .* the hub cannot be reached .{re.escape(words)}.; connect"):
        model_path("owner/name")
