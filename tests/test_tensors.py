"""The one table: it describes the released checkpoint, and docs/tensors.md is its print."""

import json
from pathlib import Path

import pytest

from mlx_dgemma.config import parse_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.tensors import ROLES, check_coverage, is_ignored, markdown, text_tensors, vision_tensors

ROOT = Path(__file__).parent.parent
CONFIG_26B = ROOT / "tests/data/diffusiongemma-26b-config.json"


def test_the_26b_has_1047_tensors_and_its_published_size():
    config = parse_config(json.loads(CONFIG_26B.read_text()))
    text, vision = text_tensors(config), vision_tensors(config)
    assert len(text) + len(vision) == 1047
    # transformers counts 25,823,778,864 parameters; layer scalars and std_bias, std_scale are buffers there.
    buffers = 60 + 2 * 1152
    assert sum(t.size for t in text + vision) == 25_823_778_864 + buffers


def test_names_are_unique_and_roles_known():
    config = parse_config(json.loads(CONFIG_26B.read_text()))
    tensors = text_tensors(config)
    for names in ([t.hf for t in tensors], [t.mlx for t in tensors], [t.gguf for t in tensors]):
        assert len(set(names)) == len(tensors)
    assert {t.role for t in tensors} == set(ROLES) - {"vision"}


def test_docs_are_generated():
    assert (ROOT / "docs/tensors.md").read_text() == markdown(), "run: python -m mlx_dgemma.tensors > docs/tensors.md"


def test_coverage_names_what_is_missing_or_unknown():
    wanted = ["a", "b"]
    check_coverage(["a", "b", "lm_head.weight", "model.encoder.vision_tower.x"], wanted, "folder")
    with pytest.raises(DgemmaError, match="folder: 1 tensors are missing, the first is b"):
        check_coverage(["a"], wanted, "folder")
    with pytest.raises(DgemmaError, match="1 tensors are unknown, the first is stray"):
        check_coverage(["a", "b", "stray"], wanted, "folder")


def test_tied_copies_are_ignored_but_encoder_scalars_are_not():
    assert is_ignored("lm_head.weight")
    assert is_ignored("model.encoder.language_model.layers.0.mlp.up_proj.weight")
    assert is_ignored("model.decoder.rotary_emb.full_attention_inv_freq")
    assert not is_ignored("model.encoder.language_model.layers.0.layer_scalar")
