"""MLX recipes: which precision each tensor role gets.

Source   mlx.core.quantize for modes, bits and group sizes; the published mixed 4-bit checkpoints and mlx-vlm 0.7.10's
         quant_predicate for the q4 mixture

A recipe's name is the precision of the experts and of self-conditioning; 91 % of the weights are expert weights, so
they decide the size. Embeddings, attention, the dense MLP and the router stay at 8 bits everywhere (8.5 bits per
weight with their scales): they are 9 % of the weights and read at every step. This is the published 4-bit mixture,
and what mlx-vlm does for every mode.

Three kinds of tensor are outside every quantized recipe: norms and scalars keep the source's values bit by bit, and so
does the vision tower. So a quantized folder of a bfloat16 source has bfloat16 norms and scales; one of a float32
source has float32 norms and scales, because rounding them would be a second, unasked-for quantization.
"""

import dataclasses
from dataclasses import dataclass

from mlx_dgemma.tensors import QUANTIZED_ROLES, Tensor

FLOAT, KEEP = "float", "keep"  # modes without groups: cast to one dtype; leave as stored


@dataclass(frozen=True, slots=True)
class Precision:
    """How one tensor is stored."""

    name: str  # what a recipe says
    mode: str  # "affine", "mxfp8", "mxfp4", "nvfp4", FLOAT or KEEP
    bits: int = 0  # per weight, scales not counted
    group_size: int = 0  # weights of one row that share a scale
    dtype: str = ""  # FLOAT: safetensors' tag

    @property
    def is_quantized(self) -> bool:
        return self.mode not in (FLOAT, KEEP)

    def fits(self, row: int) -> bool:
        """A row is cut into whole groups."""
        return not self.is_quantized or row % self.group_size == 0


def _affine(bits, group_size=64):
    suffix = "" if group_size == 64 else f"-g{group_size}"
    return Precision(f"q{bits}{suffix}", "affine", bits, group_size)


AS_STORED = Precision("as stored", KEEP)
PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp32", FLOAT, dtype="F32"),
        Precision("bf16", FLOAT, dtype="BF16"),
        *(_affine(bits, group) for group in (64, 32, 128) for bits in (8, 6, 5, 4, 3, 2)),
        Precision("mxfp8", "mxfp8", 8, 32),
        Precision("mxfp4", "mxfp4", 4, 32),
        Precision("nvfp4", "nvfp4", 4, 16),
    )
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Role → precision."""

    name: str
    summary: str
    roles: dict[str, Precision]
    rest: Precision = AS_STORED  # norms and scalars
    overrides: dict[str, Precision] = dataclasses.field(default_factory=dict)  # by Tensor.recipe_keys; before `roles`

    def precision(self, tensor: Tensor) -> Precision:
        """What the recipe wants for a tensor, before `fallback` looks at its row."""
        if tensor.role == "vision":
            return AS_STORED
        for key in tensor.recipe_keys:
            if key in self.overrides:
                return self.overrides[key]
        return self.roles.get(tensor.role, self.rest)


def fallback(precision: Precision, row: int) -> Precision:
    """The nearest precision whose groups fit a row: a group of 32 for affine, else as stored."""
    if precision.fits(row):
        return precision
    if precision.mode == "affine" and row % 32 == 0:
        return _affine(precision.bits, 32)
    return AS_STORED


def _mixture(name, summary, experts, self_conditioning=None):
    roles = dict.fromkeys(QUANTIZED_ROLES, PRECISIONS["q8"])
    roles["expert"] = PRECISIONS[experts]
    roles["self_conditioning"] = PRECISIONS[self_conditioning or experts]
    return Recipe(name, summary, roles)


def _uniform(name, summary):
    precision = PRECISIONS[name]
    return Recipe(name, summary, dict.fromkeys(QUANTIZED_ROLES, precision), rest=precision)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _uniform("bf16", "no quantization, bfloat16"),
        _uniform("fp32", "no quantization, float32"),
        _mixture("q8", "8-bit affine, groups of 64, everywhere", "q8"),
        _mixture("q6", "experts and self-conditioning 6-bit affine, the rest 8-bit", "q6"),
        _mixture("q5", "experts and self-conditioning 5-bit affine, the rest 8-bit", "q5"),
        _mixture("q4", "the published mixture: experts and self-conditioning 4-bit affine, the rest 8-bit", "q4"),
        _mixture("q3", "experts 3-bit affine, self-conditioning 4-bit, the rest 8-bit", "q3", "q4"),
        _mixture("mxfp8", "experts and self-conditioning mxfp8, the rest 8-bit affine", "mxfp8"),
        _mixture("mxfp4", "experts and self-conditioning mxfp4, the rest 8-bit affine", "mxfp4"),
        _mixture("nvfp4", "experts and self-conditioning nvfp4, the rest 8-bit affine", "nvfp4"),
    )
}
