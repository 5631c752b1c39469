"""benchmarks.ggml_step: what it prints, and that bytes and FLOP are what a count by hand gives."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import random_gguf
from benchmarks.ggml_floor import needed
from benchmarks.ggml_time import PHASES
from gguf_export import Runner
from gguf_export.description import Shape
from gguf_export.numpy_executor import NumpyExecutor
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.model import open_gguf
from tests.tiny_gguf import make_tiny_gguf

ROOT = Path(__file__).parent.parent
SIZES = "64,3,8,2,512,16"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_gguf, "BUILD", tmp_path_factory.mktemp("build"))
        return random_gguf.random_model(SIZES)


def test_the_command_prints_every_phase_and_operation(path):
    command = [sys.executable, "-m", "benchmarks.ggml_step", "--model", path, "--repeat", "2", "--prompt-tokens", "20"]
    done = subprocess.run([*command, "--threads", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert all(result["ms"][name] >= result["fastest_ms"][name] > 0 for name in PHASES)
    assert result["ms"]["step"] < 3 * (result["ms"]["denoise"] + result["ms"]["sample"])
    operations = result["operations"]
    table = {row["op"]: row for row in operations["table"]}
    assert table["flash_attn"]["nodes"] == 3 and table["mul_mat_id"]["nodes"] == 6
    assert sum(row["denoise_share"] for row in operations["table"]) == pytest.approx(1, abs=0.01)
    products = sum(table[op]["denoise_share"] for op in ("mul_mat", "mul_mat_id", "out_prod", "flash_attn"))
    assert operations["products_share"]["denoise"] == pytest.approx(products, abs=0.01)
    assert result["floor"]["gflop_per_s"] > 0 and result["floor"]["bandwidth_gb_per_s"] > 0
    assert "products, attention" in done.stdout and "phase" in done.stdout


def test_the_floor_counts_each_product_and_each_weight_once(tmp_path):
    """One full layer, whose values are its keys, all experts chosen, an empty prefix: terms to count by hand."""
    one = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "num_experts": 2, "top_k_experts": 2}
    made = make_tiny_gguf(tmp_path / "one.gguf", **one)
    runner = Runner(made, "CPU", executor=NumpyExecutor(open_gguf(made)), form="gpu", self_conditioning="exact")
    c, layer = runner.config, runner.config.layers[0]
    H, V, C, F = c.hidden_size, c.vocab_size, c.canvas_length, c.moe_intermediate_size
    D, N, G = layer.head_dim, c.num_attention_heads, layer.num_key_value_heads
    found = needed(runner.graph("denoise", Shape(1, C, 0, 256, 256)), np.zeros(1, int))

    attention = H * N * D + H * G * D + N * D * H
    experts = 2 * (H * 2 * F + F * H)
    dense, router, embedding = 3 * H * c.intermediate_size, H * 2, 2 * V * H
    weights = attention + 2 * dense + experts + router + embedding  # self-conditioning is a dense MLP too
    assert found["flop"] == 2 * C * weights + 4 * D * N * C * C  # a canvas sees itself

    stored = sum(leaf.spec.nbytes for leaf in runner._weights())
    assert stored < found["bytes"] < 1.1 * stored + 4 * V * C  # beliefs, keys and values beside the weights


def test_what_is_no_model(capsys):
    with pytest.raises(DgemmaError, match="expected six whole numbers as in"):
        random_gguf.random_model("1024,12")
