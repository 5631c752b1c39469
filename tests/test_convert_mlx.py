"""The MLX folder: read back with MLX's own reader and compared with MLX's own quantization of whole tensors."""

import json

import mlx.core as mx
import numpy as np
import pytest

import convert.to_mlx
import convert.verify
import convert.work
from convert import Planned, Worked
from convert import convert as run
from convert.checkpoint import open_checkpoint
from convert.recipes import find_recipe
from convert.recipes_mlx import PRECISIONS, RECIPES
from convert.verify import E2M1, E4M3, E8M0, dequantize
from mlx_dgemma.config import parse_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.tensors import text_tensors
from tests.tiny import make_tiny_checkpoint, tiny_config, tiny_weights, write_json, write_weights


def load(folder):
    arrays = {}
    for file in sorted(folder.glob("*.safetensors")):
        arrays |= mx.load(str(file))
    return arrays


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bool(mx.array_equal(a, b, equal_nan=True))


def want_arrays(source, config, recipe):
    """What the folder should hold, made from whole tensors: the slow way, with all of the model in memory."""
    want = {}
    for t in text_tensors(config):
        array, precision = source[t.hf], find_recipe(recipe).precision(t)
        if precision.is_quantized:
            settings = {"group_size": precision.group_size, "bits": precision.bits, "mode": precision.mode}
            parts = mx.quantize(array, **settings)
            names = (t.mlx, *(t.mlx.replace(".weight", part) for part in (".scales", ".biases")))
            want |= dict(zip(names, parts, strict=False))
        else:
            to = {"F32": mx.float32, "BF16": mx.bfloat16, "": array.dtype}[precision.dtype]
            want[t.mlx] = array.astype(to)
    return want


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_equals_mlx_on_whole_tensors(tmp_path, monkeypatch, recipe, dtype):
    source = make_tiny_checkpoint(tmp_path / "source", dtype=dtype, shards=2)
    monkeypatch.setattr(convert.work, "PIECE", 1000)  # pieces of a few rows, so that their joints are tested
    report = run(source, tmp_path / "out", recipe=recipe, verify=True)
    found = load(tmp_path / "out")
    want = want_arrays(load(source), parse_config(tiny_config()), recipe)
    assert set(found) == set(want)
    assert [name for name in want if not same_bits(found[name], want[name])] == []
    assert report.plan.total_bytes == sum(array.nbytes for array in found.values())
    kept = {e.role: e.relative_rms for e in report.errors}
    if recipe == "fp32" or recipe == dtype.replace("bfloat", "bf"):
        assert set(kept.values()) == {0.0}
    elif recipe != "bf16":
        assert kept["norm"] == kept["scalar"] == 0 < kept["expert"] < 0.2


def test_a_process_that_converts_often_keeps_its_number_of_streams(tiny, tmp_path):
    """MLX never ends a stream's thread."""
    for i in range(3):
        run(tiny, tmp_path / str(i), recipe="q4")
    assert 0 < len(convert.to_mlx._free_streams) <= convert.work.cores() + convert.work.WAITING


def test_the_plan_made_from_config_json_alone_is_what_gets_written(tiny, tmp_path):
    before = run(tiny, recipe="q4", dry_run=True).plan
    after = run(tiny, tmp_path / "out", recipe="q4").plan
    assert before == after


def test_config_carries_both_blocks_and_the_released_spelling(tmp_path):
    source = make_tiny_checkpoint(tmp_path / "source", spelling="per_layer", dtype="bfloat16")
    run(source, tmp_path / "out", recipe="mxfp4")
    config = json.loads((tmp_path / "out/config.json").read_text())
    text = config["text_config"]
    assert (text["global_head_dim"], text["num_global_key_value_heads"]) == (32, 1)
    assert "per_layer_config" not in text
    assert config["dtype"] == text["dtype"] == "bfloat16"
    assert config["quantization"] == config["quantization_config"]
    assert {key: config["quantization"][key] for key in ("group_size", "bits", "mode")} == {
        "group_size": 32,
        "bits": 4,
        "mode": "mxfp4",
    }
    assert parse_config(config) == parse_config(json.loads((source / "config.json").read_text()))


def test_float_recipes_have_no_quantization_block_and_name_their_dtype(tiny, tmp_path):
    run(tiny, tmp_path / "out", recipe="bf16")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert not {"quantization", "quantization_config"} & set(config)
    assert config["dtype"] == "bfloat16"


def test_shards_and_index(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(convert.api, "make_plan", lambda *args, **kept: PLAN(*args, shard_bytes=200_000, **kept))
    report = run(tiny, tmp_path / "out", recipe="q8", verify=True)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    n = len(report.plan.shards)
    assert n > 3
    assert files == [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.plan.total_bytes
    for file in files:
        arrays, metadata = mx.load(str(tmp_path / "out" / file), return_metadata=True)
        assert metadata == {"format": "mlx"}
        assert set(arrays) == {name for name, where in index["weight_map"].items() if where == file}


PLAN = convert.api.make_plan


def test_tokenizer_template_and_readme_are_carried_along(tmp_path):
    source = make_tiny_checkpoint(tmp_path / "source")
    (source / "README.md").write_text("about")
    (source / "tokenizer.model").write_bytes(b"\0\1")
    (source / "optimizer.pt").write_bytes(b"not this")
    run(source, tmp_path / "out")
    carried = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in [*carried, "README.md", "tokenizer.model"]:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out/optimizer.pt").exists()


def test_vision_is_carried_bit_by_bit(tmp_path):
    source = make_tiny_checkpoint(tmp_path / "source", vision=True)
    run(source, tmp_path / "out", recipe="bf16", verify=True)
    before, after = load(source), load(tmp_path / "out")
    vision = [name for name in before if "vision" in name]
    assert len(vision) == 31
    assert all(same_bits(after[name], before[name]) for name in vision)
    assert json.loads((tmp_path / "out/config.json").read_text())["vision_config"]["hidden_size"] == 32


def test_a_vision_configuration_without_its_weights_is_dropped(tmp_path):
    source = make_tiny_checkpoint(tmp_path / "source")
    write_json(source / "config.json", tiny_config(vision=True))
    run(source, tmp_path / "out", verify=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["vision_config"] is None


@pytest.mark.parametrize(("expert_width", "name"), [(96, "q4-g32"), (72, "fp32")])
def test_rows_that_do_not_fit_are_written_as_planned(tmp_path, expert_width, name):
    source = make_tiny_checkpoint(tmp_path / "source", moe_intermediate_size=expert_width, num_hidden_layers=6)
    report = run(source, tmp_path / "out", verify=True)
    assert name in {row.precision for row in report.plan.by_role() if row.role == "expert"}
    assert ("model.decoder.layers.0.experts.down_proj.scales" in load(tmp_path / "out")) == (name == "q4-g32")


def test_events_add_up_to_the_plan(tiny, tmp_path):
    events = []
    report = run(tiny, tmp_path / "out", verify=True, on_event=events.append)
    assert isinstance(events[0], Planned)
    done = {phase: sum(e.bytes for e in events[1:] if e.phase == phase) for phase in ("convert", "verify")}
    words = sum(t.arrays[0].nbytes for t in report.plan.tensors)
    assert done == {"convert": report.plan.total_bytes, "verify": words}
    assert all(isinstance(e, Worked) for e in events[1:])


# Verification


@pytest.mark.parametrize("name", [name for name, p in PRECISIONS.items() if p.is_quantized])
def test_our_dequantize_equals_mlx(name):
    p = PRECISIONS[name]
    settings = {"group_size": p.group_size, "bits": p.bits, "mode": p.mode}
    weights = mx.array(np.random.default_rng(0).normal(size=(6, 256)).astype(np.float32))
    words, scales, *biases = mx.quantize(weights, **settings)
    want = mx.dequantize(words, scales, *biases, **settings, dtype=mx.float32)
    found = dequantize(np.array(words), np.array(scales), np.array(biases[0]) if biases else None, settings)
    assert np.abs(found - np.array(want)).max() < 1e-6


def test_small_floats_by_eye():
    assert E2M1[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert E2M1[8:].tolist() == [-0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert E4M3[[0x01, 0x08, 0x38, 0x7E, 0xB8]].tolist() == [2**-9, 2**-6, 1, 448, -1]
    assert E8M0[[0, 127, 254]].tolist() == [2**-127, 1, 2**127]


def spoil_scales(pieces):
    words, scales, *biases = pieces
    return (words, scales[:, ::-1].copy(), *biases) if len(scales[0]) > 1 else (words[::-1].copy(), scales, *biases)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_scales, "has a relative error of"),
        (lambda pieces: (pieces[0], pieces[1] * np.float32(np.nan), *pieces[2:]), "is not finite"),
    ],
)
def test_verification_finds_a_spoiled_tensor_and_keeps_nothing(tiny, tmp_path, monkeypatch, spoil, message):
    quantize = convert.to_mlx.quantize
    monkeypatch.setattr(convert.to_mlx, "quantize", lambda *args: spoil(quantize(*args)))
    with pytest.raises(DgemmaError, match=f"verification failed: .*{message}"):
        run(tiny, tmp_path / "out", recipe="q8", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_verification_names_a_source_that_is_not_finite(tmp_path):
    source = make_tiny_checkpoint(tmp_path / "source")
    weights = tiny_weights(tiny_config())
    weights["model.decoder.norm.weight"][3] = np.inf
    write_weights(source, weights)
    with pytest.raises(DgemmaError, match="source/model.safetensors: model.decoder.norm.weight holds infinity or NaN"):
        run(source, tmp_path / "out", verify=True)


def test_verification_finds_a_changed_copy(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(convert.to_mlx, "cast", lambda array, *_: array * np.float32(1.001))
    with pytest.raises(DgemmaError, match=r"norm.weight differs from the source by .*, expected a copy"):
        run(tiny, tmp_path / "out", recipe="q8", verify=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("model.decoder.norm.weight"), "missing, the first is model.decoder.norm.weight"),
        (lambda arrays: arrays.pop("model.decoder.embed_tokens.biases"), "missing, the first is .*embed_tokens.biases"),
        (lambda arrays: arrays.update(surprise=mx.zeros((1,))), "unknown, the first is surprise"),
        (lambda arrays: arrays.update({"model.decoder.embed_tokens.scales": mx.zeros((384, 2))}), "has shape .384, 2."),
    ],
)
def test_verification_covers_every_tensor(tiny, tmp_path, change, message):
    run(tiny, tmp_path / "out", recipe="q4")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    arrays = mx.load(str(file))
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(str(file), arrays)
    with pytest.raises(DgemmaError, match=message):
        convert.verify.verify_folder(open_checkpoint(tiny), tmp_path / "out", lambda *_: None)


def test_verification_asks_the_safetensors_library_too(tiny, tmp_path, monkeypatch):
    run(tiny, tmp_path / "out", recipe="fp32")
    opened = []
    safe_open = convert.verify.safetensors.safe_open
    monkeypatch.setattr(
        convert.verify.safetensors, "safe_open", lambda file, *kind: opened.append(file) or safe_open(file, *kind)
    )
    convert.verify.verify_folder(open_checkpoint(tiny), tmp_path / "out", lambda *_: None)
    assert [file.name for file in opened] == ["model-00001-of-00001.safetensors"]


def test_verification_finds_blocks_that_disagree(tiny, tmp_path, monkeypatch):
    config = convert.to_mlx.output_config
    monkeypatch.setattr(
        convert.to_mlx, "output_config", lambda *args: config(*args) | {"quantization_config": {"bits": 4}}
    )
    with pytest.raises(DgemmaError, match="quantization and quantization_config differ"):
        run(tiny, tmp_path / "out", verify=True)
