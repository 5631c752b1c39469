"""What a GGUF says of model and sampler: one table of keys for both directions. vocabulary.py has the tokenizer's.

Source   the keys of the published files, which are llama.cpp pull request 24423's; gguf-py for general.size_label
Differs  the published files lack diffusion.eb_*: written here, and the reference's defaults where a file has none.
         No key holds max_new_tokens, the vision tower or the dtype: read back as the default, none and bfloat16
"""

import math
import reprlib
from typing import NamedTuple

import numpy as np

from ..config import FULL, SLIDING, GenerationConfig, ModelConfig
from ..errors import DgemmaError
from ..tensors import text_tensors
from . import rope
from .reader import GgufFile, Value

ARCHITECTURE = "diffusion-gemma"
MAX_LAYERS = 10_000  # what parse_config accepts, checked before a list of that length is made
RELEASED_FACTOR = 0.25
NEXT = "convert the checkpoint again, or download another file"


class Key(NamedTuple):
    type: str
    field: str  # of ModelConfig, LayerConfig or GenerationConfig; several keys may hold one field


_A = ARCHITECTURE + "."
MODEL_KEYS = {
    _A + "block_count": Key("u32", "num_hidden_layers"),
    _A + "context_length": Key("u32", "max_position_embeddings"),
    _A + "embedding_length": Key("u32", "hidden_size"),
    _A + "feed_forward_length": Key("u32", "intermediate_size"),
    _A + "attention.head_count": Key("u32", "num_attention_heads"),
    _A + "attention.key_length": Key("u32", "global_head_dim"),
    _A + "attention.value_length": Key("u32", "global_head_dim"),
    _A + "attention.key_length_swa": Key("u32", "head_dim"),
    _A + "attention.value_length_swa": Key("u32", "head_dim"),
    _A + "attention.layer_norm_rms_epsilon": Key("f32", "rms_norm_eps"),
    _A + "attention.sliding_window": Key("u32", "sliding_window"),
    _A + "expert_count": Key("u32", "num_experts"),
    _A + "expert_used_count": Key("u32", "top_k_experts"),
    _A + "expert_feed_forward_length": Key("u32", "moe_intermediate_size"),
    _A + "rope.freq_base": Key("f32", "full_rope_theta"),
    _A + "rope.freq_base_swa": Key("f32", "sliding_rope_theta"),
    _A + "rope.dimension_count": Key("u32", "global_head_dim"),
    _A + "rope.dimension_count_swa": Key("u32", "head_dim"),
    _A + "final_logit_softcapping": Key("f32", "final_logit_softcapping"),
    "diffusion.canvas_length": Key("u32", "canvas_length"),
}
# One value per layer.
KV_HEADS, IS_SLIDING = _A + "attention.head_count_kv", _A + "attention.sliding_window_pattern"
LAYER_KEYS = {KV_HEADS: Key("arr[i32]", "num_key_value_heads"), IS_SLIDING: Key("arr[bool]", "is_sliding")}
# The same in every DiffusionGemma: llama.cpp reads this architecture with Gemma 4's code, which asks for them.
FIXED = {
    _A + "attention.shared_kv_layers": Value("u32", 0),
    _A + "embedding_length_per_layer_input": Value("u32", 0),
    _A + "attention.causal": Value("bool", False),
}
SAMPLER_KEYS = {
    "diffusion.eb_max_steps": Key("u32", "max_denoising_steps"),
    "diffusion.eb_t_min": Key("f32", "t_min"),
    "diffusion.eb_t_max": Key("f32", "t_max"),
    "diffusion.eb_entropy_bound": Key("f32", "entropy_bound"),
    "diffusion.eb_stability_threshold": Key("u32", "stability_threshold"),
    "diffusion.eb_confidence_threshold": Key("f32", "confidence_threshold"),
}

TOKENS = "tokenizer.ggml.tokens"
# config.json's name → the key, and the id where a file lacks it.
SPECIAL_IDS = {
    "pad_token_id": ("tokenizer.ggml.padding_token_id", 0),
    "bos_token_id": ("tokenizer.ggml.bos_token_id", 2),
    "eos_token_id": ("tokenizer.ggml.eos_token_id", 1),
}
STOP_TOKENS = ("<eos>", "<turn|>", "<|tool_response>")
# config.json's name → the token it is, and the released id for a vocabulary without it.
IMAGE_TOKENS = {
    "boi_token_id": ("<|image>", 255_999),
    "eoi_token_id": ("<image|>", 258_882),
    "image_token_id": ("<|image|>", 258_880),
}

# What another general.architecture is, and what to do with it.
OTHERS = {
    "imatrix": "this is an importance matrix: give the model itself, and this file with --imatrix",
    "clip": "this is a vision projector (mmproj): give the text model's file",
    "dream": "Dream is another diffusion model; run it with llama-diffusion-cli",
    "llada": "LLaDA is another diffusion model; run it with llama-diffusion-cli",
    "llada-moe": "LLaDA is another diffusion model; run it with llama-diffusion-cli",
}
OTHER = "only DiffusionGemma files work here; models that generate one token at a time run with llama.cpp's llama-cli"


def metadata(config: ModelConfig, generation: GenerationConfig, name: str, file_type: int) -> dict[str, Value]:
    """Every key but the tokenizer's. file_type: llama.cpp's llama_ftype, as 15 for Q4_K_M."""
    keys = {
        "general.architecture": Value("str", ARCHITECTURE),
        "general.type": Value("str", "model"),
        "general.name": Value("str", name),
        "general.size_label": Value("str", size_label(config)),
        "general.file_type": Value("u32", file_type),
        "general.quantization_version": Value("u32", 2),
    }
    keys |= {key: Value(row.type, getattr(config, row.field)) for key, row in MODEL_KEYS.items()}
    for key, row in LAYER_KEYS.items():
        keys[key] = Value(row.type, [getattr(layer, row.field) for layer in config.layers])
    return keys | FIXED | {key: Value(row.type, getattr(generation, row.field)) for key, row in SAMPLER_KEYS.items()}


def size_label(config: ModelConfig) -> str:
    """Experts × weights outside the experts plus one expert's: "128x2.6B"."""
    from gguf.utility import size_label

    tensors = [(t.size, t.role == "expert") for t in text_tensors(config)]
    shared = sum(size for size, is_expert in tensors if not is_expert)
    expert = sum(size for size, is_expert in tensors if is_expert) // config.num_experts
    return size_label(shared + expert * config.num_experts, shared, expert, config.num_experts)


def read_metadata(file: GgufFile) -> tuple[dict, dict]:
    """config.json and generation_config.json as the released checkpoint spells them. Raises DgemmaError."""
    check_architecture(file)
    return _config(file), _generation(file)


def check_architecture(file: GgufFile) -> None:
    """Raises DgemmaError that says what the file is instead of a DiffusionGemma."""
    found = "imatrix" if file.get("general.type") == "imatrix" else file.get("general.architecture")
    if found != ARCHITECTURE:
        raise _wrong(file, "general.architecture", found, repr(ARCHITECTURE), OTHERS.get(str(found), OTHER))


def _config(file):
    for key, value in FIXED.items():
        if (found := file.get(key, value.value)) != value.value:
            raise _wrong(file, key, found, f"{value.value} as in every DiffusionGemma")
    fields = _fields(file, MODEL_KEYS)
    # llama.cpp's rule, too: without lengths of their own, sliding layers have those of the full-attention layers.
    fields.setdefault("head_dim", fields.get("global_head_dim"))
    for key, row in MODEL_KEYS.items():
        if fields.get(row.field) is None:
            raise DgemmaError(f"{file.path}: found no metadata key {key}, expected it in every DiffusionGemma; {NEXT}")
    canvas_length = fields.pop("canvas_length")
    sliding_theta, full_theta = fields.pop("sliding_rope_theta"), fields.pop("full_rope_theta")
    factor = _rotary_factor(file, fields["global_head_dim"])
    # What transformers and mlx-vlm look for besides what the model needs.
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "dtype": "bfloat16",
        "canvas_length": canvas_length,
        **{name: _token_id(file, token, released) for name, (token, released) in IMAGE_TOKENS.items()},
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "diffusion_gemma_text",
            "dtype": "bfloat16",
            "vocab_size": _vocab_size(file),
            **fields,
            **_layers(file, fields["num_hidden_layers"]),
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": sliding_theta},
                FULL: {"rope_type": "proportional", "partial_rotary_factor": factor, "rope_theta": full_theta},
            },
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "use_bidirectional_attention": None,  # between image tokens, of which a text model has none
            "tie_word_embeddings": True,
            **_special_ids(file),
        },
        "vision_config": None,
    }


def _generation(file):
    defaults = GenerationConfig()
    fields = {row.field: getattr(defaults, row.field) for row in SAMPLER_KEYS.values()} | _fields(file, SAMPLER_KEYS)
    bound = fields.pop("entropy_bound")
    ids = _special_ids(file)
    stop = [token_id for token in STOP_TOKENS if (token_id := _token_id(file, token)) is not None]
    if ids["eos_token_id"] not in stop:
        stop.insert(0, ids["eos_token_id"])
    return {
        "max_new_tokens": defaults.max_new_tokens,
        **fields,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": bound},
        **ids,
        "eos_token_id": stop,
    }


def _layers(file, n_layers):
    """What the per-layer keys say, as config.json does: once for sliding, once for full-attention layers."""
    if not 0 < n_layers <= MAX_LAYERS:
        raise _wrong(file, _A + "block_count", n_layers, f"1 to {MAX_LAYERS}")
    sliding, heads = file.get(IS_SLIDING), file.get(KV_HEADS)
    if not isinstance(sliding, list) or len(sliding) != n_layers or not all(isinstance(s, bool) for s in sliding):
        raise _wrong(file, IS_SLIDING, sliding, f"{n_layers} times true or false")
    if _is_number(heads):  # one number for all layers
        heads = [heads] * n_layers
    if not isinstance(heads, list) or len(heads) != n_layers or not all(_is_number(n) for n in heads):
        raise _wrong(file, KV_HEADS, heads, f"{n_layers} whole numbers")
    kinds = {kind: {n for n, s in zip(heads, sliding, strict=True) if s == kind} for kind in (True, False)}
    if any(len(found) > 1 for found in kinds.values()):
        raise _wrong(file, KV_HEADS, heads, "one number for all sliding and one for all full-attention layers")
    (full,) = kinds[False] or {None}  # parse_config refuses a model without full-attention layers
    return {
        "num_key_value_heads": next(iter(kinds[True]), full),
        "num_global_key_value_heads": full,
        "layer_types": [SLIDING if s else FULL for s in sliding],
    }


def _vocab_size(file):
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        found = "no such tensor" if embedding is None else f"shape {embedding.shape}"
        raise DgemmaError(f"{file.path}: token_embd.weight: found {found}, expected (vocabulary, hidden); {NEXT}")
    return embedding.shape[0]


def _rotary_factor(file, head_dim):
    """The share of a full-attention layer's frequency pairs that rotate; the released model's where nothing says it."""
    if rope.NAME not in file.tensors:
        return RELEASED_FACTOR
    stored, pairs = file.tensors[rope.NAME], head_dim // 2
    if stored.type.name != "F32" or stored.shape != (pairs,):
        found = f"{stored.type.name} of shape {stored.shape}"
        raise DgemmaError(f"{file.path}: {rope.NAME} is {found}, expected F32 of shape {(pairs,)}; {NEXT}")
    factors = file.rows(rope.NAME).view(np.float32).ravel()
    rotated = int((factors == 1).sum())
    # What divides a frequency by so much stops it, whatever the number is exactly.
    if not rotated or not (factors[:rotated] == 1).all() or not (factors[rotated:] > 1e9).all():
        raise DgemmaError(
            f"{file.path}: {rope.NAME} holds {reprlib.repr(factors.tolist())}, expected ones, then {rope.STILL:g}; "
            f"{NEXT}"
        )
    # Numbers are rounded down to pairs when the factor is used, so 0.25 fits where r / p is a little less.
    candidates = (RELEASED_FACTOR, rotated / pairs, math.nextafter(rotated / pairs, 1))
    return next(factor for factor in candidates if int(factor * head_dim // 2) == rotated)


def _special_ids(file):
    ids = {}
    for name, (key, default) in SPECIAL_IDS.items():
        ids[name] = default if key not in file.metadata else _number(file, key, "u32")
    return ids


def _token_id(file, token, default=None):
    tokens = file.get(TOKENS)
    return tokens.index(token) if isinstance(tokens, list) and token in tokens else default


def _fields(file, rows: dict[str, Key]) -> dict:
    """Field → value, for the keys that the file has. Keys of one field must agree."""
    fields, said_by = {}, {}
    for key, row in rows.items():
        if key not in file.metadata:
            continue
        value = _number(file, key, row.type)
        if fields.setdefault(row.field, value) != value:
            raise _wrong(file, key, value, f"{fields[row.field]} as {said_by[row.field]} says")
        said_by.setdefault(row.field, key)
    return fields


def _number(file, key, type):
    value = file.get(key)
    if not _is_number(value, float if type == "f32" else int):
        raise _wrong(file, key, value, "a number" if type == "f32" else "a whole number")
    # The shortest decimal: 1e-06, not 9.999999974752427e-07.
    return float(str(np.float32(value))) if type == "f32" else value


def _is_number(value, type=int):
    return isinstance(value, int | type) and not isinstance(value, bool) and 0 <= value < 1e38


def _wrong(file, key, found, expected, next_step=NEXT):
    return DgemmaError(f"{file.path}: {key} is {reprlib.repr(found)}, expected {expected}; {next_step}")
