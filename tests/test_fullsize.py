"""benchmarks.fullsize: the layout is the released one, what `make` writes converts, and checks can fail."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fullsize, fullsize_make
from benchmarks.fullsize_make import grown_tokenizer, make, pool, released_config, shards_of
from benchmarks.fullsize_measure import disk_rates, quantizer_rates, watch
from convert.checkpoint import open_checkpoint
from convert.plan import plan_from_config
from convert.plan_gguf import make_gguf_plan
from convert.recipes import find_recipe
from mlx_dgemma.config import parse_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.vocabulary import vocabulary_metadata
from mlx_dgemma.tensors import text_tensors, vision_tensors

ROOT = Path(__file__).parent.parent
SMALL = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 192, "moe_intermediate_size": 64, "num_experts": 8,
    "head_dim": 32, "global_head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_global_key_value_heads": 1, "top_k_experts": 2,
}  # fmt: skip
SMALL_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "position_embedding_size": 32}


def small_config() -> dict:
    raw = released_config(2)
    raw["text_config"] |= SMALL
    raw["vision_config"] |= SMALL_VISION
    return raw


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fullsize") / "small"
    return folder, make(folder, small_config(), seed=3, limit=2_000_000)


def test_the_released_layout():
    shards = shards_of(parse_config(released_config()))
    tensors = [t for shard in shards for t in shard]
    sizes = [sum(2 * t.size for t in shard) for shard in shards]
    assert (len(tensors), len(shards), sum(sizes)) == (1047, 11, 51_647_562_456)
    assert max(sizes) <= 5_000_000_000
    assert len({t.hf for t in tensors}) == 1047


def test_a_scaled_down_layout():
    config = parse_config(released_config(6))
    assert [layer.is_sliding for layer in config.layers] == [True] * 5 + [False]
    assert parse_config(released_config(2)).num_hidden_layers == 2
    assert len(vision_tensors(config)) == 356  # not scaled
    for layers in (0, 31):
        with pytest.raises(DgemmaError, match=f"--layers is {layers}, expected 1 to 30"):
            released_config(layers)


def test_what_is_made_is_a_checkpoint_of_pooled_values(made):
    folder, facts = made
    checkpoint = open_checkpoint(folder)  # names, shapes, dtypes, index, no gaps
    config = checkpoint.config
    tensors = (*text_tensors(config), *vision_tensors(config))
    assert facts == {
        "layers": 2,
        "tensors": len(tensors),
        "shards": len(list(folder.glob("*.safetensors"))),
        "bytes": sum(2 * t.size for t in tensors),
        "seed": 3,
    }
    assert facts["shards"] > 2
    values = pool("expert", 3)
    name = "model.decoder.layers.1.experts.down_proj"
    found = checkpoint.weights.rows(name)[0:1000].ravel()
    (start,) = np.flatnonzero(np.all([np.roll(values, -i) == found[i] for i in range(4)], axis=0))
    assert (np.take(values, np.arange(start, start + len(found)), mode="wrap") == found).all()
    other = checkpoint.weights.rows(name.replace("1.", "0."))[0:1000].ravel()
    assert (found != other).mean() > 0.9  # every tensor begins elsewhere


def test_a_tensor_longer_than_the_pool_repeats_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fullsize_make, "POOL", 1009)
    make(tmp_path / "small", small_config())
    checkpoint = open_checkpoint(tmp_path / "small")
    embedding = checkpoint.weights.rows("model.decoder.embed_tokens.weight")[0:2048].ravel()
    assert (embedding[1009:] == embedding[:-1009]).all()
    assert not (embedding[1008:] == embedding[:-1008]).all()


def test_the_seed_decides_the_weights():
    assert (pool("expert", 0) == pool("expert", 0)).all()
    assert (pool("expert", 0) != pool("expert", 1)).mean() > 0.9
    values = (pool("expert", 0).astype(np.uint32) << 16).view(np.float32)
    assert 0.02 < values.std() < 0.022
    assert np.abs(values).max() > 0.3  # a normal pool of this size ends near 5 σ = 0.1


def test_the_tokenizer_grows_into_a_vocabulary_a_gguf_takes(tmp_path):
    raw = grown_tokenizer(4000)
    assert sorted(raw["model"]["vocab"].values()) == list(range(4000))
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    shutil.copy(fullsize_make.DEMO / "tokenizer_config.json", tmp_path)
    assert len(vocabulary_metadata(tmp_path, 4000)["tokenizer.ggml.tokens"].value) == 4000


@pytest.mark.parametrize("short_of", [1, 3_300_000_000, 60_000_000_000])
def test_too_little_disk_is_refused_with_both_figures_and_what_fits(short_of, tmp_path, monkeypatch, capsys):
    whole = 51_647_562_456
    free = max(0, whole - short_of)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free))
    assert fullsize.main(["make", str(tmp_path / "full")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'full'}: a checkpoint of 30 layers needs 51.67 GB (51667562456 bytes)")
    assert f"({free} bytes) are free; " in error
    assert not any(tmp_path.iterdir())
    if "--layers" not in error:
        assert free < 4_300_000_000  # not even one layer
        return
    fits = int(error.split("--layers ")[1].split(",")[0])

    def size(layers):
        return sum(2 * t.size for shard in shards_of(parse_config(released_config(layers))) for t in shard)

    assert size(fits) < free < size(fits + 1) + 50_000_000


@pytest.mark.parametrize(("to", "recipe", "name"), [("mlx", "q4", "out"), ("gguf", "Q4_K_M", "out.gguf")])
def test_a_conversion_is_measured_and_checked(to, recipe, name, made, tmp_path, capfd, monkeypatch):
    folder, _ = made
    monkeypatch.setattr(fullsize, "SAMPLE", 1 << 24)
    monkeypatch.setattr(fullsize, "PIECE", 1 << 18)
    arguments = ["convert", str(folder), str(tmp_path / name), "--to", to, "--recipe", recipe]
    assert fullsize.main([*arguments, "--json", str(tmp_path / "kept.jsonl")]) == 0
    printed = capfd.readouterr()
    result = json.loads(printed.out)
    assert json.loads((tmp_path / "kept.jsonl").read_text()) == result
    assert "scaled down: 2 of the 26B's 30 layers" in printed.err
    assert list(result["checks"].values()) == ["ok", "ok", "ok", "does not apply", "does not apply"]
    text = sum(t.size for t in text_tensors(parse_config(small_config())))
    vision = sum(t.size for t in vision_tensors(parse_config(small_config())))
    assert result["bytes_read"] == 2 * (text + vision * (to == "mlx"))
    assert result["bytes_written"] - result["text_bytes"] == 2 * vision * (to == "mlx")
    assert result["file_bytes"] > result["bytes_written"] == result["dry_run_bytes"] == result["reported_bytes"]
    floors = result["floor_seconds"]
    assert floors["overlapped"] == max(floors[name] for name in ("read", "quantize", "write"))
    assert 20e6 < result["peak_resident_bytes"] < 3e9
    assert 0 < result["cpu_seconds"] < 4 * result["seconds"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.jsonl", name]
    assert fullsize.main(["report", str(tmp_path / "kept.jsonl")]) == 0
    report = capfd.readouterr().out
    assert f"| {to} {recipe} | 2 (scaled down) |" in report
    assert f"{result['bytes_written']} bytes" in report and "3 ok |" in report


def test_a_check_that_fails_says_so_and_exits_with_1(tmp_path, monkeypatch, capsys):
    full = {
        "layers": 30, "to": "mlx", "recipe": "q4", "seconds": 100.0, "cpu_seconds": 150.0, "system_seconds": 9.0,
        "cores_used": 1.5, "other_cores": 0.7,
        "floor_seconds": {"read": 20, "quantize": 40, "write": 8, "overlapped": 40, "in_turn": 68},
        "bytes_read": 51_647_562_456, "bytes_written": 16_547_507_928, "text_bytes": 15_401_919_096,
        "dry_run_bytes": 16_547_507_928, "reported_bytes": 16_547_507_928, "file_bytes": 16_557_507_928,
        "peak_resident_bytes": 1_000_000_000, "peak_own_bytes": None,
        "disk": {"read_per_second": [1e9, 2e9], "write_per_second": [1e9, 2e9], "cache_avoided_by": "O_DIRECT",
                 "source_dropped_from_cache": True},
        "quantizers": [{"type": "q4", "weights": 10**9, "per_second": 10**8, "seconds": 10}],
        "machine": fullsize.machine(),
    }  # fmt: skip
    defects = {
        "tensor bytes as --dry-run says": {"dry_run_bytes": 16_547_507_929},
        "tensor bytes as convert reports": {"reported_bytes": 16_547_507_927},
        "resident memory at most 3 GB": {"peak_resident_bytes": 3_000_000_001},
        "text weights of MLX q4 at most 15.5 GB": {"text_bytes": 15_500_000_001},
        "tensors of GGUF Q4_K_M 16,013 MiB": {"to": "gguf", "recipe": "Q4_K_M"},
    }
    assert list(fullsize.checks(full).values()) == ["ok"] * 4 + ["does not apply"]
    sizes = dict.fromkeys(("bytes_written", "dry_run_bytes", "reported_bytes"), 16_790_983_920)
    assert fullsize.checks(full | sizes | defects["tensors of GGUF Q4_K_M 16,013 MiB"])[[*defects][-1]] == "ok"
    for name, defect in defects.items():
        verdicts = fullsize.checks(full | defect)
        assert [check for check, verdict in verdicts.items() if verdict == "failed"] == [name]
        broken = full | defect | {"checks": verdicts}
        monkeypatch.setattr(fullsize, "rehearse", lambda *_, broken=broken: broken)
        kept = tmp_path / "kept.jsonl"
        assert fullsize.main(["convert", "in", "out", "--json", str(kept)]) == 1
        assert f"**failed: {name}**" in fullsize.markdown([broken])
        assert "other programs kept 0.7 cores busy" in fullsize.markdown([broken])
        assert f"failed          {name}" in capsys.readouterr().err


def test_rates_and_a_watched_process(tmp_path):
    (tmp_path / "a").write_bytes(bytes(32 << 20))
    rates = disk_rates([tmp_path / "a"], tmp_path / "scratch", 1 << 24)
    assert rates.read > 1e6 and rates.write > 1e6
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    # It holds its peak for two seconds: the watcher looks ten times a second, and is late on a busy machine.
    code = (
        "import time; b = bytearray(200_000_000); b[::4096] = b'x' * len(b[::4096])\n"
        "sum(range(10**6)); time.sleep(2); print('done')"
    )
    run = watch([sys.executable, "-c", code], ROOT)
    assert (run.code, run.output) == (0, "done\n")
    assert 200e6 < run.peak_bytes < 400e6
    assert 0 < run.cpu_seconds < 2 * run.seconds
    assert watch([sys.executable, "-c", "raise SystemExit(3)"], ROOT).code == 3


def test_quantizer_rates_cover_what_is_quantized():
    raw = small_config()
    config = parse_config(raw)
    gguf = quantizer_rates(make_gguf_plan(config, find_recipe("Q8_0", "gguf")), 1 << 16)
    sizes = {t.hf: t.size for t in text_tensors(config) if len(t.shape) > 1 and t.role not in ("norm", "router")}
    assert [(q.type, q.weights) for q in gguf] == [("Q8_0", sum(sizes.values()))]
    mlx = quantizer_rates(plan_from_config(raw, config, find_recipe("q4", "mlx")), 1 << 16)
    router = sum(t.size for t in text_tensors(config) if t.role == "router")
    assert sum(q.weights for q in mlx) == sum(sizes.values()) + router
    assert all(q.seconds > 0 for q in (*gguf, *mlx))


def test_a_conversion_that_fails(tmp_path, capsys):
    assert fullsize.main(["convert", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "config.json: not found" in capsys.readouterr().err
    assert fullsize.main(["report", str(tmp_path / "none")]) == 1
    assert "expected lines that `convert` has kept" in capsys.readouterr().err


def test_a_place_for_the_result_is_looked_at_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fullsize, "rehearse", lambda *_: pytest.fail("rehearsed"))
    assert fullsize.main(["convert", "in", "out", "--json", str(tmp_path / "none/x")]) == 1
    error = capsys.readouterr().err
    assert "none/x: cannot be written" in error and error.count("\n") == 1


def test_a_result_is_printed_even_where_it_can_no_longer_be_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "kept").mkdir()

    def rehearse(*_):
        (tmp_path / "kept").rmdir()
        return {"checks": {}}

    monkeypatch.setattr(fullsize, "rehearse", rehearse)
    monkeypatch.setattr(fullsize, "print_result", lambda result: None)
    assert fullsize.main(["convert", "in", "out", "--json", str(tmp_path / "kept/x")]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"checks": {}}
    assert "kept/x: cannot be written" in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize("line", ['{"a": 1}', "[]", "3", '{"checks": {}, "floor_seconds": 3}', "{"])
def test_lines_of_another_program_are_refused(line, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text("\n" + line + "\n")
    assert fullsize.main(["report", str(tmp_path / "x.jsonl")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {tmp_path / 'x.jsonl'}")
    assert "expected lines that `convert` has kept" in printed.err and printed.err.count("\n") == 1


def test_a_negative_seed_is_wrong_usage(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        fullsize.main(["make", str(tmp_path / "full"), "--seed", "-1"])
    assert stopped.value.code == 2 and "--seed is -1, expected 0 or more" in capsys.readouterr().err


def test_a_system_that_cannot_measure_says_so_first(tmp_path, monkeypatch, capsys):
    monkeypatch.delattr("os.wait4")
    monkeypatch.setattr(fullsize, "rehearse", lambda *_: pytest.fail("rehearsed"))
    assert fullsize.main(["convert", "in", "out", "--json", str(tmp_path / "x")]) == 1
    assert "error: this system has no os.wait4, expected Linux or macOS" in capsys.readouterr().err
