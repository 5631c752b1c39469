"""A whole tiny DiffusionGemma in one GGUF file, written by gguf-py alone: an oracle for our readers.

Source   gguf.GGUFWriter and gguf.quantize; keys and their types as in a dump of the published 26B file
Differs  nothing of our GGUF code is used, so that a mistake in it cannot cancel out; tests.tiny has the weights
"""

from pathlib import Path

import gguf
import numpy as np

from mlx_dgemma.config import parse_config
from mlx_dgemma.tensors import text_tensors
from tests.tiny import CHAT_TEMPLATE, from_bfloat16, tiny_config, tiny_tokenizer, tiny_weights, to_bfloat16

A = "diffusion-gemma."
KINDS = gguf.GGUFValueType


def make_tiny_gguf(path, type="F32", dtype="float32", split_experts=False, keys=(), tensors=(), **overrides) -> Path:
    """Write `path` and return it.

    type: of every matrix, one that gguf-py can quantize. dtype: what the weights are rounded to first.
    keys: metadata keys to change, name → None to leave one out, or (GGUFValueType, value[, type of a list's items]).
    tensors: tensors to change, name → None to leave one out, or (array, type name).
    overrides: of tests.tiny.tiny_config.
    """
    raw = tiny_config(**overrides)
    writer = gguf.GGUFWriter(path, "diffusion-gemma")
    writer.kv_data[0].clear()  # the architecture, which is among the keys
    for name, (kind, value, *item) in changed(tiny_keys(raw["text_config"], raw["canvas_length"]), keys).items():
        writer.add_key_value(name, value, kind, *item)
    for name, (values, kind) in changed(tiny_tensors(raw, type, dtype, split_experts), tensors).items():
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def tiny_keys(text: dict, canvas_length: int) -> dict:
    """Every key of a file, written out."""
    u32, f32, string = KINDS.UINT32, KINDS.FLOAT32, KINDS.STRING
    sliding = [kind == "sliding_attention" for kind in text["layer_types"]]
    heads = [text["num_key_value_heads"] if s else text["num_global_key_value_heads"] for s in sliding]
    return {
        "general.architecture": (string, "diffusion-gemma"),
        "general.type": (string, "model"),
        "general.name": (string, "tiny"),
        "general.file_type": (u32, 7),
        "general.quantization_version": (u32, 2),
        A + "block_count": (u32, text["num_hidden_layers"]),
        A + "context_length": (u32, text["max_position_embeddings"]),
        A + "embedding_length": (u32, text["hidden_size"]),
        A + "feed_forward_length": (u32, text["intermediate_size"]),
        A + "attention.head_count": (u32, text["num_attention_heads"]),
        A + "attention.head_count_kv": (KINDS.ARRAY, heads, KINDS.INT32),
        A + "rope.freq_base": (f32, 1e6),
        A + "rope.freq_base_swa": (f32, 1e4),
        A + "attention.layer_norm_rms_epsilon": (f32, text["rms_norm_eps"]),
        A + "expert_count": (u32, text["num_experts"]),
        A + "expert_used_count": (u32, text["top_k_experts"]),
        A + "attention.key_length": (u32, text["global_head_dim"]),
        A + "attention.value_length": (u32, text["global_head_dim"]),
        A + "final_logit_softcapping": (f32, text["final_logit_softcapping"]),
        A + "attention.sliding_window": (u32, text["sliding_window"]),
        A + "attention.shared_kv_layers": (u32, 0),
        A + "embedding_length_per_layer_input": (u32, 0),
        A + "attention.sliding_window_pattern": (KINDS.ARRAY, sliding, KINDS.BOOL),
        A + "attention.key_length_swa": (u32, text["head_dim"]),
        A + "attention.value_length_swa": (u32, text["head_dim"]),
        A + "expert_feed_forward_length": (u32, text["moe_intermediate_size"]),
        A + "rope.dimension_count": (u32, text["global_head_dim"]),
        A + "rope.dimension_count_swa": (u32, text["head_dim"]),
        A + "attention.causal": (KINDS.BOOL, False),
        "diffusion.canvas_length": (u32, canvas_length),
        "diffusion.eb_max_steps": (u32, 8),
        "diffusion.eb_t_min": (f32, 0.4),
        "diffusion.eb_t_max": (f32, 0.8),
        "diffusion.eb_entropy_bound": (f32, 0.1),
        "diffusion.eb_stability_threshold": (u32, 1),
        "diffusion.eb_confidence_threshold": (f32, 0.005),
        **tokenizer_keys(),
    }


def tokenizer_keys() -> dict:
    tokenizer = tiny_tokenizer()
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    tokens = sorted(vocab, key=vocab.get)
    types = [3 if i < 107 else 6 if token.startswith("<0x") else 1 for i, token in enumerate(tokens)]
    ids = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0, "mask": 4}
    return {
        "tokenizer.ggml.model": (KINDS.STRING, "gemma4"),
        "tokenizer.ggml.tokens": (KINDS.ARRAY, tokens, KINDS.STRING),
        "tokenizer.ggml.scores": (KINDS.ARRAY, [-1000.0] * len(tokens), KINDS.FLOAT32),
        "tokenizer.ggml.token_type": (KINDS.ARRAY, types, KINDS.INT32),
        "tokenizer.ggml.merges": (KINDS.ARRAY, [" ".join(pair) for pair in merges], KINDS.STRING),
        **{f"tokenizer.ggml.{name}_token_id": (KINDS.UINT32, i) for name, i in ids.items()},
        "tokenizer.chat_template": (KINDS.STRING, CHAT_TEMPLATE),
        "tokenizer.ggml.add_space_prefix": (KINDS.BOOL, False),
        "tokenizer.ggml.add_bos_token": (KINDS.BOOL, True),
    }


def tiny_tensors(raw: dict, type: str, dtype: str, split_experts: bool) -> dict:
    """GGUF name → (float32 values, type name)."""
    weights, tensors = tiny_weights(raw), {}
    for t in text_tensors(parse_config(raw)):
        values = weights[t.hf]
        if dtype == "bfloat16":
            values = from_bfloat16(to_bfloat16(values))
        is_f32 = len(t.shape) == 1 or t.role == "router"
        kind = "F32" if is_f32 else type
        if split_experts and "gate_up" in t.gguf:
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                tensors[t.gguf.replace("gate_up", part)] = np.ascontiguousarray(half), kind
        else:
            tensors[t.gguf] = values, kind
    pairs = raw["text_config"]["global_head_dim"] // 2
    factors = np.where(np.arange(pairs) < pairs // 4, 1.0, 1e30).astype(np.float32)
    return tensors | {"rope_freqs.weight": (factors, "F32")}


def changed(entries: dict, changes) -> dict:
    entries = entries | dict(changes)
    return {name: entry for name, entry in entries.items() if entry is not None}
