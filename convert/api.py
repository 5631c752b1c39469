"""Convert a DiffusionGemma checkpoint: `convert(src, out, to="gguf", recipe="Q4_K_M")`, or `python -m convert`.

Differs  the work reports events (Planned, Resumed, Fetching, Worked) to a function and prints nothing: cli.py does
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.types import FLOATS
from mlx_dgemma.quality import RoleError
from mlx_dgemma.tensors import QUANTIZED_ROLES, Tensor
from mlx_dgemma.units import count

from .checkpoint import Checkpoint, changed, find_source, open_checkpoint, read_source_config
from .factors import Factors
from .identity import check_identity
from .imatrix import Imatrix, read_imatrix
from .low_disk import Fetching, low_disk_source
from .output import check_free_name
from .partial import partial_output
from .plan import Plan, make_plan, plan_from_config
from .plan_gguf import GgufPlan, make_gguf_plan
from .recipes import DEFAULTS, TARGETS, find_recipe
from .work import do

WHOLE = (*FLOATS, "bf16", "fp32", "fp16")  # precisions without rounding to speak of


class Planned(NamedTuple):
    """The first event: what will be written."""

    plan: Plan | GgufPlan
    notes: tuple[str, ...]  # where the result departs from the recipe, or from what a user may expect


class Resumed(NamedTuple):
    """An interrupted run of this conversion left something: what is taken over, and notes on what cannot be."""

    tensors: int
    bytes: int  # of the output
    notes: tuple[str, ...]


class Worked(NamedTuple):
    """A piece of one tensor is done. `phase` is "convert" or "verify"; bytes are of the output."""

    phase: str
    tensor: str
    bytes: int


class Report(NamedTuple):
    plan: Plan | GgufPlan
    notes: tuple[str, ...]
    out: Path | None  # None after a dry run
    errors: list[RoleError] | None  # per role, where verification was asked for
    seconds: float


def convert(
    src: str | Path,
    out: str | Path | None = None,
    to: str = "mlx",
    recipe: str | Path | None = None,
    *,
    tensor_types: tuple[str, ...] = (),
    imatrix: str | Path | None = None,
    dry_run: bool = False,
    verify: bool = False,
    low_disk: bool = False,
    refit: bool = False,
    gptq: str | Path | None = None,
    on_event: Callable[[Planned | Resumed | Fetching | Worked], None] = lambda event: None,
) -> Report:
    """Write `src` (a folder, a GGUF file or a hub id) as the new folder or GGUF file `out`.

    to: "mlx" for a folder, "gguf" for a file.
    recipe: a name of TARGETS[to] or the path of a JSON recipe; DEFAULTS[to] if None.
    tensor_types: changes to it, as "expert=q6" or "ffn_down_exps=Q5_0".
    imatrix: an importance matrix in llama.cpp's GGUF form; only for "gguf".
    dry_run: plan only; needs config.json alone (or a GGUF's header), and no `out`.
    low_disk: `src` is a hub id; a shard is fetched, converted and deleted before the next one is fetched.
    refit: fit the scales of affine precisions to the rounded weights (refit.py); only for "mlx".
    gptq: a file of `python -m convert gptq`: round so that columns make up for each other's errors (gptq.py).
    Raises DgemmaError; `out` is then as it was. Tensors that were complete are kept in `out`.partial, where the same
    call goes on, whatever ended the one before: an error, KeyboardInterrupt, `kill -9`.
    """
    started = time.monotonic()
    if to not in TARGETS:
        raise DgemmaError(f"target {to!r} is not known, expected {' or '.join(TARGETS)}")
    if imatrix is not None and to != "gguf":
        raise DgemmaError(f"an importance matrix is for GGUF files, found --to {to}; leave it out or use --to gguf")
    if refit and to != "mlx":
        raise DgemmaError(f"--refit is for MLX folders, found --to {to}; leave it out, ggml's quantizers fit anyway")
    recipe = find_recipe(recipe or DEFAULTS[to], to, tensor_types)
    if out is None and not dry_run:
        raise DgemmaError("no output was given, expected a new name; only a dry run does without")
    if out is not None:
        check_free_name(Path(out))
    if low_disk and verify:
        raise DgemmaError("--verify reads the source again, which --low-disk deletes as it goes; leave one of them out")
    importance = None if imatrix is None else read_imatrix(Path(imatrix))
    factors = None if gptq is None else Factors(gptq)
    with _opened(src, out, dry_run, low_disk, on_event) as source:
        if isinstance(source, Path):
            plan, notes = _plan_from_config(source, to, recipe, importance), ()
        else:
            plan, notes = plan_of(source, to, recipe, importance), _notes(source)
        notes += plan.notes
        if factors is not None:
            notes += _without_gptq(plan, factors, low_disk)
        elif refit and not any(t.precision.mode == "affine" for t in plan.tensors):
            notes += (f"--refit fits q2 to q8, and recipe {plan.recipe.name} has none of it",)
        on_event(Planned(plan, notes))
        if dry_run:
            return Report(plan, notes, None, None, time.monotonic() - started)

        def worked(phase):
            return lambda name, n: on_event(Worked(phase, name, n))

        if factors is not None and not low_disk:
            check_identity(source, factors.model, str(gptq), "gptq")
        work, check = _work(source, plan, to, importance, refit, factors)
        fingerprints = _unchanged(source, work.sources())
        with partial_output(Path(out), work, fingerprints, _needed_bytes(source, plan)) as partial:
            if partial.journal.done or partial.notes:
                done = [job.nbytes for job in work.jobs if job.tensor in partial.journal.done]
                on_event(Resumed(len(done), sum(done), partial.notes))
                notes += partial.notes
            do(work, partial.path, source, partial.journal, worked("convert"))
            if factors is not None:
                factors.check_unchanged()
            errors = None
            if verify:
                try:
                    errors = check(partial.path, worked("verify"))
                except DgemmaError:
                    partial.discard()  # it would fail again
                    raise
    return Report(plan, notes, Path(out), errors, time.monotonic() - started)


@contextlib.contextmanager
def _opened(src, out, dry_run, low_disk, on_event) -> Iterator[Checkpoint | Path]:
    """The checkpoint, or the path of what a dry run reads its config.json from."""
    if low_disk:
        with low_disk_source(src, None if dry_run else Path(out), on_event) as checkpoint:
            yield checkpoint
        return
    path = find_source(src, config_only=dry_run)
    yield path if dry_run and (path.is_dir() or path.suffix == ".json") else open_checkpoint(path)


def _plan_from_config(path, to, recipe, importance):
    raw, config = read_source_config(path)
    if to == "gguf":
        return make_gguf_plan(config, recipe, importance)
    return plan_from_config(raw, config, recipe, path)


def plan_of(checkpoint, to, recipe, importance=None):
    if to == "gguf":
        return make_gguf_plan(checkpoint.config, recipe, importance)
    weights = checkpoint.weights
    names = checkpoint.names | {name: name for name in checkpoint.vision}
    stored = {hf: (name, weights[name].dtype) for hf, name in names.items()}
    kept = {hf: weights.kept_as(name) for hf, name in names.items()}
    vision = tuple(Tensor("vision", None, name, name, "", weights[name].shape) for name in checkpoint.vision)
    return make_plan(checkpoint.config, recipe, stored, vision, kept=kept)


def _without_gptq(plan, factors, low_disk):
    """Notes on what it leaves alone. Raises DgemmaError where it would change nothing."""
    if isinstance(plan, GgufPlan):
        # In a single block nothing is left to make up for it.
        can = [t for t in plan.tensors if t.type.name not in FLOATS and t.tensor.shape[-1] > t.type.block]
        what = "what ggml quantizes, in rows of several blocks"
    else:
        can, what = [t for t in plan.tensors if t.precision.mode == "affine"], "q2 to q8"
    heard = [t for t in can if factors.of(t.tensor)]
    if not heard:
        why = f"{factors.path} has nothing for it" if can else f"recipe {plan.recipe.name} has none of it"
        raise DgemmaError(f"--gptq rounds {what}, and {why}; leave it out, or collect or choose another one")
    quantized = [t for t in plan.tensors if t.tensor.role in QUANTIZED_ROLES and t.precision_name not in WHOLE]
    left = [f"{t.tensor.gguf} in {t.precision_name}" for t in quantized if t not in heard]
    notes = [f"--gptq rounds {count(len(heard), 'tensor')} by {factors.path}"]
    if left:
        notes[0] += f", and leaves {count(len(left), 'quantized one')} alone ({left[0]}{', …' * (len(left) > 1)})"
    if low_disk:
        notes.append(f"with --low-disk nobody checks that {factors.path} belongs to this model, only that its sizes do")
    return tuple(notes)


def _work(
    checkpoint: Checkpoint,
    plan: Plan | GgufPlan,
    to: str,
    importance: Imatrix | None,
    refit: bool,
    factors: Factors | None,
):
    """The work, and a function of the written path and of one to report to that checks it.

    Imported here: a plan needs neither.
    """
    if to == "gguf":
        from gguf_export.quantize import check_can_quantize
        from gguf_export.verify import verify_gguf

        from .to_gguf import gguf_work

        check_can_quantize({t.type.name for t in plan.tensors}, importance is not None)
        work = gguf_work(checkpoint, plan, importance, factors)
        return work, lambda path, worked: verify_gguf(path, checkpoint.values, plan.config, worked)
    from .to_mlx import folder_work
    from .verify import verify_folder

    return folder_work(checkpoint, plan, refit, factors), lambda path, worked: verify_folder(checkpoint, path, worked)


def _unchanged(checkpoint, files):
    """The files' fingerprints, which are those of the files whose headers were read. Raises DgemmaError."""
    for file in files:
        if checkpoint.fingerprint(file) != checkpoint.seen[file]:
            raise changed(file)
    return {file: checkpoint.seen[file] for file in files}


def _notes(checkpoint):
    notes = []
    if checkpoint.quantized:
        notes.append(
            f"the source is already quantized ({checkpoint.quantized}): what that lost stays lost, and a different "
            "precision adds its own error; the original checkpoint gives a better result"
        )
    if checkpoint.assumed:
        notes.append(f"the source lacks {', '.join(checkpoint.assumed)}: the released model's values are taken")
    return (*notes, *checkpoint.notes)


def _needed_bytes(checkpoint, plan):
    """Weights, about 300 bytes per array for its header and index lines, what is carried along, a fetched file."""
    return plan.total_bytes + 300 * plan.array_count + checkpoint.carried_bytes + checkpoint.held_bytes
