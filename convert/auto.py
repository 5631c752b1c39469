"""Choose a precision for every group of weights so that a byte budget costs the least KL: recipe `auto`.

Source   the multiple-choice knapsack, solved exactly over a grid of bytes by dynamic programming
Differs  the KL of a precision nobody measured is that of the probe times the ratio of their squared errors: the KL of
         a small change grows with its square, and those of different groups add up (docs/numerics.md)

sensitivity.py measures with MLX, auto_recipe.py knows files and targets; everything here is pure.
"""

from typing import NamedTuple

import numpy as np

from mlx_dgemma.config import ModelConfig
from mlx_dgemma.tensors import QUANTIZED_ROLES, Tensor, text_tensors

GRID = 50_000  # units that a budget is cut into
FEWEST = 8  # canvases: fewer say little about what any group does
TINY = 1e-12  # nats; for logarithms


class Group(NamedTuple):
    """What rounding one group to the probe did."""

    kl: float  # nats per corrupted slot, `typical`
    standard_error: float
    errors: dict[str, float]  # GGUF tensor → relative squared error of its weights


class Sensitivity(NamedTuple):
    probe: str  # the MLX precision that was tried
    groups: dict[str, Group]
    canvases: int
    ts: tuple[float, ...]  # shares of noise
    seed: int
    model: str  # identity.py


def group_of(tensor: Tensor) -> str:
    """The group that a quantized tensor is chosen with: `blk.3.attention`, `blk.3.ffn_down_exps`, `embedding`."""
    if tensor.layer is None:
        return tensor.role
    return f"blk.{tensor.layer}.{tensor.gguf_part if tensor.role == 'expert' else tensor.role}"


def grouped(config: ModelConfig) -> dict[str, list[Tensor]]:
    """Group → its tensors, in the order of the model."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in text_tensors(config):
        if tensor.role in QUANTIZED_ROLES:
            groups.setdefault(group_of(tensor), []).append(tensor)
    return groups


def typical(kls: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Group → its KL in the typical instance and that number's standard error. kls: group → (instances,), two at least.

    Where one instance costs every group a thousand times what another does, a mean is what a few of them say. Their
    geometric mean is what all say; what an instance costs all groups alike is left out of the error.
    """
    logs = np.log(np.maximum(np.stack(list(kls.values())), TINY))
    rest, n = logs - logs.mean(axis=0), logs.shape[1]
    errors = rest.std(axis=1, ddof=1) / n**0.5
    means = np.exp(logs.mean(axis=1))
    return {key: (float(mean), float(mean * e)) for key, mean, e in zip(kls, means, errors, strict=True)}


class Choice(NamedTuple):
    """One precision for one group."""

    precision: str
    nbytes: int
    kl: float  # expected


def knapsack(options: list[list[Choice]], budget: int) -> list[Choice] | None:
    """One choice of each list: their bytes within `budget`, their summed KL as low as a grid of GRID units lets it be.

    None where even the smallest ones are too large.
    """
    smallest = [min(choice.nbytes for choice in group) for group in options]
    room = budget - sum(smallest)
    if room < 0:
        return None
    unit = max(1, -(-room // GRID))
    width = room // unit + 1
    best, taken = np.zeros(width), []  # by units spent: KL so far, and the last group's choice
    for group, least in zip(options, smallest, strict=True):
        sums = np.full((len(group), width), np.inf)
        for row, choice in zip(sums, group, strict=True):
            units = -(-(choice.nbytes - least) // unit)  # rounded up, so that the budget holds
            if units < width:
                row[units:] = best[: width - units] + choice.kl
        taken.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
    spent, chosen = int(best.argmin()), []
    for group, least, last in zip(reversed(options), reversed(smallest), reversed(taken), strict=True):
        choice = group[last[spent]]
        chosen.append(choice)
        spent -= -(-(choice.nbytes - least) // unit)
    return chosen[::-1]
