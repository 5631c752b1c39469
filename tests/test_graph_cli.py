"""describe, check, draw, run, devices: what a user types, and what a bad input answers."""

import json
import os
import signal
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from gguf_export import describe, ggml
from gguf_export.cli import main
from gguf_export.description import read_description
from gguf_export.devices import open_ggml
from mlx_dgemma.errors import DgemmaError
from tests.tiny import write_json
from tests.tiny_gguf import make_tiny_gguf

COMMAND = [sys.executable, "-m", "gguf_export"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def run(command, *arguments, stdin="", env=None):
    threads = ["--threads", "1"] if command == "run" else []
    return subprocess.run(
        [*COMMAND, command, *threads, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
    )


def error_line(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_describe_check_and_back(path, tmp_path, capsys):
    written = tmp_path / "tiny.dgraph.json"
    assert main(["describe", str(path), "-o", str(written)]) == 0
    assert read_description(written) == json.loads(json.dumps(describe(path)))
    assert max(map(len, written.read_text().splitlines())) < 1_000  # people read it
    assert main(["describe", str(path)]) == 0
    assert capsys.readouterr().out == written.read_text()
    assert main(["check", str(path), str(written), "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fallbacks"] == [] and report["weights"] == len(describe(path)["weights"]) + 6 * 24 - 6 * 2 - 1 + 6
    assert 60 < report["templates"]["sliding"] < 90
    assert report["memory"]["exact"]["weights"] - report["memory"]["top-k"]["weights"] == 384 * 64 * 4
    assert main(["check", str(path)]) == 0
    assert "all " in (out := capsys.readouterr().out) and "memory" in out


def test_a_description_serves_every_quantization(path, tmp_path):
    other = make_tiny_gguf(tmp_path / "q8.gguf", "Q8_0")
    assert describe(other) == describe(path)


def test_draw(path, tmp_path, capsys):
    assert main(["draw", str(path), "sliding"]) == 0
    ElementTree.fromstring(capsys.readouterr().out)
    description, svg = tmp_path / "d.json", tmp_path / "d.svg"
    main(["describe", str(path), "-o", str(description)])
    assert main(["draw", str(description), "-o", str(svg)]) == 0
    ElementTree.parse(svg)
    assert "expected" in error_line(capsys, "draw", path, "triangular")


def test_exported_operations_are_lines_of_numbers(path, tmp_path, capsys):
    """number, type, ne × 4, how many parameters and they, how many sources and (type, ne × 4, nb × 4) each, name"""
    out = tmp_path / "ops.txt"
    assert main(["check", str(path), "--export-ops", str(out)]) == 0
    lines = out.read_text().splitlines()
    assert len(lines) > 50 and f"{len(lines)} written" in capsys.readouterr().out
    operations = set()
    for line in lines:
        *numbers, name = line.split(" ")
        numbers = list(map(int, numbers))
        operations.add(numbers[0])
        n_sources = numbers[7 + numbers[6]]
        assert numbers[6] == 16 and len(numbers) == 8 + 16 + 9 * n_sources and name
    assert len(operations) > 20
    assert len({line.rsplit(" ", 1)[0] for line in lines}) == len(lines)


def test_run_answers_as_the_other_door_does(path):
    arguments = ("--model", path, "--prompt", "the sand", "--seed", 3, "--max-tokens", 32, "--json")
    ours = run("run", *arguments, "--device", "cpu", "--self-conditioning", "exact")
    theirs = subprocess.run(
        [sys.executable, "-m", "mlx_dgemma.generate", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert ours.returncode == theirs.returncode == 0, ours.stderr
    a, b = json.loads(ours.stdout), json.loads(theirs.stdout)
    assert a["tokens"] == b["tokens"] and a["settings"] == b["settings"] and a.keys() == b.keys()


def test_run_prints_text_and_a_final_line(path):
    done = run("run", "--model", path, "--prompt", "-", "--max-tokens", 16, "--device", "CPU", stdin="the sand")
    assert done.returncode == 0 and done.stdout.endswith("\n")
    assert "on CPU" in done.stderr and "tokens per forward" in done.stderr and "seed 0" in done.stderr


def test_a_chat_on_ggml(path):
    done = run("run", "--model", path, "--chat", "--max-tokens", 16, "--device", "CPU", stdin="the sand\nand on\n\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tokens per forward") == 2


def test_ctrl_c_ends_between_steps(path):
    command = [*COMMAND, "run", "--model", str(path), "--prompt", "on", "--steps", "1000000", "--threads", "1"]
    # A test run in the background has SIGINT ignored, and so would its children.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **pipes) as process:
        try:
            assert "loaded" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130 and "Traceback" not in rest


def test_devices_lists_the_cpu(capsys):
    assert main(["devices"]) == 0
    assert "CPU" in (out := capsys.readouterr().out) and "(auto)" in out and "ggml 0." in out
    assert main(["devices", "--json"]) == 0
    assert any(d["kind"] == "cpu" for d in json.loads(capsys.readouterr().out)["devices"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--device", "CUDA7"], "device 'CUDA7' is not here, expected auto or one of CPU"),
        (["run", "--n-gpu-layers", "-2"], "--n-gpu-layers is -2, expected 0 or more"),
        (["run", "--description", "nowhere.json"], "nowhere.json: not found; expected the path of a JSON description"),
        (["run", "--threads", "0"], "--threads is 0, expected 1 to 512"),
        (["run", "-t", "100000"], "--threads is 100000, expected 1 to 512"),
        (["run", "--steps", "0"], "--steps is 0"),
        (["run", "--first-canvas", "8"], "first_canvas is 8, which is for MLX"),
        (["run", "--conditioning-k", "2"], "conditioning_k is 2, which is for MLX"),
        (["run", "--drop-tail"], "drop_tail is True, which is for MLX"),
        (["run", "--preset", "best"], "preset is 'best', expected one of exact, balanced, fast"),
    ],
)
def test_bad_options_of_run(path, capsys, arguments, message):
    command, *options = arguments
    assert message in error_line(capsys, command, "--model", path, "--prompt", "on", *options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["format"].update(major=3), "format version 3.0, this reader knows 2.x; update dgemma"),
        (lambda d: d["format"].update(name="onnx"), 'expected {"name": "dgemma-graph"}'),
        (lambda d: d.pop("phases"), "the description has phases"),
        (lambda d: d["model"].update(fingerprint="sha256:0"), "they are of different models"),
        (lambda d: d["phases"]["denoise"]["nodes"][0].update(op="warp"), "has op 'warp', which is unknown; known are"),
        (
            lambda d: d["phases"]["denoise"]["nodes"][1].update(inputs=["nothing"]),
            "node embedded reads 'nothing', which is no earlier node",
        ),
        (
            lambda d: d["templates"]["full"]["nodes"][0].update(inputs=["layer_out"]),
            "reads 'layer_out', which is no earlier node",
        ),
        (lambda d: d["dims"].update(H=65), "dims has H = 65"),
        (lambda d: d["dims"].update(H=1 << 40), "dims has H = 1099511627776"),
        (lambda d: d["weights"].pop("output_norm.weight"), "node output_norm reads 'output_norm.weight'"),
        (lambda d: d["layers"].pop(0), "description: 5 layers"),
        (
            lambda d: d["weights"]["output_norm.weight"].update(shape=["V"]),
            "output_norm.weight: is f32[64] in the GGUF, the description says [384]",
        ),
    ],
)
def test_bad_descriptions(path, tmp_path, capsys, change, message):
    description = json.loads(json.dumps(describe(path)))
    change(description)
    write_json(tmp_path / "d.json", description)
    assert message in error_line(capsys, "check", path, tmp_path / "d.json")


@pytest.mark.parametrize("command", [["describe"], ["draw"], ["check", "--export-ops"]])
def test_an_output_that_cannot_be_written(path, tmp_path, capsys, command):
    out = tmp_path / "nowhere" / "out"
    option = [] if len(command) > 1 else ["-o"]
    message = error_line(capsys, command[0], path, *command[1:], *option, out)
    assert f"{out}: cannot be written (No such file or directory)" in message


def test_a_full_disk_behind_stdout(path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "devices"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (
        done.returncode == 1 and done.stderr == "error: standard output cannot be written (No space left on device)\n"
    )


def test_a_description_from_another_time(path, tmp_path, capsys):
    for change, message in [
        ({"ggml_min": "99.0"}, "the description asks for 99.0 or newer"),
        ({"ggml_min": [1]}, "the description has ggml_min '[1]'"),
        ({"format": {"name": "dgemma-graph", "major": True, "minor": 0}}, "format version True.0"),
        ({"model": describe(path)["model"] | {"architecture": "llama"}}, "architecture 'llama'"),
    ]:
        write_json(tmp_path / "d.json", json.loads(json.dumps(describe(path))) | change)
        assert message in error_line(
            capsys, "run", "--model", path, "--prompt", "on", "--description", tmp_path / "d.json"
        )
        assert message in error_line(capsys, "check", path, tmp_path / "d.json", "--device", "cpu")


def test_a_truncated_description(path, tmp_path, capsys):
    text = json.dumps(describe(path))
    (tmp_path / "d.json").write_text(text[: len(text) // 2])
    assert "not valid JSON" in error_line(capsys, "check", path, tmp_path / "d.json")


def test_a_file_that_is_no_model(tiny, capsys, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "download it again" in error_line(capsys, "describe", tmp_path / "x.gguf")
    assert "found a folder without a GGUF file" in error_line(capsys, "run", "--model", tiny, "--prompt", "x")
    assert "top-k is 0, expected at least 1" in error_line(capsys, "describe", "--top-k", 0, _tiny_file(tmp_path))


def test_no_library(path, monkeypatch, capsys):
    monkeypatch.setattr("gguf_export.devices.need_ggml", lambda what: _raise(what))
    assert "running a graph takes ggml" in error_line(capsys, "devices")


def test_a_library_too_old_names_what_it_lacks(monkeypatch):
    library = ggml.Ggml(ggml.find_ggml().file)
    monkeypatch.setitem(ggml.OPERATIONS, "ggml_from_tomorrow", (None,))
    with pytest.raises(DgemmaError, match=r"exports no ggml_from_tomorrow, expected a ggml library of version 0\.25"):
        library.open_backends()


def test_a_library_that_is_none(tmp_path):
    (tmp_path / "libggml-base.so").write_bytes(b"no library")
    done = run("devices", env={**os.environ, "GGML_LIBRARY": str(tmp_path)})
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "cannot be loaded as ggml" in done.stderr


def test_the_library_opens_once():
    assert open_ggml() is open_ggml()


def _tiny_file(folder):
    return make_tiny_gguf(folder / "tiny.gguf")


def _raise(what):
    raise DgemmaError(f"{what}, and it is not installed")
