"""Convert a DiffusionGemma checkpoint: `convert(src, out, to="mlx", recipe="q4")`, or `python -m convert`.

Differs  the work reports events (Planned, Worked) to a function and prints nothing; cli.py draws them
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.tensors import Tensor

from .checkpoint import CARRIED, find_folder, open_checkpoint, read_source_config
from .output import appears_when_done, check_free_name
from .plan import Plan, make_plan, plan_from_config
from .recipes import find_recipe
from .verify import RoleError, verify_folder

TARGETS = ("mlx",)


class Planned(NamedTuple):
    """The first event: what will be written."""

    plan: Plan


class Worked(NamedTuple):
    """A piece of one tensor is done. `phase` is "convert" or "verify"; bytes are of the output."""

    phase: str
    tensor: str
    bytes: int


class Report(NamedTuple):
    plan: Plan
    out: Path | None  # None after a dry run
    errors: list[RoleError] | None  # per role, where verification was asked for
    seconds: float


def convert(
    src: str | Path,
    out: str | Path | None = None,
    to: str = "mlx",
    recipe: str | Path = "q4",
    *,
    dry_run: bool = False,
    verify: bool = False,
    on_event: Callable[[Planned | Worked], None] = lambda event: None,
) -> Report:
    """Write `src` (a folder or a hub id) as the new folder `out`. Raises DgemmaError; `out` is then as it was.

    `recipe` is a name of RECIPES or the path of a JSON recipe file. A dry run needs only config.json, and no `out`.
    """
    started = time.monotonic()
    if to not in TARGETS:
        raise DgemmaError(f"target {to!r} is not known, expected {' or '.join(TARGETS)}")
    recipe = find_recipe(recipe)
    if out is None and not dry_run:
        raise DgemmaError("no output folder was given, expected one; only a dry run does without")
    if out is not None:
        check_free_name(Path(out))
    folder = find_folder(src, config_only=dry_run)
    if dry_run:
        plan = plan_from_config(*read_source_config(folder), recipe, folder / "config.json")
        on_event(Planned(plan))
        return Report(plan, None, None, time.monotonic() - started)
    checkpoint = open_checkpoint(folder)
    plan = _plan(checkpoint, recipe)
    on_event(Planned(plan))

    from .to_mlx import write_folder  # here, so that a plan needs no MLX

    with appears_when_done(Path(out), _needed_bytes(checkpoint, plan)) as scratch:
        write_folder(checkpoint, plan, scratch, lambda name, n: on_event(Worked("convert", name, n)))
        errors = None
        if verify:
            errors = verify_folder(checkpoint, scratch, lambda name, n: on_event(Worked("verify", name, n)))
    return Report(plan, Path(out), errors, time.monotonic() - started)


def _plan(checkpoint, recipe):
    weights = checkpoint.weights
    stored = {hf: (name, weights[name].dtype) for hf, name in checkpoint.names.items()}
    stored |= {name: (name, weights[name].dtype) for name in checkpoint.vision}
    vision = tuple(Tensor("vision", None, name, name, "", weights[name].shape) for name in checkpoint.vision)
    return make_plan(checkpoint.config, recipe, stored, vision)


def _needed_bytes(checkpoint, plan):
    """Arrays, their headers and index lines (about 300 bytes each), and the files carried along."""
    carried = (checkpoint.folder / name for name in CARRIED)
    arrays = sum(len(t.arrays) for t in plan.tensors)
    return plan.total_bytes + 300 * arrays + sum(file.stat().st_size for file in carried if file.is_file())
