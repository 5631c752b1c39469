"""The graph description of one model: `python -m gguf_export describe`. JSON that any host of ggml can execute.

Shapes   `ne` order, fastest axis first; sizes are expressions over DIMS, RUNTIME and a template's own letters
Source   docs/formats.md specifies the format; graph_nodes.py has the computation
Differs  llama.cpp has no such format: ggml's graph export was removed from ggml, because it stored enum numbers and
         pointers. Names survive versions, and a person can read them

It holds for every quantization of one model: `fingerprint` covers configuration, names and shapes, not types.
"""

import hashlib
import json
import struct
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlx_dgemma.config import ModelConfig
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf import rope
from mlx_dgemma.gguf.model import FUSED, SPLIT, GgufModel, open_gguf
from mlx_dgemma.gguf.reader import GgufFile
from mlx_dgemma.tensors import (
    ENCODER_LAYER_TENSORS,
    GGUF_LAYER,
    LAYER_TENSORS,
    MODEL_TENSORS,
    QUANTIZED_ROLES,
)

from .ggml import OLDEST
from .graph_nodes import ENCODER, EXACT, TOP_K, denoise_nodes, layer_nodes, prefill_nodes, sample_nodes
from .ops import WEIGHT_TYPES

FORMAT, MAJOR, MINOR = "dgemma-graph", 2, 0
ARCHITECTURE = "diffusion-gemma"
TOP_K_TOKENS = 64  # X: likeliest tokens per slot that top-k self-conditioning keeps
KEYS_MULTIPLE = 256  # slots read: GPU kernels of flash attention want whole blocks

RUNTIME = {
    "B": "rows of the batch",
    "T": "tokens per row in this pass; C in denoise, sample and commit",
    "M": "T*B",
    "P": "tokens in the prefix, padding included",
    "S_sliding": "slots a sliding layer reads: P + T rounded up to U, at most R_sliding",
    "S_full": "slots a full layer reads: P + T rounded up to U",
    "R_sliding": "slots a sliding layer stores: W - 1 + the largest T, rounded up to U",
    "R_full": "slots a full layer stores: the longest P + T, rounded up to U",
}
OPTIONS = {  # the first is the default
    "attention": ["flash", "exact"],
    "self_conditioning": ["top-k", "exact"],
    "form": ["gpu", "cpu"],
    "cache_type": ["f16", "f32"],
    "table_type": ["f16", "f32"],
}


def describe(gguf_path: str | Path, top_k: int = TOP_K_TOKENS) -> dict:
    """The description of the model in a GGUF file. Raises DgemmaError.

    top_k: likeliest tokens per slot that `self_conditioning: top-k` keeps.
    """
    return describe_model(open_gguf(gguf_path), top_k)


def describe_model(model: GgufModel, top_k: int = TOP_K_TOKENS) -> dict:
    config, split = model.config, _is_split(model)
    if rope.NAME not in model.file.tensors:
        raise DgemmaError(f"{model.file.path}: {rope.NAME} is missing, expected it for full layers; convert again")
    if top_k < 1:
        raise DgemmaError(f"top-k is {top_k}, expected at least 1")
    kinds = {name: next((x for x in config.layers if x.is_sliding == (name == "sliding")), None) for name in _KINDS}
    return {
        "format": {"name": FORMAT, "major": MAJOR, "minor": MINOR},
        "producer": f"dgemma {_version()}",
        "ggml_min": OLDEST,
        "model": {
            "architecture": ARCHITECTURE,
            "name": str(model.file.get("general.name", "")),
            "fingerprint": fingerprint(model.file),
        },
        "dims": model_dims(config, min(top_k, config.vocab_size)),
        "runtime_dims": RUNTIME,
        "options": OPTIONS,
        "weight_types": {"matrix": list(WEIGHT_TYPES), "vector": ["f32"]},
        "weights": {
            **{row.gguf: _binding(row) for row in MODEL_TENSORS},
            rope.NAME: {"shape": [config.global_head_dim // 2], "types": "vector"},
        },
        "derived": {
            "embedding_columns": {
                "says": "token_embd.weight turned: row h holds what every token has at h",
                "from": "token_embd.weight",
                "transform": "transpose",
                "type": "table_type",
                "shape": ["V", "H"],
                "when": EXACT,
            }
        },
        "persistent": {
            "canvas": {"type": "i32", "shape": ["C*B"], "below": "V"},
            "sc_shares": {"type": "f32", "shape": ["V", "C*B"], "when": EXACT},
            "sc_tokens": {"type": "i32", "shape": ["X", "C*B"], "below": "V", "when": TOP_K},
            "sc_weights": {"type": "f32", "shape": ["X", "C*B"], "when": TOP_K},
        },
        "templates": {
            name: _template(name, layer, config, split) for name, layer in kinds.items() if layer is not None
        },
        "layers": ["sliding" if layer.is_sliding else "full" for layer in config.layers],
        "phases": _phases(config),
    }


_KINDS = ("sliding", "full")


def model_dims(config: ModelConfig, top_k: int) -> dict[str, int]:
    """The dims of a description of this model."""
    return {
        "H": config.hidden_size,
        "I": config.intermediate_size,
        "V": config.vocab_size,
        "E": config.num_experts,
        "F": config.moe_intermediate_size,
        "K": config.top_k_experts,
        "N": config.num_attention_heads,
        "C": config.canvas_length,
        "W": config.sliding_window,
        "X": top_k,
        "U": KEYS_MULTIPLE,
    }


DIMS = {
    "H": "hidden",
    "I": "dense MLP and self-conditioning",
    "V": "vocabulary",
    "E": "experts",
    "F": "one expert",
    "K": "experts per token",
    "N": "query heads",
    "C": "canvas",
    "W": "sliding window",
    "X": "tokens kept by top-k self-conditioning",
    "U": "slots are counted in multiples of this",
    "D": "head_dim of the layer",
    "G": "key-value heads of the layer",
    "S": "slots the layer reads",
    "R": "slots the layer stores",
}

# The letters of tensors.py → sizes here, where D and G are the template's.
_LETTERS = {"Q": "N*D", "K": "G*D", "2F": "2*F", "1": 1}


def _binding(row):
    shape = [_LETTERS.get(letter, letter) for letter in reversed(row.dims.split())]
    return {"shape": shape, "types": "matrix" if row.role in QUANTIZED_ROLES else "vector"}


def _template(kind, layer, config, split):
    rows = [row for row in LAYER_TENSORS if row.layers == "all" or layer.is_sliding]
    weights = {row.gguf: _binding(row) for row in rows}
    if split:
        fused = weights.pop(f"{FUSED}.weight")
        weights |= {f"{name}.weight": {**fused, "shape": ["H", "F", "E"]} for name in SPLIT}
    weights |= {row.gguf: {**_binding(row), "when": ENCODER} for row in ENCODER_LAYER_TENSORS}
    stored = {"type": "cache_type", "shape": ["D*G", "R", "B"]}
    return {
        "weight_prefix": GGUF_LAYER.format(i="{layer}"),
        "dims": {"D": layer.head_dim, "G": layer.num_key_value_heads, "S": f"S_{kind}", "R": f"R_{kind}"},
        "inputs": {"slots": f"slots_{kind}", "mask": f"mask_{kind}"},
        "weights": weights,
        "persistent": {"keys": stored, "values": stored},
        "nodes": layer_nodes(layer, config, split),
    }


def _phases(config):
    step = {
        "uniforms": "one number in (0, 1) per slot",
        "renoise": "a random token per slot; where the token is known, that one",
        "free": "0 where a slot's token is known, else 1",
    }
    number = {"type": "f32", "shape": [1]}
    slot = {"type": "f32", "shape": [1, "M"]}
    return {
        "prefill": {
            "says": "append T tokens to the prefix",
            "options": ENCODER,
            "inputs": {"tokens": {"type": "i32", "shape": ["M"], "below": "V"}, **_layer_inputs(ENCODER_MASKS)},
            "nodes": prefill_nodes(config),
            "outputs": ["output_norm"],
        },
        "denoise": {
            "says": "the canvas sees the prefix and itself; softcapped logits",
            "options": {"pass": "decoder"},
            "sizes": {"T": "C"},
            "inputs": _layer_inputs(DECODER_MASKS),
            "nodes": denoise_nodes(config),
            "outputs": ["logits"],
        },
        "sample": {
            "says": "the entropy-bound step; logits are those of denoise, in the same graph or another",
            "options": {"pass": "decoder"},
            "sizes": {"T": "C"},
            "inputs": {
                "logits": {"type": "f32", "shape": ["V", "M"], "from": "denoise"},
                "temperature": {"type": "f32", "shape": [1, 1, "B"], "says": "of this step, per row"},
                "entropy_bound": {**number, "says": "nats"},
                **{name: {**slot, "says": says} for name, says in step.items()},
            },
            "nodes": sample_nodes(config),
            "outputs": ["draft", "accepted", "entropy", "next_canvas"],
        },
        "commit": {"says": "append the finished canvas to the prefix", "as": "prefill", "sizes": {"T": "C"}},
    }


# A key is seen where every rule of "all" holds, or one of "any". k and q count a row's tokens from its first, padding
# included: the key in slot s is the largest k with k % R == s and k < P + T; query t is P + t.
ENCODER_MASKS = {
    "sliding": {"all": ["k <= q", "k > q - W", "k >= pad"], "any": ["k == q"]},
    "full": {"all": ["k <= q", "k >= pad"], "any": ["k == q"]},
}
DECODER_MASKS = {
    "sliding": {"all": ["k > P - W", "k >= pad"], "any": []},
    "full": {"all": ["k >= pad"], "any": []},
}


def _layer_inputs(masks):
    inputs = {"positions": {"type": "i32", "shape": ["M"], "value": "P + t - pad"}}
    for kind in _KINDS:
        R = f"R_{kind}"
        value = f"(P + t) % {R} + b * {R}"
        inputs[f"slots_{kind}"] = {"type": "i64", "shape": ["M"], "value": value, "below": f"{R}*B"}
        inputs[f"mask_{kind}"] = {
            "type": "f16", "shape": [f"S_{kind}", "T", 1, "B"], "visible": masks[kind], "slots": R,
        }  # fmt: skip
    return inputs


def _is_split(model):
    """Whether the experts' gate and up are stored apart; all layers alike."""
    stored = {len(names) for name, names in model.parts.items() if FUSED in name}
    if len(stored) > 1:
        raise DgemmaError(
            f"{model.file.path}: some layers store gate and up apart, expected all or none; convert again"
        )
    return stored == {2}


def fingerprint(file: GgufFile) -> str:
    """What a file and its description must share: configuration, tensor names and shapes; no types, no vocabulary."""
    keys = ("diffusion-gemma.", "diffusion.canvas_length")
    facts = {name: entry.value for name, entry in file.metadata.items() if name.startswith(keys)}
    shapes = {t.name: list(t.shape) for t in file.tensors.values()}
    text = json.dumps([_float_bits(facts), shapes], sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _float_bits(value):
    """Floats as the 16 hexadecimal digits of their float64: how a language spells a float is its own."""
    if isinstance(value, dict):
        return {name: _float_bits(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_float_bits(v) for v in value]
    return struct.pack(">d", value).hex() if isinstance(value, float) else value


def _version():
    try:
        return version("dgemma")
    except PackageNotFoundError:  # a checkout that was never installed
        return "0"
