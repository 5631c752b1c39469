"""python -m convert: exit codes, one `error:` line, and no OUT but a complete one."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import convert.__main__
import convert.output
import convert.to_mlx
import convert.work
from convert.cli import main
from mlx_dgemma.errors import DgemmaError
from tests.tiny import tiny_config, write_json

ROOT = Path(__file__).parent.parent


@pytest.fixture
def error_line(tiny, tmp_path, capsys):
    """Run a conversion that fails; give its `error:` line after checking that nothing else came of it."""

    def run(*options, src=tiny, out=tmp_path / "out"):
        before = sorted(tmp_path.rglob("*"))
        assert main([str(src), str(out), *options]) == 1
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert printed.err.splitlines()[-1] == lines[0]
        assert printed.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return run


def test_convert_and_verify(tiny, tmp_path, capsys):
    assert main([str(tiny), str(tmp_path / "out"), "--to", "mlx", "--recipe", "q4", "--verify"]) == 0
    printed = capsys.readouterr()
    assert "expert            q4" in printed.err  # the plan comes first, on stderr
    role, tensors, relative, largest = next(line for line in printed.out.splitlines() if "expert" in line).split()
    assert (role, tensors) == ("expert", "12")
    assert 0.05 < float(relative) < 0.15
    assert 0 < float(largest) < 0.1
    assert printed.out.splitlines()[-1].startswith(f"{tmp_path / 'out'}: 775.41 kB in 1 shard")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_json_prints_one_object(tiny, tmp_path, capsys):
    assert main([str(tiny), str(tmp_path / "out"), "--recipe", "nvfp4", "--verify", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["recipe"], result["tensors"], result["shards"]) == ("nvfp4", 143, 1)
    assert sum(row["bytes"] for row in result["roles"]) == result["bytes"]
    assert {row["role"] for row in result["verify"]} == {row["role"] for row in result["roles"]}


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    write_json(tmp_path / "config.json", tiny_config())
    assert main([str(tmp_path), "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines()[-1] == "775408 bytes in 1 shard, 6.47 bits per weight"
    assert main([str(tmp_path), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 775_408
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_recipe_file(tiny, tmp_path, capsys):
    write_json(tmp_path / "r.json", {"name": "mine", "roles": {"expert": "mxfp4"}})
    assert main([str(tiny), str(tmp_path / "out"), "--recipe", str(tmp_path / "r.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "mine"


# Failures a user can mend: error line, exit code 1. The source's own defects are in test_checkpoint.py.


def test_output_exists(error_line, tmp_path):
    (tmp_path / "out").mkdir()
    assert error_line().endswith("out: already exists, expected a new name; choose another one or remove it first")


def test_a_recipe_file_that_is_none(error_line, tmp_path):
    assert error_line("--recipe", str(tmp_path / "r.json")).endswith(
        "not found; expected the path of a JSON recipe file"
    )
    (tmp_path / "r.json").write_text("{")
    assert error_line("--recipe", str(tmp_path / "r.json")).endswith("correct the recipe file")


def test_an_output_that_cannot_be_written(error_line, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error_line(out=tmp_path / "file" / "out")


def test_unknown_recipe(error_line):
    assert "recipe 'q9' is not known, expected one of bf16, fp32, q8" in error_line("--recipe", "q9")


def test_wrong_model(error_line, tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "llada"})
    line = error_line(src=tmp_path)
    assert 'model_type is "llada", expected "diffusion_gemma". LLaDA is another diffusion model; run it with' in line


def test_no_such_folder(error_line):
    assert "no such folder or file; expected a model folder, a GGUF file, or a hub" in error_line(src="./nowhere")


def test_hub_id_while_offline(tmp_path):
    """In a process of its own: the hub client reads the switch when it is imported."""
    command = [sys.executable, "-m", "convert", "owner/name", str(tmp_path / "out")]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: owner/name: ")
    assert "HF_HUB_OFFLINE" in line
    assert not (tmp_path / "out").exists()


def test_a_hub_id_is_downloaded_and_a_dry_run_fetches_config_json_alone(tiny, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, allow_patterns: asked.append((name, allow_patterns)) or tiny
    )
    assert main(["owner/name", "--dry-run"]) == 0
    assert asked.pop() == ("owner/name", ["config.json"])
    assert main(["owner/name", str(tmp_path / "out")]) == 0
    name, patterns = asked.pop()
    assert name == "owner/name"
    assert {"config.json", "*.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(patterns)


def test_a_reader_that_goes_away(tiny):
    command = f"{sys.executable} -m convert {tiny} --dry-run | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_too_little_space_is_known_before_the_start(error_line, monkeypatch):
    usage = shutil.disk_usage(ROOT)._replace(free=1000)
    monkeypatch.setattr(convert.output.shutil, "disk_usage", lambda folder: usage)
    line = error_line("--recipe", "q4")
    assert "the disk is full, the output needs 88" in line
    assert "1.00 kB (1000 bytes) are free; free some space or choose another disk" in line


def test_disk_full_in_the_middle(tiny, monkeypatch, tmp_path, capsys):
    """What goes on from there is in test_resume.py."""
    write, written = convert.work._File.write, []

    def full_after_300_kilobytes(self, position, data):
        written.append(len(data))
        if sum(written) > 300_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, position, data)

    monkeypatch.setattr(convert.work._File, "write", full_after_300_kilobytes)
    assert main([str(tiny), str(tmp_path / "out")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "out: the disk is full, the output needs" in line
    assert "bytes) are free; free some space or choose another disk; " in line
    assert f"of 143 tensors are kept in {tmp_path / 'out.partial'}; the same command goes on from there" in line
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_output_that_cannot_be_made(error_line, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in error_line(out=tmp_path / "file" / "out")


def test_what_a_killed_run_left_is_replaced(tiny, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/model-00001-of-00009.safetensors").write_text("half")
    assert main([str(tiny), str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out/model-00001-of-00009.safetensors").exists()


def test_interrupt(tiny, tmp_path, monkeypatch, capsys):
    """Before a tensor is complete nothing is kept; a later one is in test_resume.py."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.work, "_do_piece", interrupted)
    monkeypatch.setattr(sys, "argv", ["convert", str(tiny), str(tmp_path / "out")])
    assert convert.__main__.main() == 130
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.endswith("interrupted; nothing was kept\n")
    assert list(tmp_path.iterdir()) == []


def test_going_on_is_said(tiny, tmp_path, monkeypatch, capsys):
    quantize, calls = convert.to_mlx.quantize, []

    def broken(*args):
        calls.append(1)
        if len(calls) == 20:
            raise DgemmaError("broken")
        return quantize(*args)

    with monkeypatch.context() as patch:
        patch.setattr(convert.to_mlx, "quantize", broken)
        assert main([str(tiny), str(tmp_path / "out")]) == 1
    kept = capsys.readouterr().err.splitlines()[-1].split(" of 143 tensors")[0].split()[-1]
    assert main([str(tiny), str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    assert f"note: going on where an interrupted run stopped: {kept} tensors, " in printed.err
    assert json.loads(printed.out)["tensors"] == 143


@pytest.mark.parametrize("arguments", [[], ["src"], ["src", "out", "--to", "onnx"], ["src", "out", "--bits", "4"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m convert" in capsys.readouterr().err
