"""Find a recipe: by name, from a JSON file, with single tensors changed.

recipes_mlx.py and recipes_gguf.py hold the named recipes of the two targets. A JSON recipe serves both:

    {"name": "mine", "roles": {"expert": "mxfp4", "attention": "q6", "ffn_down_exps": {"mlx": "q5", "gguf": "Q5_0"}}}

A key is a role, or one GGUF tensor of every layer; with `blk.3.` in front, of that layer alone. What is left out is q8.
A value is a precision of either target, which the other one reads as the nearest it has (EQUIVALENTS), or one per
target. `"base": {"mlx": "q4", "gguf": "Q4_K_M"}` starts from named recipes instead of q8. `"evidence"` is for people.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path

from mlx_dgemma.config import read_json
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.types import TYPES
from mlx_dgemma.tensors import LAYER_TENSORS, MODEL_TENSORS, QUANTIZED_ROLES, ROLES, Tensor

from . import recipes_gguf, recipes_mlx
from .recipes_gguf import GgufRecipe
from .recipes_mlx import PRECISIONS, Recipe

TARGETS = {"mlx": recipes_mlx.RECIPES, "gguf": recipes_gguf.RECIPES}
DEFAULTS = {"mlx": "q4", "gguf": "Q4_K_M"}

# MLX precision ↔ ggml type, for recipes that serve both. The first line of a type or precision is its equivalent.
# fmt: off
EQUIVALENTS = (
    ("fp32", "F32"), ("bf16", "BF16"), ("bf16", "F16"),
    ("q8", "Q8_0"), ("q6", "Q6_K"), ("q5", "Q5_K"), ("q4", "Q4_K"), ("q3", "Q3_K"), ("q2", "Q2_K"),
    ("q8-g32", "Q8_0"), ("q6-g32", "Q6_K"), ("q5-g32", "Q5_1"), ("q4-g32", "Q4_1"), ("q3-g32", "Q3_K"),
    ("q2-g32", "Q2_K"), ("q5-g32", "Q5_0"), ("q4-g32", "Q4_0"), ("q4-g32", "IQ4_NL"), ("q4", "IQ4_XS"),
    ("q8-g128", "Q8_0"), ("q6-g128", "Q6_K"), ("q5-g128", "Q5_K"), ("q4-g128", "Q4_K"), ("q3-g128", "Q3_K"),
    ("q2-g128", "Q2_K"), ("mxfp8", "Q8_0"), ("mxfp4", "MXFP4"), ("nvfp4", "MXFP4"),
)
# fmt: on
WRITABLE = [t for t in TYPES if t in {gguf for _, gguf in EQUIVALENTS}]
# llama.cpp's name for a file is that of most of its weights.
FILE_TYPES = {r.base: r.file_type for r in reversed(recipes_gguf.RECIPES.values())} | {"MXFP4": 38}


def find_recipe(name: str | Path | dict, to: str = "mlx", tensor_types: tuple[str, ...] = ()) -> Recipe | GgufRecipe:
    """A recipe of target `to`: by name, of a JSON file, or what such a file holds.

    tensor_types: changes as typed, "expert=q6", "blk.3.ffn_down_exps=Q5_0".
    """
    recipe = _parse_recipe(name, "the recipe", "unnamed", to) if isinstance(name, dict) else _named_or_file(name, to)
    overrides = {}
    for change in tensor_types:
        key, equals, precision = change.partition("=")
        if not equals:
            raise DgemmaError(f"--tensor-type {change!r} has no '=', expected ROLE={_example(to)}")
        overrides[_key(key, "--tensor-type", to)] = _precision(precision, key, "--tensor-type", to)
    return _with_overrides(recipe, overrides)


def _named_or_file(name, to):
    recipes = TARGETS[to]
    if found := recipes.get(str(name)) or recipes.get(str(name).upper()):  # llama-quantize's names in any case
        return found
    for other, theirs in TARGETS.items():
        if str(name) in theirs:
            raise DgemmaError(
                f"recipe {str(name)!r} is for --to {other}, expected one of {', '.join(recipes)} for --to {to}; "
                f"add --to {other} if that is meant"
            )
    if str(name) == "auto":
        raise DgemmaError("recipe auto is chosen for a budget; give --budget, as 14GB or 4.5bpw")
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        return _parse_recipe(read_json(path, "recipe"), path, path.stem, to)
    raise DgemmaError(
        f"recipe {str(name)!r} is not known, expected one of {', '.join(recipes)}, or the path of a JSON recipe file"
    )


def _parse_recipe(raw, path, stem, to):
    if set(raw) - {"name", "base", "roles", "evidence"} or not isinstance(raw.get("roles"), dict):
        raise DgemmaError(
            f"{path}: found the keys {sorted(raw)}, expected "
            '{"name": "...", "roles": {"expert": "q4", ...}}; correct the recipe file'
        )
    name = raw.get("name", stem)
    if not isinstance(name, str):
        raise DgemmaError(f"{path}: name is {name!r}, expected a string; correct the recipe file")
    overrides = {}
    for key, value in raw["roles"].items():
        value = _for_target(value, key, path, to)
        if key.rsplit(".", 1)[-1] == "router" and to == "gguf":
            continue  # F32 in every GGUF; a recipe that serves both may still name it
        overrides[_key(key, path, to)] = _precision(value, key, path, to)
    summary = f"from {path}"
    if (base := _for_target(raw.get("base"), "base", path, to)) is not None:
        if base not in TARGETS[to]:
            raise DgemmaError(f"{path}: base is {json.dumps(base)}, expected one of {', '.join(TARGETS[to])}")
        renamed = {"name": name, "summary": summary}
        start = TARGETS[to][base]
        start = start._replace(**renamed) if to == "gguf" else dataclasses.replace(start, **renamed)
    elif to == "gguf":
        start = GgufRecipe(name, FILE_TYPES[_of_experts(overrides)], summary, "Q8_0")
    else:
        start = Recipe(name, summary, dict.fromkeys(QUANTIZED_ROLES, PRECISIONS["q8"]))
    return _with_overrides(start, overrides)


def _for_target(value, key, path, to):
    """A value that is the same for both targets, or one for each."""
    if not isinstance(value, dict):
        return value
    if set(value) != set(TARGETS):
        raise DgemmaError(f'{path}: {key} is {json.dumps(value)}, expected {{"mlx": "...", "gguf": "..."}}')
    return value[to]


def _of_experts(overrides):
    """The type that most expert tensors have: experts are nine tenths of a file."""
    found = [overrides[key] for key in overrides if key.rsplit(".", 1)[-1] in EXPERTS]
    return max(found, key=found.count, default="Q8_0")


def check_used(recipe: Recipe | GgufRecipe, tensors: Iterable[Tensor]) -> None:
    """Raises DgemmaError for a key that names a layer, or a layer's tensor, that the model has not."""
    known = {key for tensor in tensors for key in tensor.recipe_keys}
    if unused := [key for key in recipe.overrides if key not in known]:
        raise DgemmaError(
            f"recipe {recipe.name}: {unused[0]} names no tensor of the model; its layers are blk.0 and following"
        )


def _with_overrides(recipe, overrides):
    merged = dict(recipe.overrides) | overrides
    if isinstance(recipe, GgufRecipe):
        return recipe._replace(overrides=merged)
    return dataclasses.replace(recipe, overrides=merged)


def _key(key, where, to):
    """A role, or a GGUF tensor, that is quantized; of one layer where it begins so."""
    general = re.sub(r"^blk\.\d+\.", "", key)
    if general != key:
        if general in ("embedding", "self_conditioning"):
            raise DgemmaError(f"{where}: {key} names a layer, but {general} belongs to none; write {general}")
        _key(general, where, to)
        return key
    rows = [row for row in (*MODEL_TENSORS, *LAYER_TENSORS) if row.role in TARGET_ROLES[to]]
    parts = [row.gguf.removesuffix(".weight") for row in rows]
    if key in TARGET_ROLES[to] or key in parts:
        return key
    why = "is never quantized" if key in ROLES else "is not known"
    if key == "router":
        why = "stays F32 in a GGUF, as llama.cpp wants it"
    raise DgemmaError(
        f"{where}: role {key!r} {why}, expected some of {', '.join(TARGET_ROLES[to])}, or a tensor: {', '.join(parts)}"
    )


EXPERTS = ("expert", *(row.gguf.removesuffix(".weight") for row in LAYER_TENSORS if row.role == "expert"))
TARGET_ROLES = {"mlx": QUANTIZED_ROLES, "gguf": recipes_gguf.GGUF_QUANTIZED_ROLES}


def _precision(value, key, where, to):
    """The target's own word, or its equivalent of the other's."""
    words = PRECISIONS if to == "mlx" else WRITABLE
    if isinstance(value, str) and value.upper() in WRITABLE:
        value = value.upper()  # llama.cpp prints q4_K and takes any case
    if isinstance(value, str) and value not in words:
        column = ("mlx", "gguf").index(to)
        value = next((pair[column] for pair in EQUIVALENTS if pair[1 - column] == value), value)
    if not isinstance(value, str) or value not in words:
        raise DgemmaError(
            f"{where}: precision {json.dumps(value)} of {key} is not known, expected one of {', '.join(words)}"
        )
    return PRECISIONS[value] if to == "mlx" else value


def _example(to):
    return {"mlx": "q6", "gguf": "Q5_0"}[to]
