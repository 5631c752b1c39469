"""A GGUF straight into MLX: the same logits as its dequantized weights, and one clear error for what is wrong."""

import json

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from convert import convert
from convert.recipes_gguf import RECIPES
from mlx_dgemma import gguf_weights, loading
from mlx_dgemma.__main__ import main
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.hub import model_path
from tests.tiny import make_tiny_checkpoint
from tests.tiny_gguf import make_tiny_gguf


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Rows of 256, for K-quants."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return make_tiny_checkpoint(folder, dtype="bfloat16", hidden_size=256, head_dim=64, global_head_dim=64, **layers)


def logits(path, **options):
    """Of a canvas after a prompt, self-conditioned. (C, V)"""
    model, _ = mlx_dgemma.load(path, **options)
    cache = model.make_cache()
    model.encode(mx.arange(20)[None] + 200, cache)
    canvas = mx.arange(16)[None] + 107
    return np.array(model.denoise(canvas, cache, model.denoise(canvas, cache)))[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_packed_weights_give_the_logits_of_their_values(wide, tmp_path, recipe):
    """Three ways to the same numbers: packed on MLX, dequantized when loaded, and through a float32 folder."""
    convert(wide, tmp_path / "x.gguf", to="gguf", recipe=recipe)
    convert(tmp_path / "x.gguf", tmp_path / "float", to="mlx", recipe="fp32")
    packed, floats = logits(tmp_path / "x.gguf"), logits(tmp_path / "x.gguf", dequantize=True)
    assert np.array_equal(floats, logits(tmp_path / "float"))
    np.testing.assert_allclose(packed, floats, atol=1e-4)
    assert (packed.argmax(-1) == floats.argmax(-1)).all()
    if recipe == "BF16":
        assert np.array_equal(floats, logits(wide))


def test_split_experts_are_joined(tmp_path):
    fused = make_tiny_gguf(tmp_path / "fused.gguf", "Q8_0")
    split = make_tiny_gguf(tmp_path / "split.gguf", "Q8_0", split_experts=True)
    assert np.array_equal(logits(fused), logits(split))


def test_tokenizer_template_and_settings_come_from_the_file(wide, tmp_path):
    convert(wide, tmp_path / "x.gguf", to="gguf", recipe="Q8_0")
    (tmp_path / "alone").mkdir()
    (tmp_path / "x.gguf").rename(tmp_path / "alone/x.gguf")
    model, tokenizer = mlx_dgemma.load(tmp_path / "alone/x.gguf")
    original, theirs = mlx_dgemma.load(wide)
    messages = [{"role": "user", "content": "a b ab"}]
    assert tokenizer.chat(messages) == theirs.chat(messages)
    assert model.generation_config == original.generation_config.replace(max_new_tokens=256)


def test_generate_takes_a_file(tiny, tmp_path, capsys, monkeypatch):
    convert(tiny, tmp_path / "x.gguf", to="gguf", recipe="F32")
    texts = []
    for model in (tiny, tmp_path / "x.gguf", tmp_path):  # and the folder that holds only this file
        arguments = ["--model", str(model), "--prompt", "ab", "--json", "--max-tokens", "32"]
        monkeypatch.setattr("sys.argv", ["generate", *arguments])
        assert main() == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1] == texts[2]


def test_weights_that_grow_are_said_once(wide, tmp_path, capsys, monkeypatch):
    convert(wide, tmp_path / "x.gguf", to="gguf", recipe="Q3_K_M")
    arguments = ["--model", str(tmp_path / "x.gguf"), "--prompt", "ab", "--max-tokens", "16"]
    monkeypatch.setattr("sys.argv", ["generate", *arguments])
    assert main() == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == 1
    assert "MLX has no such form" in notes[0] and "python -m convert" in notes[0]


def test_weights_that_cannot_fit_are_refused_before_they_are_read(wide, tmp_path, monkeypatch):
    convert(wide, tmp_path / "x.gguf", to="gguf", recipe="Q3_K_M")
    monkeypatch.setattr(loading, "device_memory", lambda: 1_000_000)
    monkeypatch.setattr(gguf_weights.GgufSource, "weights", None)
    with pytest.raises(
        DgemmaError, match=r"this device has 1.00 MB, expected .* \(weights .*; see `python -m convert fit"
    ):
        mlx_dgemma.load(tmp_path / "x.gguf")


# Finding the file


def test_a_folder_of_several_files_names_them(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(DgemmaError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\); name one, as .*/a.gguf"):
        model_path(tmp_path)


def test_one_file_of_a_hub_repo(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(tmp_path / f"{repo}-{file}"))
    assert model_path("owner/name/x-Q4_K_M.gguf") == tmp_path / "owner/name-x-Q4_K_M.gguf"


def test_a_file_in_a_subfolder_of_a_hub_repo(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(tmp_path / repo / file))
    assert model_path("owner/name/Q8_0/x.gguf") == tmp_path / "owner/name/Q8_0/x.gguf"


def test_a_vision_projector_is_no_model(tmp_path):
    for name in ("model.gguf", "mmproj-model.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert model_path(tmp_path) == tmp_path / "model.gguf"


def test_an_unknown_dtype_is_refused(tmp_path):
    path = make_tiny_gguf(tmp_path / "x.gguf")
    with pytest.raises(DgemmaError, match="dtype is .*int8, expected float32, bfloat16 or float16"):
        mlx_dgemma.load(path, dtype=mx.int8)


def test_a_hub_repo_of_gguf_files_names_them(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: str(tmp_path))
    names = ["README.md", "x-Q4_K_M.gguf", "x-Q8_0.gguf"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo: names)
    with pytest.raises(DgemmaError, match=r"owner/name: holds 2 GGUF files .* as owner/name/x-Q4_K_M.gguf"):
        model_path("owner/name")


def test_what_is_no_gguf_is_said(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    with pytest.raises(DgemmaError, match="x.gguf: .*expected b'GGUF'"):
        mlx_dgemma.load(tmp_path / "x.gguf")
    with pytest.raises(DgemmaError, match="no such folder or file; expected a model folder, a GGUF file"):
        mlx_dgemma.load(tmp_path / "absent.gguf")
