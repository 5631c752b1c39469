"""GGUF recipes: which ggml type each tensor gets, as llama-quantize chooses it.

Source   llama.cpp, src/llama-quant.cpp: llama_tensor_get_type_impl, tensor_type_fallback, tensor_allows_quantization
Differs  only what this architecture can meet is here (tied embeddings, no fused qkv), and as data: a recipe is a base
         type and rules, the first that holds wins. tests/test_recipes_gguf.py compares with a transcript of the C++

A recipe's name is llama-quantize's. Not quantized in any recipe: norms, scales, scalars and the router, which are F32.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from mlx_dgemma.config import ModelConfig
from mlx_dgemma.gguf.types import TYPES, Type
from mlx_dgemma.tensors import QUANTIZED_ROLES, Tensor

# llama.cpp wants the router's weight in F32, whatever the recipe.
GGUF_QUANTIZED_ROLES = tuple(role for role in QUANTIZED_ROLES if role != "router")


class Rule(NamedTuple):
    tensor: str  # how the GGUF name goes on after its layer: "ffn_down" is ffn_down.weight and ffn_down_exps.weight
    type: str
    when: str = "always"


class Place(NamedTuple):
    """What a condition may ask: the tensor is the i-th of n, in a model of so many experts."""

    i: int  # layer; for attn_v counted over the layers that have one
    n: int
    config: ModelConfig
    imatrix: bool


WHEN = {
    "always": lambda p: True,
    "more bits": lambda p: p.i < p.n // 8 or p.i >= 7 * p.n // 8 or (p.i - p.n // 8) % 3 == 2,
    "first eighth": lambda p: p.i < p.n // 8,
    "first eighth, imatrix": lambda p: p.i < p.n // 8 and p.imatrix,
    "first eighth, no imatrix": lambda p: p.i < p.n // 8 and not p.imatrix,
    "first sixteenth": lambda p: p.i < p.n // 16,
    "first two": lambda p: p.i < 2,
    "first four": lambda p: p.i < 4,
    "8 experts": lambda p: p.config.num_experts == 8,
    # Of the first layer, which is a sliding one.
    "4 queries per key": lambda p: p.config.num_attention_heads >= 4 * p.config.layers[0].num_key_value_heads,
}


class GgufRecipe(NamedTuple):
    name: str
    file_type: int  # general.file_type, llama.cpp's llama_ftype
    summary: str
    base: str
    rules: tuple[Rule, ...] = ()
    overrides: Mapping[str, str] = MappingProxyType({})  # by Tensor.recipe_keys; before every rule

    def type(self, tensor: Tensor, place: Place) -> Type:
        """What the recipe wants for a tensor, before `fallback` looks at its row."""
        if not is_quantizable(tensor):
            return TYPES["F32"]
        for key in tensor.recipe_keys:
            if key in self.overrides:
                return TYPES[self.overrides[key]]
        name = tensor.gguf_part
        for rule in self.rules:
            if name.startswith(rule.tensor) and WHEN[rule.when](place):
                return TYPES[rule.type]
        return TYPES[self.base]


# A row that is not a whole number of blocks takes the next type of blocks of 32; if that fails too, F16.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


def fallback(type: Type, row: int) -> Type:
    """The type a row of this length gets instead, or `type` where it fits."""
    if row % type.block == 0:
        return type
    second = TYPES[FALLBACKS.get(type.name, "F16")]
    return second if row % second.block == 0 else TYPES["F16"]


def is_quantizable(tensor: Tensor) -> bool:
    return tensor.role in GGUF_QUANTIZED_ROLES


# fmt: off
_EMBEDDING = Rule("token_embd", "Q6_K")  # tied to the output, so it gets the output's type
_EIGHT = (Rule("attn_v", "Q8_0", "8 experts"), Rule("attn_k", "Q8_0", "8 experts"))
_EIGHT_MIXED = (*_EIGHT, Rule("attn_output", "Q5_K", "8 experts"))
_SIMPLE = (_EMBEDDING, *_EIGHT)

RECIPES = {r.name: r for r in (
    GgufRecipe("F32", 0, "no quantization, float32", "F32"),
    GgufRecipe("BF16", 32, "no quantization, bfloat16: what the released checkpoint holds", "BF16"),
    GgufRecipe("F16", 1, "no quantization, float16", "F16"),
    GgufRecipe("Q8_0", 7, "8-bit blocks of 32; nearly lossless", "Q8_0", _EIGHT),
    GgufRecipe("Q6_K", 18, "6-bit K-quant", "Q6_K", _SIMPLE),
    GgufRecipe("Q5_K_M", 17, "5-bit K-quant, Q6_K for half of attn_v and ffn_down", "Q5_K", (
        *_SIMPLE, Rule("attn_v", "Q6_K", "more bits"), Rule("ffn_down", "Q6_K", "more bits"),
    )),
    GgufRecipe("Q5_K_S", 16, "5-bit K-quant", "Q5_K", _SIMPLE),
    GgufRecipe("Q5_1", 9, "5-bit blocks of 32 with minimum", "Q5_1", _SIMPLE),
    GgufRecipe("Q5_0", 8, "5-bit blocks of 32", "Q5_0", (
        *_SIMPLE, Rule("ffn_down", "Q5_1", "first eighth, imatrix"),
    )),
    GgufRecipe("Q4_K_M", 15, "4-bit K-quant, Q6_K for half of attn_v and ffn_down; the usual choice", "Q4_K", (
        _EMBEDDING, *_EIGHT_MIXED, Rule("attn_v", "Q6_K", "more bits"), Rule("ffn_down", "Q6_K", "more bits"),
    )),
    GgufRecipe("Q4_K_S", 14, "4-bit K-quant, Q5_K for the first attn_v and ffn_down", "Q4_K", (
        _EMBEDDING, *_EIGHT_MIXED, Rule("attn_v", "Q5_K", "first four"), Rule("ffn_down", "Q5_K", "first eighth"),
    )),
    GgufRecipe("Q4_1", 3, "4-bit blocks of 32 with minimum", "Q4_1", _SIMPLE),
    GgufRecipe("Q4_0", 2, "4-bit blocks of 32", "Q4_0", (
        *_SIMPLE, Rule("ffn_down", "Q4_1", "first eighth, imatrix"),
    )),
    GgufRecipe("IQ4_NL", 25, "4-bit with a table of values, blocks of 32", "IQ4_NL", (
        _EMBEDDING, *_EIGHT_MIXED, Rule("attn_v", "Q5_K", "4 queries per key"),
        Rule("ffn_down", "Q5_K", "first eighth, no imatrix"),
    )),
    GgufRecipe("IQ4_XS", 30, "4-bit with a table of values, blocks of 256", "IQ4_XS", (
        _EMBEDDING, *_EIGHT_MIXED, Rule("attn_v", "Q5_K", "4 queries per key"),
        Rule("ffn_down", "Q5_K", "first eighth, no imatrix"),
    )),
    GgufRecipe("MXFP4", 38, "experts MXFP4, the rest Q8_0 (llama-quantize's MXFP4_MOE)", "Q8_0", (
        Rule("ffn_gate_up_exps", "MXFP4"), Rule("ffn_down_exps", "MXFP4"),
    )),
    GgufRecipe("Q3_K_M", 12, "3-bit K-quant, 4- and 5-bit for attn_v, attn_output and ffn_down", "Q3_K", (
        _EMBEDDING, *_EIGHT_MIXED, Rule("attn_v", "Q5_K", "first two"), Rule("attn_v", "Q4_K"),
        Rule("ffn_down", "Q5_K", "first sixteenth"), Rule("ffn_down", "Q4_K"), Rule("attn_output", "Q4_K"),
    )),
    GgufRecipe("Q2_K", 10, "2-bit K-quant, 3-bit for attn_v, attn_output and ffn_down", "Q2_K", (
        _EMBEDDING, *_EIGHT_MIXED, Rule("attn_v", "Q4_K", "4 queries per key"), Rule("attn_v", "Q3_K"),
        Rule("ffn_down", "Q3_K"), Rule("attn_output", "Q3_K"),
    )),
)}
# fmt: on
