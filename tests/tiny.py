"""Seeded tiny checkpoints in the released layout, made with numpy alone.

Shapes   6 layers (5 sliding, 1 full), hidden 64, 8 experts of 64 (2 per token), dense MLP 192, vocabulary 384, C 16
         4 heads; sliding: 2 KV of 16, window 16; full: 1 KV of 32. Every row is a multiple of 64, so that each
         quantization group fits; an override such as moe_intermediate_size=96 or 72 makes one that does not.
Source   transformers 5.23.0 for names and layout, mlx_dgemma/tensors.py for the list
Differs  weights are drawn so that the model is well-conditioned: the attention scale is 1.0, so q/k-norm weights near 1
         would make rounding errors explode; post-norms are about 0.3, router logits of order 1, and the encoder's
         scalars differ from the decoder's. numpy's RandomState is used because its stream is frozen: golden files
         stay right whatever numpy comes.
"""

import io
import json
import zlib
from pathlib import Path

import numpy as np

from mlx_dgemma.config import parse_config
from mlx_dgemma.tensors import text_tensors, vision_tensors

VOCAB = 384  # 107 special ids, 256 bytes, a space, 10 letters, 10 merged pieces


def tiny_config(vision=False, spelling="released", dtype="float32", **overrides) -> dict:
    """config.json of a tiny model. `overrides` are text_config keys, or canvas_length."""
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "num_experts": 8,
        "top_k_experts": 2,
        "sliding_window": 16,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 4096,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": "vision" if vision else None,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
        "dtype": dtype,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
        },
    }
    canvas_length = overrides.pop("canvas_length", 16)
    text |= overrides
    n_layers = text["num_hidden_layers"]
    text.setdefault("layer_types", ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(n_layers)])
    if spelling == "per_layer":
        heads = {"head_dim": text.pop("global_head_dim"), "num_key_value_heads": text.pop("num_global_key_value_heads")}
        text["per_layer_config"] = {
            str(i): heads for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"
        }
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "dtype": dtype,
        "canvas_length": canvas_length,
        "boi_token_id": 5,
        "eoi_token_id": 6,
        "image_token_id": 7,
        "vision_soft_tokens_per_image": 4,
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": _vision_config() if vision else None,
    }


def make_tiny_checkpoint(
    folder, seed=0, dtype="float32", vision=False, shards=1, spelling="released", **overrides
) -> Path:
    """Write a whole checkpoint folder: weights, both configurations, tokenizer and chat template. Returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = tiny_config(vision, spelling, dtype, **overrides)
    write_json(folder / "config.json", raw)
    write_json(folder / "generation_config.json", GENERATION_CONFIG)
    write_json(folder / "tokenizer.json", tiny_tokenizer())
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_weights(folder, tiny_weights(raw, seed), dtype, shards)
    return folder


def tiny_weights(raw: dict, seed=0) -> dict[str, np.ndarray]:
    """Hugging Face name → float32 array, for the model that `raw` (a config.json) describes."""
    config = parse_config(raw)
    tensors = text_tensors(config) + vision_tensors(config)
    return {t.hf: _values(t, seed) for t in tensors}


def write_weights(folder, weights: dict[str, np.ndarray], dtype="float32", shards=1) -> None:
    """model.safetensors, or `shards` files and their index."""
    names = list(weights)
    if shards == 1:
        write_safetensors(Path(folder) / "model.safetensors", weights, dtype)
        return
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        part = {name: weights[name] for name in names if weight_map[name] == file}
        write_safetensors(Path(folder) / file, part, dtype)
    total = sum(a.size for a in weights.values()) * (2 if dtype == "bfloat16" else 4)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(Path(folder) / "model.safetensors.index.json", index)


def write_safetensors(path, weights: dict[str, np.ndarray], dtype="float32", metadata=None) -> None:
    """float32 arrays into one file, rounded to bfloat16 where `dtype` says so."""

    header, blobs, end = {"__metadata__": metadata or {"format": "pt"}}, [], 0
    for name, array in weights.items():
        data = to_bfloat16(array) if dtype == "bfloat16" else np.ascontiguousarray(array, np.float32)
        start, end = end, end + data.nbytes
        tag = "BF16" if dtype == "bfloat16" else "F32"
        header[name] = {"dtype": tag, "shape": list(array.shape), "data_offsets": [start, end]}
        blobs.append(data.tobytes())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def to_bfloat16(array) -> np.ndarray:
    """float32 → the upper 16 bits, rounded to nearest, ties to even. uint16"""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits) -> np.ndarray:
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def write_json(path, value) -> None:
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _values(tensor, seed):
    """One draw per (seed, name): adding or resizing a tensor leaves the others as they were."""
    draw = np.random.RandomState((zlib.crc32(tensor.hf.encode()) + seed) % 2**32).standard_normal(tensor.shape)
    last = tensor.hf.removesuffix(".weight").rsplit(".", 1)[-1]
    if tensor.role == "scalar":  # near 1, and not the same in the two passes
        centre = 1.03 if tensor.hf.startswith("model.encoder") else 0.97
        values = centre + 0.02 * draw
    elif last in ("q_norm", "k_norm"):
        values = 0.45 * (1 + 0.1 * draw)
    elif last.startswith("post_") and tensor.role == "norm":
        values = 0.3 * (1 + 0.1 * draw)
    elif tensor.role == "norm" or len(tensor.shape) == 1:
        values = 1 + 0.1 * draw
    elif tensor.role == "router":  # its input carries hidden^-0.5 already
        values = draw
    else:
        values = draw * tensor.shape[-1] ** -0.5
    return values.astype(np.float32)


def _vision_config():
    return {
        "model_type": "gemma4_vision",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 4,
        "pooling_kernel_size": 3,
        "position_embedding_size": 16,
        "standardize": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
    }


GENERATION_CONFIG = {
    "bos_token_id": 2,
    "pad_token_id": 0,
    "eos_token_id": [1, 106, 50],
    "max_new_tokens": 32,
    "max_denoising_steps": 8,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "clean_up_tokenization_spaces": False,
}

# The released ids that matter; every other id below 107 is an <unusedN>.
SPECIAL_IDS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|image>": 5,
    "<image|>": 6,
    "<|image|>": 7,
    "<|video|>": 8,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
}


def tiny_tokenizer() -> dict:
    """tokenizer.json: byte-fallback BPE with Gemma 4's special ids. VOCAB tokens"""
    by_id = {i: token for token, i in SPECIAL_IDS.items()}
    specials = [by_id.get(i, f"<unused{i}>") for i in range(107)]
    merges = ["t h", "th e", "a n", "an d", "i n", "e r", "o n", "r e", "▁ a", "▁ the"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *"theanirosd"]
    pieces += [merge.replace(" ", "") for merge in merges]
    vocab = {token: i for i, token in enumerate(specials + pieces)}
    assert len(vocab) == VOCAB, len(vocab)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(specials)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def tiny_sentencepiece(**options) -> bytes:
    """tokenizer.model: the same special ids and bytes, and pieces trained on the spot; at most VOCAB tokens.

    options: of SentencePieceTrainer.
    """
    import sentencepiece

    by_id = {i: token for token, i in SPECIAL_IDS.items()}
    model = io.BytesIO()
    settings = {
        "sentence_iterator": iter(["the sand and the tin", "and the sand is red"] * 50),
        "model_writer": model,
        "vocab_size": VOCAB,
        "hard_vocab_limit": False,
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "user_defined_symbols": [by_id.get(i, f"<unused{i}>") for i in range(4, 107)],
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(**settings | options)
    return model.getvalue()


CHAT_TEMPLATE = """\
{%- macro strip_thought(text) -%}
  {%- for part in text.split('<channel|>') -%}
    {{- part.split('<|channel>')[0] -}}
  {%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set thinking = enable_thinking is defined and enable_thinking -%}
{%- set has_system = messages and messages[0]['role'] == 'system' -%}
{%- if thinking or has_system -%}
  {{- '<|turn>system\\n' -}}
  {%- if thinking -%}{{- '<|think|>\\n' -}}{%- endif -%}
  {%- if has_system -%}{{- messages[0]['content'] | trim -}}{%- endif -%}
  {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in (messages[1:] if has_system else messages) -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '<|turn>model\\n' + strip_thought(message['content']) | trim + '<turn|>\\n' -}}
  {%- else -%}
    {{- '<|turn>' + message['role'] + '\\n' + message['content'] | trim + '<turn|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|turn>model\\n' -}}
  {%- if not thinking -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}
{%- endif -%}
"""
