"""Recipe `auto`: a measured sensitivity and a budget → a JSON recipe for both targets, with its evidence inside.

Shapes   a sample of a tensor's rows, (rows, row) float32, stands for all of them
Source   auto.py chooses; the errors of a precision are measured on the checkpoint that will be converted
Differs  one recipe holds a choice for each target, both within the same budget

A sensitivity file is JSON: what was measured with, and per group its KL, standard error and the probe's squared errors.
"""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gguf_export.ggml import find_ggml
from mlx_dgemma.config import read_json
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.files import replace_text
from mlx_dgemma.floats import from_float32, to_float32
from mlx_dgemma.gguf.types import FLOATS, TYPES
from mlx_dgemma.quality import not_finite
from mlx_dgemma.tensors import Tensor
from mlx_dgemma.units import human_bytes, parse_bytes

from . import recipes_gguf, recipes_mlx
from .api import plan_of
from .auto import Choice, Group, Sensitivity, grouped, knapsack
from .checkpoint import Checkpoint, find_source, open_checkpoint
from .identity import check_identity
from .plan import Plan, arrays_of
from .plan_gguf import GgufPlan, PlannedTensor
from .recipes import DEFAULTS, TARGETS, WRITABLE, find_recipe
from .recipes_mlx import PRECISIONS

LARGEST = 65_504.0  # of float16, in which ggml keeps its scales
FORMAT = "dgemma-sensitivity 2"
SENSITIVITY = "sensitivity.json"  # where it is looked for
SAMPLE = 1 << 16  # weights of a tensor whose error is measured
SLICES = 32  # places they are taken from
AGAIN = "measure it again with `python -m convert sensitivity`"


def choose(
    src: str | Path,
    to: str,
    budget: str,
    sensitivity: str | Path,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
    refit: bool = False,
) -> dict:
    """The JSON recipe for a checkpoint on disk or on the hub: `convert(…, recipe=choose(…))`. Raises DgemmaError.

    refit: the conversion will fit its scales (`--refit`, `--gptq`), so other errors count.
    """
    allowed, measured = parse_budget(budget), read_sensitivity(Path(sensitivity))
    checkpoint = open_checkpoint(find_source(src))
    plans = {target: plan_of(checkpoint, target, find_recipe(DEFAULTS[target], target)) for target in TARGETS}
    check_identity(checkpoint, measured.model, str(sensitivity), "sensitivity")
    return auto_recipe(checkpoint, plans, measured, allowed, to, on_tensor, refit)


class Budget(NamedTuple):
    """A size in bytes, or in bits per weight of the whole model."""

    amount: float
    per_weight: bool

    def nbytes(self, parameters: int) -> int:
        return int(self.amount * parameters / 8) if self.per_weight else int(self.amount)


def parse_budget(text: str) -> Budget:
    """14GB, 13GiB or 4.5bpw. Raises DgemmaError."""
    if found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*bpw\s*", text, re.IGNORECASE):
        if not 0 < float(found[1]) <= 32:
            raise DgemmaError(f"--budget is {text}, expected more than 0 and at most 32 bits per weight")
        return Budget(float(found[1]), True)
    try:
        return Budget(parse_bytes(text), False)
    except ValueError:
        raise DgemmaError(f"--budget is {text!r}, expected a size as 14GB, or bits per weight as 4.5bpw") from None


class Assessed(NamedTuple):
    """What may be chosen for one target."""

    options: dict[str, list[Choice]]  # by group
    fixed: int  # bytes of everything else

    @property
    def smallest(self) -> int:
        return self.fixed + sum(min(choice.nbytes for choice in group) for group in self.options.values())


class Target(NamedTuple):
    """What differs between MLX and GGUF."""

    precisions: list[str]
    actual: Callable[[Tensor, str], str]  # what a tensor gets where it was given a precision, after fallbacks
    nbytes: Callable[[Tensor, str], int]
    rounded: Callable[[Tensor, np.ndarray, str], np.ndarray]  # float32 rows → the values a file would hold


def auto_recipe(
    checkpoint: Checkpoint,
    plans: dict[str, Plan | GgufPlan],
    sensitivity: Sensitivity,
    budget: Budget,
    to: str,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
    refit: bool = False,
) -> dict:
    """The JSON recipe. plans: of any recipe for each target, for what is not chosen here. to: the target that must fit.

    on_tensor(done, total) is told of every tensor whose errors are measured. Raises DgemmaError where the budget is
    below the smallest size, or the sensitivity is another model's.
    """
    members = grouped(checkpoint.config)
    _check_belongs(sensitivity, members, checkpoint.path)
    assessed = assess(checkpoint, plans, sensitivity.groups, members, to, on_tensor, refit)
    chosen, evidence = {}, {}
    for target, found in assessed.items():
        parameters = plans[target].parameters
        nbytes = budget.nbytes(parameters)
        picked = knapsack(list(found.options.values()), nbytes - found.fixed)
        if picked is None and target == to:
            bits = 8 * found.smallest / parameters
            raise DgemmaError(
                f"--budget is {human_bytes(nbytes)}, but the smallest possible size for --to {to} is "
                f"{human_bytes(found.smallest)} ({found.smallest} bytes, {bits:.2f} bits per weight); raise the budget"
            )
        # The other target gets the smallest it can, where the budget is too low for it alone.
        picked = picked or [min(group, key=lambda choice: choice.nbytes) for group in found.options.values()]
        chosen[target] = dict(zip(found.options, picked, strict=True))
        evidence[target] = {
            "budget": nbytes,
            "bytes": found.fixed + sum(choice.nbytes for choice in picked),
            "expected_kl": sum(choice.kl for choice in picked),
        }
    roles = {key: {t: chosen[t][key].precision for t in chosen if key in chosen[t]} for key in members}
    return {
        "name": "auto",
        "roles": {k: one if len(one) == len(TARGETS) else next(iter(one.values())) for k, one in roles.items() if one},
        "evidence": evidence | {"sensitivity": as_json(sensitivity)},
    }


def _check_belongs(sensitivity, members, path):
    for key, tensors in members.items():
        group = sensitivity.groups.get(key)
        if group is None or set(group.errors) != {t.gguf_part for t in tensors}:
            raise DgemmaError(
                f"the sensitivity lacks {key}, or its tensors, expected those of {path}; {AGAIN} on this model"
            )
    if unknown := sorted(set(sensitivity.groups) - set(members)):
        raise DgemmaError(f"the sensitivity has {unknown[0]}, which {path} has not; {AGAIN} on this model")


def assess(
    checkpoint, plans, groups: dict[str, Group], members, to: str, on_tensor, refit=False
) -> dict[str, Assessed]:
    """Bytes and expected KL of every precision for every group; of target `to`, and of the other where it is installed.

    A group none of whose precisions can be measured is not chosen for: the plan keeps what it has for it.
    """
    there = {"mlx": importlib.util.find_spec("mlx") is not None, "gguf": find_ggml() is not None}
    targets = {target: TARGET[target](checkpoint, refit) for target in TARGETS if target == to or there[target]}
    options = {target: {} for target in targets}
    total, done = sum(map(len, members.values())), 0
    for key, tensors in members.items():
        errors = {target: [] for target in targets}
        for tensor in tensors:
            values = sample(checkpoint.values(tensor))
            if not np.isfinite(values).all():
                raise not_finite(checkpoint.names[tensor.hf], checkpoint.path)
            for name, target in targets.items():
                wanted = {target.actual(tensor, p) for p in target.precisions}
                errors[name].append({p: squared_error(values, target.rounded(tensor, values, p)) for p in wanted})
            done += 1
            on_tensor(done, total)
        for name, target in targets.items():
            if name == "gguf" and tensors[0].role not in recipes_gguf.GGUF_QUANTIZED_ROLES:
                continue
            if choices := _choices(target, tensors, errors[name], groups[key]):
                options[name][key] = choices
    found = {}
    for name, groups_here in options.items():
        chosen_here = {t.hf for key in groups_here for t in members[key]}
        planned = plans[name]
        fixed = planned.total_bytes - sum(t.nbytes for t in planned.tensors if t.tensor.hf in chosen_here)
        found[name] = Assessed(groups_here, fixed)
    return found


def _choices(target, tensors, errors, group):
    """One for each different outcome, under the name with the fewest fallbacks."""
    found = {}
    for name in target.precisions:
        actual = tuple(target.actual(t, name) for t in tensors)
        fallbacks = sum(got != name for got in actual)
        nbytes = sum(target.nbytes(t, got) for t, got in zip(tensors, actual, strict=True))
        # Of the group's tensors nobody knows which one cost the probe's KL: each that it changed counts as much.
        probed = [group.errors[t.gguf_part] for t in tensors]
        ratios = [e[got] / probe for e, got, probe in zip(errors, actual, probed, strict=True) if probe > 0]
        choice = Choice(name, nbytes, group.kl * float(np.mean(ratios)) if ratios else 0.0)
        if not np.isfinite(choice.kl):  # too large for the target's scales
            continue
        if actual not in found or fallbacks < found[actual][0]:
            found[actual] = fallbacks, choice
    return [choice for _, choice in found.values()]


def sample(values) -> np.ndarray:
    """Some of a tensor's rows, from SLICES places. values: anything with a length whose slices are float32 rows."""
    row = values[:1].shape[-1]
    n = max(1, SAMPLE // row // SLICES)
    if len(values) <= n * SLICES:
        return values[:]
    starts = np.linspace(0, len(values) - n, SLICES).astype(int)
    return np.concatenate([values[start : start + n] for start in starts])


def squared_error(values: np.ndarray, rounded: np.ndarray) -> float:
    """Relative: a matrix of zeros has none."""
    squared = float(np.square(values, dtype=np.float64).sum())
    return float(np.square(rounded - values, dtype=np.float64).sum()) / squared if squared else 0.0


def _mlx_target(checkpoint, refit):
    from .to_mlx import packed
    from .verify import dequantize

    def kept_as(tensor):
        return checkpoint.weights.kept_as(checkpoint.names[tensor.hf])

    def rounded(tensor, values, name):
        precision, kept = PRECISIONS[name], kept_as(tensor)
        if not precision.is_quantized:
            return values
        words, scales, *biases = packed(from_float32(values, kept), kept, precision, refit)
        if precision.mode == "affine":  # scales and biases are rounded too, which counts at 8 bits
            scales, *biases = (to_float32(a, kept) for a in (scales, *biases))
        return dequantize(words, scales, biases[0] if biases else None, dataclasses.asdict(precision))

    def nbytes(tensor, name):
        return sum(array.nbytes for array in arrays_of(tensor, PRECISIONS[name], kept_as(tensor)))

    def actual(tensor, name):
        found = recipes_mlx.fallback(PRECISIONS[name], tensor.shape[-1])
        return found.name if found.is_quantized else "bf16"

    return Target([p.name for p in PRECISIONS.values() if p.is_quantized], actual, nbytes, rounded)


def _gguf_target(checkpoint, refit):
    import gguf

    from gguf_export.quantize import quantize

    def rounded(tensor, values, name):
        if np.abs(values).max(initial=0) > LARGEST:  # where ggml would end the process
            return np.full_like(values, np.inf)
        return gguf.dequantize(quantize(values, TYPES[name]), gguf.GGMLQuantizationType[name])

    def nbytes(tensor, name):
        return PlannedTensor(tensor, TYPES[name], TYPES[name]).nbytes

    def actual(tensor, name):
        return recipes_gguf.fallback(TYPES[name], tensor.shape[-1]).name

    return Target([name for name in WRITABLE if name not in FLOATS], actual, nbytes, rounded)


TARGET = {"mlx": _mlx_target, "gguf": _gguf_target}


# The sensitivity's file


def as_json(sensitivity: Sensitivity) -> dict:
    groups = {key: group._asdict() for key, group in sensitivity.groups.items()}
    return {"format": FORMAT, **sensitivity._asdict(), "groups": groups}


def read_sensitivity(path: Path) -> Sensitivity:
    """Raises DgemmaError where the file is no sensitivity."""
    if not Path(path).is_file():
        raise DgemmaError(
            f"{path}: no such file, expected the model's sensitivity; measure it with `python -m convert sensitivity "
            f"MODEL --data FILE --out {path}`"
        )
    raw = read_json(Path(path), "sensitivity")
    if raw.get("format") != FORMAT:
        raise DgemmaError(f"{path}: format is {raw.get('format')!r}, expected {FORMAT!r}; {AGAIN}")
    try:
        groups = {key: Group(**group) for key, group in raw["groups"].items()}
        numbers = [n for g in groups.values() for n in (g.kl, g.standard_error, *g.errors.values())]
        fine = all(isinstance(n, int | float) and 0 <= n < 1e9 for n in numbers)
        found = Sensitivity(raw["probe"], groups, raw["canvases"], tuple(raw["ts"]), raw["seed"], raw["model"])
    except (KeyError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise DgemmaError(f"{path}: its groups are not complete, expected kl, standard_error and errors; {AGAIN}")
    return found


def write_json(value: dict, path: Path) -> None:
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
