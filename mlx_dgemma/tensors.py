"""The one table where a tensor's role, its Hugging Face name, MLX name, GGUF name and dimensions meet.

The checkpoint reader, both writers, the plan, the loader and docs/tensors.md walk these rows; a new tensor is one
new line. `python -m mlx_dgemma.tensors` prints the table as Markdown (docs/tensors.md is its output).

Letters  V vocabulary, H hidden, I dense MLP and self-conditioning, E experts, F one expert, D head_dim of the
         layer, Q query heads x D, K key-value heads x D. Slowest axis first, as in PyTorch.
Source   the released google/diffusiongemma-26B-A4B-it: 1,047 tensors; mlx-vlm 0.7.10 for the MLX names,
         llama.cpp pull request 24423 for the GGUF names
"""

import functools
import math
from typing import NamedTuple

from .config import ModelConfig
from .errors import DgemmaError


class TensorRow(NamedTuple):
    role: str  # a quantization recipe maps role -> precision
    hf: str  # name in the source checkpoint
    mlx: str  # SAME where it is the Hugging Face name
    gguf: str
    dims: str
    layers: str = "all"  # "all", or "sliding" where full-attention layers have no such tensor


SAME = "="

ROLES = {
    "embedding": "token embedding, tied to lm_head and to the self-conditioning product",
    "attention": "q, k, v and o projections",
    "dense": "the dense MLP beside the experts",
    "router": "expert scores",
    "expert": "the experts' fused gate and up, and down projections",
    "self_conditioning": "the MLP that reads the previous step's soft embedding",
    "norm": "RMSNorm weights and router scales; never quantized",
    "scalar": "one output scale per layer and pass; never quantized",
    "vision": "the vision tower; carried along as stored",
}
QUANTIZED_ROLES = ("embedding", "attention", "dense", "router", "expert", "self_conditioning")

# fmt: off
_SELF = "model.decoder.self_conditioning."
MODEL_TENSORS = (
    TensorRow("embedding", "model.decoder.embed_tokens.weight", SAME, "token_embd.weight", "V H"),
    TensorRow("norm", "model.decoder.norm.weight", SAME, "output_norm.weight", "H"),
    TensorRow("norm", _SELF + "pre_norm.weight", SAME, "self_cond_pre_norm.weight", "H"),
    TensorRow("self_conditioning", _SELF + "gate_proj.weight", SAME, "self_cond_gate.weight", "I H"),
    TensorRow("self_conditioning", _SELF + "up_proj.weight", SAME, "self_cond_up.weight", "I H"),
    TensorRow("self_conditioning", _SELF + "down_proj.weight", SAME, "self_cond_down.weight", "H I"),
)

# Inside layer i, after these prefixes; MLX uses the Hugging Face one.
HF_LAYER, GGUF_LAYER = "model.decoder.layers.{i}.", "blk.{i}."
LAYER_TENSORS = (
    TensorRow("norm", "input_layernorm.weight", SAME, "attn_norm.weight", "H"),
    TensorRow("attention", "self_attn.q_proj.weight", SAME, "attn_q.weight", "Q H"),
    TensorRow("attention", "self_attn.k_proj.weight", SAME, "attn_k.weight", "K H"),
    TensorRow("attention", "self_attn.v_proj.weight", SAME, "attn_v.weight", "K H", "sliding"),
    TensorRow("attention", "self_attn.o_proj.weight", SAME, "attn_output.weight", "H Q"),
    TensorRow("norm", "self_attn.q_norm.weight", SAME, "attn_q_norm.weight", "D"),
    TensorRow("norm", "self_attn.k_norm.weight", SAME, "attn_k_norm.weight", "D"),
    TensorRow("norm", "post_attention_layernorm.weight", SAME, "post_attention_norm.weight", "H"),
    TensorRow("norm", "pre_feedforward_layernorm.weight", SAME, "ffn_norm.weight", "H"),
    TensorRow("dense", "mlp.gate_proj.weight", SAME, "ffn_gate.weight", "I H"),
    TensorRow("dense", "mlp.up_proj.weight", SAME, "ffn_up.weight", "I H"),
    TensorRow("dense", "mlp.down_proj.weight", SAME, "ffn_down.weight", "H I"),
    TensorRow("norm", "post_feedforward_layernorm_1.weight", SAME, "post_ffw_norm_1.weight", "H"),
    TensorRow("router", "router.proj.weight", SAME, "ffn_gate_inp.weight", "E H"),
    TensorRow("norm", "router.scale", SAME, "ffn_gate_inp.scale", "H"),
    TensorRow("norm", "router.per_expert_scale", SAME, "ffn_down_exps.scale", "E"),
    TensorRow("norm", "pre_feedforward_layernorm_2.weight", SAME, "pre_ffw_norm_2.weight", "H"),
    TensorRow("expert", "experts.gate_up_proj", "experts.gate_up_proj.weight", "ffn_gate_up_exps.weight", "E 2F H"),
    TensorRow("expert", "experts.down_proj", "experts.down_proj.weight", "ffn_down_exps.weight", "E H F"),
    TensorRow("norm", "post_feedforward_layernorm_2.weight", SAME, "post_ffw_norm_2.weight", "H"),
    TensorRow("norm", "post_feedforward_layernorm.weight", SAME, "post_ffw_norm.weight", "H"),
    TensorRow("scalar", "layer_scalar", SAME, "layer_output_scale.weight", "1"),
)

# What the checkpoint stores for the encoder alone, per layer.
HF_ENCODER_LAYER = "model.encoder.language_model.layers.{i}."
ENCODER_LAYER_TENSORS = (TensorRow("scalar", "layer_scalar", SAME, "enc_layer_output_scale.weight", "1"),)
# fmt: on

VISION_PREFIXES = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")

# Names a checkpoint may store although they are tied to a tensor above or computed from the configuration.
_TIED = ("lm_head.weight", "model.encoder.language_model.")
_COMPUTED = ("rotary_emb", "embed_scale")


class Tensor(NamedTuple):
    """One row for one layer of one model: what a file of that model must hold."""

    role: str
    layer: int | None
    hf: str
    mlx: str
    gguf: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def gguf_part(self) -> str:
        """The GGUF name without layer and ".weight", as llama.cpp's users say it: "ffn_down_exps"."""
        return self.gguf.removesuffix(".weight").rsplit(".", 1)[-1]

    @property
    def recipe_keys(self) -> tuple[str, ...]:
        """What a recipe may call it, the most particular first: blk.3.ffn_down_exps, blk.3.expert, ffn_down_exps, …"""
        general = (self.gguf_part, self.role)
        return general if self.layer is None else (*(f"blk.{self.layer}.{key}" for key in general), *general)


@functools.lru_cache(maxsize=8)
def text_tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Every tensor of the text model, in the order the model uses them."""
    letters = {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "I": config.intermediate_size,
        "E": config.num_experts,
        "F": config.moe_intermediate_size,
        "2F": 2 * config.moe_intermediate_size,
        "1": 1,
    }
    tensors = [_tensor(row, None, letters) for row in MODEL_TENSORS]
    for layer in config.layers:
        letters["D"] = layer.head_dim
        letters["Q"] = config.num_attention_heads * layer.head_dim
        letters["K"] = layer.num_key_value_heads * layer.head_dim
        rows = (row for row in LAYER_TENSORS if row.layers == "all" or layer.is_sliding)
        tensors += [_tensor(row, layer.index, letters, HF_LAYER) for row in rows]
        tensors += [_tensor(row, layer.index, letters, HF_ENCODER_LAYER) for row in ENCODER_LAYER_TENSORS]
    return tuple(tensors)


def vision_tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """The vision tower as its configuration describes it; only a plan made without the weights needs this.

    A checkpoint's own vision tensors are carried along by name (`is_vision`), whatever their number.
    """
    if config.vision is None:
        return ()
    v = config.vision
    hidden, mlp = v["hidden_size"], v["intermediate_size"]
    head = v.get("head_dim") or hidden // v["num_attention_heads"]
    q, kv = v["num_attention_heads"] * head, v.get("num_key_value_heads", v["num_attention_heads"]) * head
    tower = VISION_PREFIXES[0]
    # fmt: off
    layer = {
        "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
        "pre_feedforward_layernorm.weight": (hidden,), "post_feedforward_layernorm.weight": (hidden,),
        "self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,),
        "self_attn.q_proj.linear.weight": (q, hidden), "self_attn.k_proj.linear.weight": (kv, hidden),
        "self_attn.v_proj.linear.weight": (kv, hidden), "self_attn.o_proj.linear.weight": (hidden, q),
        "mlp.gate_proj.linear.weight": (mlp, hidden), "mlp.up_proj.linear.weight": (mlp, hidden),
        "mlp.down_proj.linear.weight": (hidden, mlp),
    }
    # fmt: on
    shapes = {
        tower + "patch_embedder.input_proj.weight": (hidden, 3 * v["patch_size"] ** 2),
        tower + "patch_embedder.position_embedding_table": (2, v["position_embedding_size"], hidden),
        VISION_PREFIXES[1] + "embedding_projection.weight": (config.hidden_size, hidden),
    }
    if v.get("standardize"):
        shapes |= {tower + "std_bias": (hidden,), tower + "std_scale": (hidden,)}
    for i in range(v["num_hidden_layers"]):
        shapes |= {f"{tower}encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    return tuple(Tensor("vision", None, name, name, "", shape) for name, shape in shapes.items())


def is_vision(name: str) -> bool:
    return name.startswith(VISION_PREFIXES)


def is_ignored(name: str) -> bool:
    """True for a stored tensor that is tied to another one or computed: a reader skips it by this name."""
    encoder_scalar = name.startswith(_TIED[1]) and name.endswith(".layer_scalar")
    return (name.startswith(_TIED) and not encoder_scalar) or any(part in name for part in _COMPUTED)


def check_coverage(found, wanted, where: str) -> None:
    """Every wanted name is found and every found name is wanted, vision or ignored by name.

    Raises DgemmaError that names the first few on either side.
    """
    missing = sorted(set(wanted) - set(found))
    unknown = sorted(name for name in set(found) - set(wanted) if not is_vision(name) and not is_ignored(name))
    if missing:
        raise DgemmaError(
            f"{where}: {len(missing)} tensors are missing, the first is {missing[0]}. "
            "The download may be incomplete; fetch the checkpoint again"
        )
    if unknown:
        raise DgemmaError(
            f"{where}: {len(unknown)} tensors are unknown, the first is {unknown[0]}. "
            "config.json and the weights may belong to different models"
        )


def check_shape(name: str, found, expected, where: str) -> None:
    """Raises DgemmaError where a stored shape is not the one config.json implies."""
    if tuple(found) != tuple(expected):
        raise DgemmaError(
            f"{where}: {name} has shape {tuple(found)}, expected {tuple(expected)} from config.json; "
            "the two files may belong to different models"
        )


def _full_names(row, hf_prefix=""):
    """Hugging Face, MLX and GGUF name, `{i}` still standing for the layer."""
    mlx = row.hf if row.mlx == SAME else row.mlx
    return hf_prefix + row.hf, hf_prefix + mlx, (GGUF_LAYER if hf_prefix else "") + row.gguf


def _tensor(row, layer, letters, hf_prefix=""):
    names = (name.format(i=layer) for name in _full_names(row, hf_prefix))
    return Tensor(row.role, layer, *names, tuple(letters[letter] for letter in row.dims.split()))


def markdown() -> str:
    """docs/tensors.md: the table for people."""
    lines = [
        "# Tensors",
        "",
        "Generated by `python -m mlx_dgemma.tensors`; a test keeps it so. `{i}` is the layer. Dimensions are slowest",
        "axis first: V vocabulary, H hidden, I dense MLP, E experts, F one expert, D head_dim of the layer, Q query",
        "heads × D, K key-value heads × D. ggml writes them fastest axis first.",
        "",
        "| role | what it is |",
        "|---|---|",
        *(f"| {role} | {text} |" for role, text in ROLES.items()),
        "",
        "| role | Hugging Face | MLX, where it differs | GGUF | dims | layers |",
        "|---|---|---|---|---|---|",
    ]
    tables = ((MODEL_TENSORS, ""), (LAYER_TENSORS, HF_LAYER), (ENCODER_LAYER_TENSORS, HF_ENCODER_LAYER))
    for rows, prefix in tables:
        for row in rows:
            hf, mlx, gguf = _full_names(row, prefix)
            differs = "" if mlx == hf else f"`{mlx}`"
            lines.append(f"| {row.role} | `{hf}` | {differs} | `{gguf}` | {row.dims} | {row.layers} |")
    lines += [
        "",
        "Not stored, or skipped where a checkpoint stores them: `lm_head.weight` and the encoder's copies of the",
        "decoder's weights (tied), rotary frequencies (computed). Vision tensors (`model.encoder.vision_tower.*`,",
        "`model.encoder.embed_vision.*`) are carried along as stored.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
