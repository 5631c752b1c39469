"""What a GGUF will hold, before a weight is read: tensors, types, bytes.

Source   llama.cpp's llama-quantize, which prints the same sizes; recipes_gguf.py has its rules
Differs  pure, and needs config.json only
"""

import dataclasses
import math
from collections import Counter

import numpy as np

from gguf_export.quantize import IGNORE_IMPORTANCE
from mlx_dgemma.config import ModelConfig
from mlx_dgemma.gguf.types import TYPES, Type
from mlx_dgemma.tensors import Tensor, text_tensors
from mlx_dgemma.units import count

from .imatrix import Imatrix
from .plan import RoleSummary, by_role
from .recipes import check_used
from .recipes_gguf import GgufRecipe, Place, fallback


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    tensor: Tensor
    type: Type
    wanted: Type  # what the recipe asked for; differs after a fallback

    @property
    def nbytes(self) -> int:
        *lead, row = self.tensor.shape
        return math.prod(lead) * self.type.row_bytes(row)

    def importance(self, imatrix: Imatrix | None) -> np.ndarray | None:
        """How much each column matters, (experts, row) float32, 1 for a matrix; None where it makes no difference."""
        if imatrix is None or self.type.name in IGNORE_IMPORTANCE:
            return None
        *lead, _, row = self.tensor.shape
        return imatrix.weights(self.tensor.gguf, lead[0] if lead else 1, row)

    @property
    def precision_name(self) -> str:
        return self.type.name


@dataclasses.dataclass(frozen=True)
class GgufPlan:
    recipe: GgufRecipe
    config: ModelConfig
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Of the weights, as llama-quantize counts; the file adds metadata and vocabulary."""
        return sum(t.nbytes for t in self.tensors) + self.rope_freqs_bytes

    @property
    def tensor_count(self) -> int:
        return 1 + len(self.tensors)  # rope_freqs.weight

    @property
    def array_count(self) -> int:
        return self.tensor_count

    @property
    def compared_bytes(self) -> int:
        """What a verification reads again."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def rope_freqs_bytes(self) -> int:
        """The one tensor that no checkpoint holds; computed from the configuration."""
        return 4 * (self.config.global_head_dim // 2)

    @property
    def parameters(self) -> int:
        return sum(t.tensor.size for t in self.tensors)

    def histogram(self) -> dict[str, int]:
        """Tensors per type, as llama.cpp prints them when it loads the file."""
        return dict(Counter(["F32", *(t.type.name for t in self.tensors)]).most_common())

    def by_role(self) -> list[RoleSummary]:
        return by_role(self.tensors)


def make_gguf_plan(config: ModelConfig, recipe: GgufRecipe, imatrix: Imatrix | None = None) -> GgufPlan:
    """Some of llama-quantize's rules ask whether there is an importance matrix; it is checked against the model."""
    n_layers = config.num_hidden_layers
    check_used(recipe, text_tensors(config))
    with_v = [layer.index for layer in config.layers if layer.has_v_proj]
    tensors = []
    for t in text_tensors(config):
        i, n = t.layer, n_layers
        if t.gguf_part == "attn_v":
            i, n = with_v.index(t.layer), len(with_v)
        wanted = recipe.type(t, Place(i or 0, n, config, imatrix is not None))
        tensors.append(PlannedTensor(t, fallback(wanted, t.shape[-1]), wanted))
    return GgufPlan(recipe, config, tuple(tensors), (*_fallbacks(tensors), *_without_importance(tensors, imatrix)))


def _without_importance(tensors, imatrix):
    # A collector sees products; the embedding is looked up too, so nobody collects for it.
    wanting = [t for t in tensors if imatrix and t.type.name not in IGNORE_IMPORTANCE and t.tensor.role != "embedding"]
    without = [t.tensor.gguf for t in wanting if t.importance(imatrix) is None]
    if without:
        n = f"{len(without)} of {len(wanting)}"
        yield f"the importance matrix says nothing of {n} tensors ({without[0]}, …), quantized without it"


def _fallbacks(tensors):
    fell = Counter((t.tensor.shape[-1], t.wanted.name, t.type.name) for t in tensors if t.type != t.wanted)
    return tuple(
        f"{count(n, 'tensor')} with rows of {row}: no whole number of {wanted}'s blocks of {TYPES[wanted].block}, "
        f"so {given}"
        for (row, wanted, given), n in fell.items()
    )
