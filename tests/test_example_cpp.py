"""examples/denoise.cpp, a host in another language: compiled against ggml's headers, it computes what the oracle does.

Needs a C++17 compiler (CXX, or c++), nlohmann/json and ggml's headers: those of the folder GGML_INCLUDE, or installed
ones. The example is loaded into a child Python that has opened the ggml we use, because xllamacpp's library has
Python's symbols open and cannot be linked into a program of its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gguf_export import Runner, describe
from gguf_export.description import Shape, as_text, write_description
from gguf_export.numpy_executor import NumpyExecutor
from mlx_dgemma.gguf.model import open_gguf
from tests.tiny_gguf import make_tiny_gguf

ROOT = Path(__file__).parent.parent
C, V = 16, 384
HEADERS = {
    "nlohmann/json.hpp": "nlohmann/json (Debian: nlohmann-json3-dev, Homebrew: nlohmann-json)",
    "ggml.h": "ggml's headers, or set GGML_INCLUDE to the folder ggml/include of llama.cpp's source",
}
AS_LIBRARY = {
    "darwin": ["-dynamiclib", "-Wl,-undefined,dynamic_lookup"],
    "linux": ["-shared", "-fPIC", "-Wl,-Bsymbolic"],  # its own nlohmann/json, not the one inside xllamacpp
}
CALL_MAIN = """
import ctypes, sys
from gguf_export.devices import open_ggml

library = open_ggml()
program, *arguments = (text.encode() for text in sys.argv[1:])
words = (ctypes.c_char_p * (len(arguments) + 2))(program, *arguments)
sys.exit(ctypes.CDLL(program.decode()).main(len(arguments) + 1, words))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or sys.platform not in AS_LIBRARY:
        pytest.skip("no C++ compiler for Linux or macOS; install g++ or clang, or set CXX")
    include = os.environ.get("GGML_INCLUDE")
    assert include is None or Path(include, "ggml.h").is_file(), f"GGML_INCLUDE is {include}, which holds no ggml.h"
    command = [compiler, "-std=c++17", *([f"-I{include}"] if include else [])]
    for header, advice in HEADERS.items():
        known = subprocess.run([*command, "-E", "-x", "c++", "-"], input=f"#include <{header}>", text=True,
                               capture_output=True)  # fmt: skip
        if known.returncode:
            pytest.skip(f"the compiler finds no {header}; install {advice}")
    out = tmp_path_factory.mktemp("example") / "denoise.so"
    done = subprocess.run(
        [*command, *AS_LIBRARY[sys.platform], ROOT / "examples/denoise.cpp", "-o", out],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def run(program, *arguments):
    child = [sys.executable, "-c", CALL_MAIN, program, *arguments]
    return subprocess.run(child, capture_output=True, text=True, cwd=ROOT)


def write(description, path):
    write_description(description, path)
    return path


FORMS = [
    {"attention": a, "self_conditioning": s, "form": f}
    for a in ("flash", "exact") for s in ("top-k", "exact") for f in ("cpu", "gpu")
]  # fmt: skip
FILES = {"F32": {}, "split": {"split_experts": True}, "Q8_0": {"type": "Q8_0"}}
CASES = [("F32", form) for form in FORMS] + [(file, form) for file in ("split", "Q8_0") for form in FORMS[:2]]


@pytest.mark.parametrize("file, form", CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x.values()))
def test_another_host_computes_the_same_logits(program, tmp_path, file, form):
    model = make_tiny_gguf(tmp_path / "tiny.gguf", **FILES[file])
    # ggml rounds the activations that meet quantized weights, so there our own host of ggml has the numbers.
    oracle = Runner(model, "CPU", executor=None if file == "Q8_0" else NumpyExecutor(open_gguf(model)), **form)
    canvas = (7 * np.arange(C) + 3) % V
    want = oracle.denoise(canvas[None], oracle.make_cache())[0]

    options = [f"{name}={value}" for name, value in oracle.options.items()]
    done = run(program, model, write(describe(model), tmp_path / "tiny.dgraph.json"), *options)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)

    # Measured: 8e-6; 8e-4 in the form for GPUs, whose gelu ggml's CPU looks up in float16; 0 where both run on ggml.
    tolerance = 1e-2 if form["form"] == "gpu" and file != "Q8_0" else 1e-4
    error = np.abs(np.array(got["logits"]) - want[:, :8]).max()
    assert error < tolerance, f"{error=}"
    assert got["argmax"] == want.argmax(-1).tolist()
    assert got["nodes"] == len(oracle.graph("denoise", Shape(1, C)).nodes)


def first_node(description):
    return description["templates"]["sliding"]["nodes"][0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["format"].update(major=3), "expected dgemma-graph 2.x"),
        (lambda d: d["format"].update(name="onnx"), "expected dgemma-graph 2.x"),
        (lambda d: first_node(d).update(op="warp"), "node blk.0.attn_norm_rms: unknown op 'warp'"),
        (lambda d: first_node(d).update(inputs=["y"]), "node blk.0.attn_norm_rms: unknown name 'y'"),
        (lambda d: first_node(d).update(params={}), "node blk.0.attn_norm_rms: "),
        (lambda d: d["dims"].pop("N"), "unknown name 'N'"),
        (lambda d: d["dims"].update(H=32), "token_embd.weight has another shape in the GGUF"),
        (lambda d: d["model"].update(architecture="llama"), "holds diffusion-gemma, the description is of llama"),
    ],
)
def test_what_is_wrong_is_said(program, tmp_path, change, message):
    model = make_tiny_gguf(tmp_path / "tiny.gguf")
    description = describe(model)
    change(description)
    done = run(program, model, write(description, tmp_path / "tiny.dgraph.json"))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr, done.stderr


@pytest.mark.parametrize("option", ["attention=blurred", "colour=red", "attention"])
def test_an_unknown_option_is_said(program, tmp_path, option):
    model = make_tiny_gguf(tmp_path / "tiny.gguf")
    done = run(program, model, write(describe(model), tmp_path / "tiny.dgraph.json"), option)
    assert done.returncode == 1 and f"option is {option}, expected one of" in done.stderr


def test_the_walk_shows_lines_of_the_description(tmp_path):
    lines = {
        line.strip().rstrip(",") for line in as_text(describe(make_tiny_gguf(tmp_path / "tiny.gguf"))).splitlines()
    }
    excerpts = re.findall(r"```json\n(.*?)```", (ROOT / "docs/llama_cpp.md").read_text(), flags=re.S)
    shown = [line.rstrip(",") for excerpt in excerpts for line in excerpt.splitlines()]
    assert len(shown) > 10 and not [line for line in shown if line not in lines]


def test_files_that_are_none(program, tmp_path):
    model, empty = make_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "empty"
    empty.write_text("")
    description = write(describe(model), tmp_path / "tiny.dgraph.json")
    assert "usage: denoise" in run(program).stderr
    assert "cannot be opened" in run(program, model, tmp_path / "nothing").stderr
    assert "is no JSON object" in run(program, model, empty).stderr
    assert "cannot be read as GGUF" in run(program, empty, description).stderr
