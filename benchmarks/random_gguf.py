"""Random models of any size, as GGUF files: for speed and memory, which do not care what a model says.

Source   weights of such scales that activations keep their size, as in tests/tiny.py
"""

import sys
import zlib
from pathlib import Path

import numpy as np

from convert import convert
from convert.output import appears_when_done
from convert.plan_gguf import make_gguf_plan
from convert.recipes import find_recipe
from gguf_export.quantize import quantize
from gguf_export.writer import GgufWriter
from mlx_dgemma.config import GenerationConfig, parse_config, read_json
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf import rope
from mlx_dgemma.gguf.metadata import metadata
from mlx_dgemma.gguf.types import TYPES

ROOT = Path(__file__).parent.parent
DEMO, BUILD = ROOT / "demo/checkpoint", ROOT / "build"
RECIPE, Q4_K_M = "Q4_K_M", 15  # llama.cpp's number of it
MID = "1024,12,64,8,65536,256"


def demo_model() -> Path:
    return _made(BUILD / f"demo-{RECIPE}.gguf", lambda out: convert(DEMO, out, to="gguf", recipe=RECIPE))


def random_model(sizes: str) -> Path:
    """A seeded random model, well-conditioned, without a vocabulary. sizes: H,layers,experts,K,V,C"""
    try:
        numbers = [int(n) for n in sizes.split(",")]
        H, layers, experts, K, V, C = numbers
    except ValueError:
        raise DgemmaError(f"--random is {sizes!r}, expected six whole numbers as in {MID}") from None
    raw = read_json(DEMO / "config.json", "config.json")
    raw["canvas_length"], full = C, {*range(5, layers, 6), layers - 1}
    raw["text_config"] |= {
        "vocab_size": V, "hidden_size": H, "intermediate_size": 2 * H, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
        "head_dim": H // 8, "global_head_dim": H // 4, "num_experts": experts, "top_k_experts": K,
        "moe_intermediate_size": H // 4, "sliding_window": 1024, "max_position_embeddings": 1 << 15,
        "layer_types": ["full_attention" if i in full else "sliding_attention" for i in range(layers)],
    }  # fmt: skip
    out = BUILD / f"random-{'-'.join(map(str, numbers))}-{RECIPE}.gguf"
    return _made(out, lambda out: _write_random(parse_config(raw), out))


def _made(out, make):
    if not out.exists():
        print(f"making {out}", file=sys.stderr)
        BUILD.mkdir(exist_ok=True)
        make(out)
    return out


def _write_random(config, out):
    plan, factors = make_gguf_plan(config, find_recipe(RECIPE, "gguf", ())), rope.frequency_factors(config)
    tensors = [(t.tensor.gguf, t.type, t.tensor.shape) for t in plan.tensors]
    tensors.append((rope.NAME, TYPES["F32"], factors.shape))
    keys = metadata(config, GenerationConfig(), "random", Q4_K_M)
    with appears_when_done(out, plan.total_bytes, folder=False) as scratch, GgufWriter(scratch, keys, tensors) as w:
        for planned in plan.tensors:
            rng = np.random.default_rng(zlib.crc32(planned.tensor.gguf.encode()))
            row = planned.tensor.shape[-1]
            rows, step = planned.tensor.size // row, max(1, (1 << 22) // row)
            for start in range(0, rows, step):
                values = _random(planned.tensor, rng.standard_normal((min(step, rows - start), row), np.float32))
                w.append(planned.tensor.gguf, quantize(values, planned.type))
        w.append(rope.NAME, factors)


def _random(tensor, draw):
    """Normal numbers → weights with which activations keep their size, as in tests/tiny.py."""
    last = tensor.hf.removesuffix(".weight").rsplit(".", 1)[-1]
    if tensor.role == "scalar":
        return 1 + 0.02 * draw
    if last in ("q_norm", "k_norm"):  # attention is not scaled: near 1 it would decide on rounding errors
        return 0.45 * (1 + 0.1 * draw)
    if tensor.role == "norm" and last.startswith("post_"):
        return 0.3 * (1 + 0.1 * draw)
    if tensor.role == "norm" or len(tensor.shape) == 1:
        return 1 + 0.1 * draw
    return draw if tensor.role == "router" else draw * draw.shape[-1] ** -0.5
