"""`python -m gguf_export info`: what a person or a program is told about a file, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_export.cli import main
from gguf_export.info import as_text, summarize
from mlx_dgemma.config import GenerationConfig, parse_config
from mlx_dgemma.gguf import rope
from mlx_dgemma.gguf.metadata import metadata
from mlx_dgemma.gguf.reader import GgufFile, StoredTensor, Value, read_gguf
from mlx_dgemma.gguf.types import TYPES
from mlx_dgemma.tensors import text_tensors
from tests.tiny_gguf import KINDS, make_tiny_gguf

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_gguf(tmp_path_factory.mktemp("info") / "tiny.gguf", type="Q8_0")


def test_by_eye(tiny, capsys):
    assert main(["info", str(tiny)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"file           {tiny}, ")
    assert lines[1:13] == [
        "architecture   diffusion-gemma",
        "name           tiny",
        "parameters     958.88 K in 144 tensors",
        "layers         6: 5 sliding, 1 full attention",
        "context        4096 tokens",
        "canvas         16 tokens",
        "recipe         Q8_0",
        "types          f32 87, q8_0 57",
        "tokenizer      gemma4, 384 tokens, 10 merges",
        "chat template  yes",
        "sampler        max_denoising_steps 8, t_min 0.4, t_max 0.8, entropy_bound 0.1, stability_threshold 1, "
        "confidence_threshold 0.005",
        "stop ids       1, 106, 50",
    ]
    assert lines[13:16] == [
        "",
        "role               tensors   weights       size bits/weight  types",
        "embedding                1   24.58 K   26.11 kB        8.50  q8_0 1",
    ]


def test_numbers_agree_with_gguf_py(tiny):
    summary, theirs = summarize(read_gguf(tiny)), gguf.GGUFReader(tiny).tensors
    assert summary["bytes"] == tiny.stat().st_size
    assert summary["parameters"] == sum(int(t.n_elements) for t in theirs if t.name != rope.NAME)
    assert sum(r["tensors"] for r in summary["roles"]) == summary["tensors"] == len(theirs)
    assert sum(r["bytes"] for r in summary["roles"]) == sum(int(t.n_bytes) for t in theirs)
    bits = {r["role"]: r["bits_per_weight"] for r in summary["roles"]}
    assert bits["expert"] == bits["attention"] == 8.5 and bits["norm"] == bits["router"] == 32


def test_the_released_model_has_the_published_files_numbers(tmp_path):
    """692 tensors and 25,250,987,068 numbers, 256 of them frequency factors: a dump of the published Q8_0."""
    config = parse_config(json.loads((ROOT / "tests/data/diffusiongemma-26b-config.json").read_text()))
    path, factors = tmp_path / "26b.gguf", rope.frequency_factors(config)
    path.write_bytes(factors.tobytes())
    tensors = {rope.NAME: StoredTensor(rope.NAME, TYPES["F32"], factors.shape, 0, factors.nbytes)}
    for t in text_tensors(config):
        is_f32 = len(t.shape) == 1 or t.role == "router"
        kind = TYPES["F32" if is_f32 else "Q8_0"]
        nbytes = t.size // kind.block * kind.block_bytes
        tensors[t.gguf] = StoredTensor(t.gguf, kind, t.shape, 0, nbytes)
    summary = summarize(GgufFile(path, metadata(config, GenerationConfig(), "26B", 7), tensors))
    assert summary["problem"] is None
    assert (summary["tensors"], summary["parameters"]) == (692, 25_250_987_068 - 256)
    assert summary["types"] == {"f32": 423, "q8_0": 269}
    assert (summary["layers"], summary["sliding_layers"], summary["recipe"]) == (30, 25, "Q8_0")
    assert round(sum(r["bytes"] for r in summary["roles"]) / 2**20) == 25_619  # llama-quantize's MiB for Q8_0
    assert "25.25 B in 692 tensors" in as_text(summary)


def test_json_is_the_summary(tiny, capsys):
    assert main(["info", "--json", str(tiny)]) == 0
    assert capsys.readouterr().out == json.dumps(summarize(read_gguf(tiny))) + "\n"


MISSING = {
    "diffusion.eb_t_min": "diffusion.eb_t_min: the reference's defaults are used",
    "tokenizer.chat_template": "tokenizer.chat_template: a chat cannot",
    "tokenizer.ggml.merges": "tokenizer.ggml.merges: text cannot be split",
    "tokenizer.ggml.tokens": "tokenizer.ggml.tokens: no text can go in",
}


@pytest.mark.parametrize("key", MISSING)
def test_a_missing_key_is_said(tmp_path, key):
    summary = summarize(read_gguf(make_tiny_gguf(tmp_path / "tiny.gguf", keys={key: None})))
    assert summary["supported"] and len(summary["missing"]) == 1
    assert summary["missing"][0].startswith(MISSING[key])
    assert f"missing        {MISSING[key]}" in as_text(summary)


def test_missing_frequency_factors_and_tokens_are_said(tmp_path):
    keys = {"tokenizer.ggml.tokens": (KINDS.ARRAY, ["a"] * 380, KINDS.STRING)}
    path = make_tiny_gguf(tmp_path / "tiny.gguf", keys=keys, tensors={"rope_freqs.weight": None})
    frequencies, tokens = summarize(read_gguf(path))["missing"]
    assert frequencies.startswith("rope_freqs.weight: a quarter of the frequency pairs")
    assert tokens == "4 of 384 tokens: the model's last rows have no text"


def test_split_experts_are_experts(tmp_path):
    path = make_tiny_gguf(tmp_path / "tiny.gguf", split_experts=True)
    roles = {r["role"]: r["tensors"] for r in summarize(read_gguf(path))["roles"]}
    assert roles["expert"] == 18


@pytest.mark.parametrize(("number", "name"), [(0, "F32"), (32, "BF16"), (15, "Q4_K_M"), (1024 + 7, "Q8_0")])
def test_the_recipe_is_the_file_types_name(tmp_path, number, name):
    keys = {"general.file_type": (KINDS.UINT32, number)}
    assert summarize(read_gguf(make_tiny_gguf(tmp_path / "tiny.gguf", keys=keys)))["recipe"] == name


def test_an_unknown_file_type_is_a_number(tmp_path):
    keys = {"general.file_type": (KINDS.UINT32, 999)}
    recipe = summarize(read_gguf(make_tiny_gguf(tmp_path / "tiny.gguf", keys=keys)))["recipe"]
    assert recipe == "unknown (general.file_type 999)"


def test_another_architecture_is_described_too(tmp_path, capsys):
    path = tmp_path / "llama.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a \x1b[2Jname")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 4), np.float32))
    writer.add_tensor("blk.0.ssm_a", np.zeros(4, np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "architecture   llama (does not run here)" in out
    assert "name           a ?[2Jname" in out
    assert "layers         2" in out and "context        512 tokens" in out and "canvas         not said" in out
    assert "problem        general.architecture is 'llama', expected 'diffusion-gemma'" in out
    assert "attention                1        16   64 bytes       32.00  f32 1" in out
    assert "other                    1         4   16 bytes       32.00  i32 1" in out


def test_a_file_without_tensors_or_keys_is_described(tmp_path, capsys):
    path = tmp_path / "nothing.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "architecture   not said (does not run here)" in out and "types          none" in out


def test_a_broken_model_is_described_with_its_problem(tmp_path):
    path = make_tiny_gguf(tmp_path / "tiny.gguf", tensors={"blk.1.attn_q.weight": None})
    summary = summarize(read_gguf(path))
    assert (summary["supported"], summary["layers"], summary["sampler"]) == (False, 6, None)
    assert summary["problem"].startswith("1 tensor is missing, as blk.1.attn_q.weight")


def test_values_of_the_wrong_type_are_no_crash(tmp_path):
    file = read_gguf(make_tiny_gguf(tmp_path / "tiny.gguf"))
    for key in file.metadata:
        for value in (Value("arr[bool]", [True]), Value("str", "x"), Value("f32", float("nan"))):
            summary = summarize(file._replace(metadata=file.metadata | {key: value}))
            assert as_text(summary) and json.dumps(summary)


def run(*arguments, **options):
    command = [sys.executable, "-m", "gguf_export", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **options)


def test_exit_codes(tiny, tmp_path, capsys):
    done = run("info", str(tmp_path / "none.gguf"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path}/none.gguf: not found; expected a GGUF file, check the path\n"
    for wrong in ([], ["info"], ["other", str(tiny)]):
        with pytest.raises(SystemExit) as left:
            main(wrong)
        assert left.value.code == 2


def test_info_works_where_mlx_does_not_install(tiny):
    code = "import sys; sys.modules['mlx'] = None; from gguf_export.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "info", str(tiny)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0 and "diffusion-gemma" in done.stdout, done.stderr


def test_a_reader_that_leaves_is_no_error(tiny):
    done = subprocess.run(
        f"{sys.executable} -m gguf_export info {tiny} | true; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_ctrl_c_exits_with_130(monkeypatch, capsys):
    import gguf_export.cli
    from gguf_export.__main__ import main as first_lines

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_export.cli, "main", interrupted)
    assert first_lines() == 130
    assert capsys.readouterr().err == "interrupted\n"
