"""What a conversion will write, before it reads a weight: tensors, precision, bytes and shards.

Shapes   a weight (…, row) becomes words (…, row × bits / 32) and one scale (and bias) per group (…, row / group)
Source   mlx.core.quantize for the packed shapes; MLX's folder layout (model-0000k-of-0000n.safetensors and an index)

Everything here is pure and needs config.json only: the 26B is planned in milliseconds, before it is downloaded.
"""

import dataclasses
import math
from typing import NamedTuple

from mlx_dgemma.config import ModelConfig
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.floats import STORED_AS, TORCH_NAMES
from mlx_dgemma.tensors import ROLES, Tensor, text_tensors, vision_tensors

from .recipes import check_used
from .recipes_mlx import FLOAT, Precision, Recipe, fallback

SHARD_BYTES = 5_000_000_000


class Array(NamedTuple):
    """One entry of a safetensors file."""

    name: str
    dtype: str  # safetensors' tag
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * STORED_AS[self.dtype]().itemsize


class PlannedTensor(NamedTuple):
    tensor: Tensor
    source: str  # name in the source
    stored: str  # dtype in the source
    kept: (
        str  # dtype of what is not quantized, and of scales; a GGUF's tensors are read in float32 and kept as bfloat16
    )
    precision: Precision
    wanted: Precision  # what the recipe asked for; differs after a fallback
    arrays: tuple[Array, ...]  # weight, or weight, scales and (affine) biases

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def precision_name(self) -> str:
        """For people: the recipe's word, or the dtype where a tensor is not quantized."""
        if self.precision.is_quantized:
            return self.precision.name
        return {"BF16": "bf16", "F32": "fp32", "F16": "fp16"}[self.arrays[0].dtype]

    @property
    def module(self) -> str:
        """The path that loaders look up in the quantization block."""
        return self.tensor.mlx.removesuffix(".weight")


class RoleSummary(NamedTuple):
    role: str
    precision: str
    tensors: int
    parameters: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]
    shards: tuple[tuple[PlannedTensor, ...], ...]
    notes: tuple[str, ...]  # where the plan departs from the recipe

    @property
    def total_bytes(self) -> int:
        """Of all arrays; the files add a header of about 100 bytes per array."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def parameters(self) -> int:
        return sum(t.tensor.size for t in self.tensors)

    def shard_name(self, index: int) -> str:
        return f"model-{index + 1:05}-of-{len(self.shards):05}.safetensors"

    @property
    def tensor_count(self) -> int:
        return len(self.tensors)

    @property
    def array_count(self) -> int:
        return sum(len(t.arrays) for t in self.tensors)

    @property
    def compared_bytes(self) -> int:
        """What a verification reads again."""
        return sum(t.arrays[0].nbytes for t in self.tensors)

    def by_role(self) -> list[RoleSummary]:
        return by_role(self.tensors)


def by_role(tensors) -> list[RoleSummary]:
    """One line per role and precision of planned tensors (either target's), in the order of ROLES."""
    groups = {}
    for t in tensors:
        groups.setdefault((t.tensor.role, t.precision_name), []).append(t)
    order = list(ROLES)
    return [
        RoleSummary(role, name, len(ts), sum(t.tensor.size for t in ts), sum(t.nbytes for t in ts))
        for (role, name), ts in sorted(groups.items(), key=lambda item: order.index(item[0][0]))
    ]


def make_plan(
    config: ModelConfig,
    recipe: Recipe,
    stored: dict[str, tuple[str, str]],
    vision: tuple[Tensor, ...],
    shard_bytes: int = SHARD_BYTES,
    kept: dict[str, str] | None = None,
) -> Plan:
    """`stored`: Hugging Face name → (name, dtype) in the source, for every text and vision tensor.

    kept: Hugging Face name → dtype, where it is not the stored one.
    """
    kept = {hf: dtype for hf, (_, dtype) in stored.items()} | (kept or {})
    check_used(recipe, text_tensors(config))
    tensors = tuple(_plan_tensor(t, recipe, *stored[t.hf], kept[t.hf]) for t in (*text_tensors(config), *vision))
    return Plan(recipe, tensors, _into_shards(tensors, shard_bytes), _notes(tensors))


def plan_from_config(raw: dict, config: ModelConfig, recipe: Recipe, path="config.json") -> Plan:
    """The plan where only config.json is at hand: the vision tower and the dtype are the declared ones."""
    text = raw.get("text_config", {})
    declared = raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or "bfloat16"
    if declared not in TORCH_NAMES:
        raise DgemmaError(f"{path}: dtype is {declared!r}, expected one of {', '.join(TORCH_NAMES)}")
    vision = expected_vision(config, path)
    stored = {t.hf: (t.hf, TORCH_NAMES[declared]) for t in (*text_tensors(config), *vision)}
    return make_plan(config, recipe, stored, vision)


def expected_vision(config: ModelConfig, path) -> tuple[Tensor, ...]:
    """vision_tensors, with an incomplete vision_config as an error of the user's."""
    try:
        return vision_tensors(config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise DgemmaError(
            f"{path}: vision_config is not complete ({error}), expected the sizes of a vision tower; "
            "download config.json again"
        ) from None


def quantization_block(plan: Plan) -> dict | None:
    """config.json's "quantization": a default, then one entry per module that differs from it; None without any.

    Loaders look a module's path up, and otherwise apply the default where the file has `.scales` for it. mlx-vlm
    also skips a weight whose size is no multiple of 64 unless it is named, so such a module is always named.
    """
    modules = [t for t in plan.tensors if t.precision.is_quantized]
    if not modules:
        return None
    default = max((t.precision for t in modules), key=lambda p: sum(t.tensor.size for t in modules if t.precision == p))
    block = _settings(default)
    for t in plan.tensors:
        if t.precision.is_quantized and (t.precision != default or t.tensor.size % 64):
            block[t.module] = _settings(t.precision)
        elif t.wanted.is_quantized and not t.precision.is_quantized:
            block[t.module] = False
    return block


def _settings(precision):
    return {"group_size": precision.group_size, "bits": precision.bits, "mode": precision.mode}


def _plan_tensor(tensor, recipe, source, stored, kept):
    wanted = recipe.precision(tensor)
    precision = fallback(wanted, tensor.shape[-1]) if wanted.is_quantized else wanted
    return PlannedTensor(tensor, source, stored, kept, precision, wanted, arrays_of(tensor, precision, kept))


def arrays_of(tensor: Tensor, precision: Precision, kept: str) -> tuple[Array, ...]:
    """The file entries of one tensor. Affine scales and biases have the kept dtype, the other modes' are bytes."""
    if not precision.is_quantized:
        return (Array(tensor.mlx, precision.dtype if precision.mode == FLOAT else kept, tensor.shape),)
    *lead, row = tensor.shape
    module = tensor.mlx.removesuffix(".weight")
    groups = (*lead, row // precision.group_size)
    words = Array(tensor.mlx, "U32", (*lead, row * precision.bits // 32))
    if precision.mode == "affine":
        return words, Array(f"{module}.scales", kept, groups), Array(f"{module}.biases", kept, groups)
    return words, Array(f"{module}.scales", "U8", groups)


def _into_shards(tensors, limit):
    """Consecutive tensors up to `limit` bytes; a tensor stays whole, so one above the limit has a shard of its own."""
    shards, room = [[]], limit
    for t in tensors:
        if t.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(t)
        room -= t.nbytes
    return tuple(tuple(shard) for shard in shards)


def _notes(tensors):
    fell = {}
    for t in tensors:
        if t.precision != t.wanted:
            key = (t.tensor.role, t.tensor.shape[-1], t.wanted.name, t.precision_name)
            fell[key] = fell.get(key, 0) + 1
    return tuple(
        f"{role}: {count} tensors with rows of {row} do not fit the groups of {wanted} and become {given}"
        for (role, row, wanted, given), count in fell.items()
    )
