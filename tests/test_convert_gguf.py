"""The GGUF door: written files read with llama.cpp's own reader, tensor bytes compared with ggml's, and back again."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest

import convert.api
import convert.to_gguf
import convert.work
from convert import convert as run
from convert.checkpoint import open_checkpoint
from convert.cli import main
from convert.imatrix import Entry, Imatrix, write_imatrix
from convert.recipes_gguf import RECIPES
from gguf_export.ggml import need_ggml
from mlx_dgemma.config import read_config, read_generation_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.model import open_gguf
from mlx_dgemma.gguf.types import FLOATS, TYPES
from mlx_dgemma.tensors import text_tensors
from tests.tiny import make_tiny_checkpoint, tiny_config, tiny_weights, write_json, write_weights
from tests.tiny_gguf import make_tiny_gguf

DEMO = "demo/checkpoint"
# Rows of 256 and of 64, so that K-quants are met and so are their fallbacks.
WIDE = {"hidden_size": 256, "num_hidden_layers": 2, "head_dim": 64, "global_head_dim": 64}
WIDE["layer_types"] = ["sliding_attention", "full_attention"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("wide") / "wide", dtype="bfloat16", shards=2, **WIDE)


def read_all(path):
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def ggml_rows(values, name, importance=None):
    """One call of ggml for a whole matrix."""
    kind = TYPES[name]
    rows, row = values.shape
    if name in FLOATS:
        return gguf.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(rows, -1)
    out = np.empty((rows, kind.row_bytes(row)), np.uint8)
    pointer = None if importance is None else importance.ctypes.data
    need_ggml(name).ggml_quantize_chunk(kind.number, values.ctypes.data, out.ctypes.data, 0, rows, row, pointer)
    return out


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_ggmls_bytes(wide, tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(convert.work, "PIECE", 10_000)  # pieces of a few rows, so that their joints are tested
    report = run(wide, tmp_path / "x.gguf", to="gguf", recipe=recipe, verify=True)
    found, checkpoint = read_all(tmp_path / "x.gguf"), open_checkpoint(wide)
    assert len(found) == report.plan.tensor_count == 1 + len(report.plan.tensors)
    for t in report.plan.tensors:
        theirs = found[t.tensor.gguf]
        assert theirs.tensor_type.name == t.type.name
        assert tuple(reversed(theirs.shape.tolist())) == t.tensor.shape
        values = checkpoint.values(t.tensor)[:]
        assert theirs.data.tobytes() == ggml_rows(values, t.type.name).tobytes(), t.tensor.gguf
    kept = {e.role: e.relative_rms for e in report.errors}
    assert kept["norm"] == kept["scalar"] == kept["router"] == 0
    assert report.plan.total_bytes == sum(int(t.n_bytes) for t in found.values())
    if recipe in ("F32", "BF16"):
        assert set(kept.values()) == {0.0}


def test_the_file_describes_the_checkpoint(wide, tmp_path):
    run(wide, tmp_path / "x.gguf", to="gguf", recipe="Q4_K_M")
    model = open_gguf(tmp_path / "x.gguf")
    assert model.config == read_config(wide)
    assert model.generation == read_generation_config(wide).replace(max_new_tokens=256)  # no key for it
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "diffusion-gemma"
    assert fields["general.name"] == "wide"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert fields["diffusion.canvas_length"] == 16
    assert sum(name.startswith("diffusion.eb_") for name in fields) == 6
    assert fields["tokenizer.ggml.model"] == "gemma4"
    names = [t.name for t in reader.tensors]
    assert names[:2] == ["token_embd.weight", "rope_freqs.weight"]
    assert "output.weight" not in names
    assert all(t.data_offset % 32 == 0 for t in reader.tensors)


def test_ggmls_own_reader_accepts_the_file(wide, tmp_path):
    """gguf_init_from_file, what llama.cpp opens a model with."""

    run(wide, tmp_path / "x.gguf", to="gguf", recipe="Q4_K_M")
    code = (
        "import ctypes, sys\n"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "class Parameters(ctypes.Structure):\n"
        "    _fields_ = [('no_alloc', ctypes.c_bool), ('context', ctypes.c_void_p)]\n"
        "library.gguf_init_from_file.restype = ctypes.c_void_p\n"
        "library.gguf_init_from_file.argtypes = [ctypes.c_char_p, Parameters]\n"
        "opened = library.gguf_init_from_file(sys.argv[2].encode(), Parameters(True, None))\n"
        "library.gguf_get_n_tensors.restype = ctypes.c_int64\n"
        "library.gguf_get_n_tensors.argtypes = [ctypes.c_void_p]\n"
        "print(library.gguf_get_n_tensors(opened) if opened else 'refused')\n"
    )
    command = [sys.executable, "-c", code, str(need_ggml("test").file), str(tmp_path / "x.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(len(text_tensors(read_config(wide))) + 1)


def test_vision_stays_outside(tmp_path):
    source = make_tiny_checkpoint(tmp_path / "source", vision=True)
    run(source, tmp_path / "x.gguf", to="gguf", recipe="Q8_0", verify=True)
    assert not [name for name in read_all(tmp_path / "x.gguf") if "vision" in name or name.startswith("v.")]


# The importance matrix


def imatrix_for(config, path=None, leave_out=()):
    draw = np.random.default_rng(0)
    entries = {}
    for t in text_tensors(config):
        if len(t.shape) > 1 and t.role not in ("embedding", "router") and t.gguf_part not in leave_out:
            experts = t.shape[0] if len(t.shape) == 3 else 1
            counts = draw.integers(1, 9, experts).astype(np.float32)
            sums = (draw.random((experts, t.shape[-1])) ** 4 * counts[:, None]).astype(np.float32)
            entries[t.gguf] = Entry(sums, counts)
    imatrix = Imatrix(path, entries, ("some.txt",), 3, 16)
    if path:
        write_imatrix(imatrix, path)
    return imatrix


@pytest.mark.parametrize("recipe", ["Q4_K_M", "Q3_K_M", "Q4_0", "IQ4_XS"])
def test_every_expert_is_quantized_with_its_own_importance(wide, tmp_path, recipe):
    imatrix = imatrix_for(read_config(wide), tmp_path / "i.gguf")
    report = run(wide, tmp_path / "x.gguf", to="gguf", recipe=recipe, imatrix=tmp_path / "i.gguf", verify=True)
    found, checkpoint = read_all(tmp_path / "x.gguf"), open_checkpoint(wide)
    for t in report.plan.tensors:
        if t.tensor.role != "expert":
            continue
        weights = imatrix.weights(t.tensor.gguf, t.tensor.shape[0], t.tensor.shape[-1])
        values = checkpoint.values(t.tensor)[:].reshape(t.tensor.shape)
        want = [ggml_rows(v, t.type.name, w) for v, w in zip(values, weights, strict=True)]
        assert found[t.tensor.gguf].data.tobytes() == np.concatenate(want).tobytes()
    plain = run(wide, tmp_path / "y.gguf", to="gguf", recipe=recipe)
    assert read_all(tmp_path / "y.gguf")["blk.0.attn_q.weight"].data.tobytes() != (
        found["blk.0.attn_q.weight"].data.tobytes()
    )
    assert not [note for note in (*report.notes, *plain.notes) if "importance" in note]


def test_tensors_without_importance_are_said(wide, tmp_path):
    imatrix_for(read_config(wide), tmp_path / "i.gguf", leave_out=("attn_q",))
    report = run(wide, None, to="gguf", recipe="Q4_K_M", imatrix=tmp_path / "i.gguf", dry_run=True)
    (note,) = [note for note in report.notes if "importance" in note]
    assert note.startswith("the importance matrix says nothing of 2 of ")
    assert "(blk.0.attn_q.weight, …), quantized without it" in note


def test_an_importance_matrix_of_another_model_is_refused(wide, tmp_path):
    imatrix_for(read_config(make_tiny_checkpoint(tmp_path / "other")), tmp_path / "i.gguf")
    with pytest.raises(DgemmaError, match=r"importance for \(1, 64\) .* expected \(1, 256\); .* another model"):
        run(wide, tmp_path / "x.gguf", to="gguf", imatrix=tmp_path / "i.gguf")
    with pytest.raises(DgemmaError, match="an importance matrix is for GGUF files, found --to mlx"):
        run(wide, tmp_path / "x", imatrix=tmp_path / "i.gguf")


# GGUF as the source


@pytest.mark.parametrize("recipe", ["F32", "BF16", "Q8_0", "Q4_K_M", "Q3_K_M", "IQ4_XS", "MXFP4"])
def test_the_same_recipe_again_copies_every_tensor(wide, tmp_path, recipe):
    run(wide, tmp_path / "x.gguf", to="gguf", recipe=recipe)
    again = run(tmp_path / "x.gguf", tmp_path / "y.gguf", to="gguf", recipe=recipe, verify=True)
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
    said = [note for note in again.notes if "already quantized" in note]
    assert len(said) == (recipe not in FLOATS)


def test_float_gguf_to_mlx_is_the_checkpoint_to_mlx(wide, tmp_path):
    """A bfloat16 checkpoint, through a GGUF that loses nothing, gives the same folder."""
    run(wide, tmp_path / "x.gguf", to="gguf", recipe="BF16")
    for recipe in ("q4", "mxfp4", "bf16"):
        run(wide, tmp_path / f"{recipe}-a", recipe=recipe)
        run(tmp_path / "x.gguf", tmp_path / f"{recipe}-b", recipe=recipe, verify=True)
        files = {p.name: p.read_bytes() for p in (tmp_path / f"{recipe}-a").glob("*.safetensors")}
        assert files == {p.name: p.read_bytes() for p in (tmp_path / f"{recipe}-b").glob("*.safetensors")}
    a, b = (json.loads((tmp_path / f"q4-{x}/config.json").read_text()) for x in "ab")
    assert a["quantization"] == b["quantization"]
    assert read_config(tmp_path / "q4-a") == read_config(tmp_path / "q4-b")
    assert read_generation_config(tmp_path / "q4-b") == read_generation_config(wide).replace(max_new_tokens=256)


def test_a_float32_checkpoint_stays_float32(tiny, tmp_path):
    run(tiny, tmp_path / "x.gguf", to="gguf", recipe="F32")
    run(tiny, tmp_path / "a", recipe="q8")
    run(tmp_path / "x.gguf", tmp_path / "b", recipe="q8")
    files = [(tmp_path / x / "model-00001-of-00001.safetensors").read_bytes() for x in "ab"]
    assert files[0] == files[1]


def test_published_files_may_split_experts_and_lack_sampler_keys(tmp_path):
    left_out = {f"diffusion.eb_{key}": None for key in ("max_steps", "t_min", "t_max", "entropy_bound")}
    source = make_tiny_gguf(tmp_path / "x.gguf", "Q8_0", dtype="bfloat16", split_experts=True, keys=left_out)
    report = run(source, tmp_path / "y.gguf", to="gguf", recipe="Q8_0", verify=True)
    assert [n for n in report.notes if n.startswith("the source lacks diffusion.eb_max_steps, diffusion.eb_t_min")]
    model, written = open_gguf(source), open_gguf(tmp_path / "y.gguf")
    for t in text_tensors(model.config):
        assert np.array_equal(model.rows(t), written.rows(t)), t.gguf
    assert "blk.0.ffn_gate_up_exps.weight" in written.file.tensors
    assert written.generation.max_denoising_steps == 48


# What a user sees


@pytest.fixture
def error_line(capsys):
    def one(*arguments):
        assert main([str(a) for a in arguments]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = [line for line in err.splitlines() if line.startswith("error:")]
        return line

    return one


def test_out_decides_the_target(tiny, tmp_path, capsys):
    assert main([str(tiny), str(tmp_path / "x.gguf"), "--recipe", "Q8_0", "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["types"] == {"F32": 87, "Q8_0": 57}
    assert [row["role"] for row in found["verify"]][:2] == ["embedding", "attention"]
    with pytest.raises(SystemExit) as usage:
        main([str(tiny), str(tmp_path / "y.gguf"), "--to", "mlx"])
    assert usage.value.code == 2


def test_a_dry_run_needs_config_json_alone(capsys):
    path = "tests/data/diffusiongemma-26b-config.json"
    assert main([path, "--to", "gguf", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["types"] == {"F32": 423, "Q4_K": 194, "Q5_0": 33, "Q8_0": 28, "Q6_K": 14}
    assert round(found["bytes"] / 2**20) == 16_013
    assert main([path, "--to", "gguf", "--recipe", "Q3_K_M", "--dry-run"]) == 0
    assert "tensors with rows of 2112: no whole number of" in capsys.readouterr().out


def test_nothing_is_left_behind(tiny, tmp_path, error_line, monkeypatch):
    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.work._File, "write", broken)
    assert "x.gguf: the disk is full" in error_line(tiny, tmp_path / "x.gguf", "--recipe", "Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept(tiny, tmp_path, error_line):
    (tmp_path / "x.gguf").write_text("mine")
    assert "x.gguf: already exists" in error_line(tiny, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_text() == "mine"


def test_what_a_killed_run_left_is_replaced(tiny, tmp_path):
    (tmp_path / "x.gguf.partial").write_text("half")
    run(tiny, tmp_path / "x.gguf", to="gguf", recipe="Q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
@pytest.mark.parametrize("recipe", ["Q4_K_M", "IQ4_XS", "Q8_0", "F16"])
def test_weights_that_would_stop_ggml_are_named(tmp_path, error_line, value, recipe):
    """ggml aborts the process on such values."""
    source = make_tiny_checkpoint(tmp_path / "source")
    weights = tiny_weights(tiny_config())
    weights["model.decoder.layers.2.mlp.up_proj.weight"][3, 5] = value
    write_weights(source, weights)
    line = error_line(source, tmp_path / "x.gguf", "--recipe", recipe)
    assert "model.decoder.layers.2.mlp.up_proj.weight holds" in line
    assert ("infinity or NaN" in line) or "--tensor-type ffn_up=BF16" in line


def test_a_missing_ggml_is_known_before_the_start(tiny, tmp_path, error_line, monkeypatch):
    import gguf_export.ggml
    import gguf_export.quantize

    for module in (gguf_export.ggml, gguf_export.quantize):
        monkeypatch.setattr(module, "find_ggml", lambda: None)
    assert "only ggml can quantize to this" in error_line(tiny, tmp_path / "x.gguf", "--recipe", "IQ4_NL")
    assert main([str(tiny), str(tmp_path / "x.gguf"), "--recipe", "Q8_0"]) == 0


def test_a_recipe_file_and_changes_on_the_command_line(tiny, tmp_path, capsys):
    write_json(tmp_path / "r.json", {"roles": {"expert": "q4-g32"}})
    change = ["--tensor-type", "ffn_down_exps=Q5_0", "--tensor-type", "attention=F16"]
    out = str(tmp_path / "x.gguf")
    assert main([str(tiny), out, "--recipe", str(tmp_path / "r.json"), *change, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["types"] == {"F32": 87, "F16": 23, "Q8_0": 22, "Q4_1": 6, "Q5_0": 6}
    found = {name: t.tensor_type.name for name, t in read_all(out).items()}
    assert (found["blk.3.ffn_down_exps.weight"], found["blk.3.ffn_gate_up_exps.weight"]) == ("Q5_0", "Q4_1")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_demo_in_every_recipe(tmp_path, recipe):
    report = run(DEMO, tmp_path / "x.gguf", to="gguf", recipe=recipe, verify=True)
    found, checkpoint = read_all(tmp_path / "x.gguf"), open_checkpoint(convert.api.find_source(DEMO))
    for t in report.plan.tensors:
        rows = ggml_rows(checkpoint.values(t.tensor)[:], t.type.name)
        assert found[t.tensor.gguf].data.tobytes() == rows.tobytes(), t.tensor.gguf
    worst = max(e.relative_rms for e in report.errors)
    assert worst < {"Q2_K": 0.35, "Q3_K_M": 0.2}.get(recipe, 0.13)
