"""python -m convert SRC OUT --to mlx --recipe q4, or OUT.gguf --to gguf --recipe Q4_K_M

Results go to stdout, the plan and the progress bar to stderr. Exit codes: 0 done, 1 an `error:` line, 2 wrong usage,
130 interrupted; after anything but 0 there is no OUT, and the same command goes on with what OUT.partial keeps.
`python -m convert fit …` and the other COMMANDS are in fit_cli.py and its like.
"""

import argparse
import importlib
import json
import signal
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mlx_dgemma.cli import guarded
from mlx_dgemma.files import check_writable
from mlx_dgemma.progress import Bars
from mlx_dgemma.quality import error_table
from mlx_dgemma.units import count, human_bytes

from .api import Fetching, Planned, Resumed, convert
from .factors import Factors
from .output import check_free_name
from .plan_gguf import GgufPlan
from .recipes import DEFAULTS, TARGETS

# The other commands, each in a module of its name (imatrix_cli.py, …): python -m convert fit --help
COMMANDS = {
    "fit": "which recipes fit a device's memory",
    "imatrix": "collect an importance matrix, for --imatrix",
    "gptq": "collect what rounding makes up for its errors by, for --gptq",
    "sensitivity": "measure how much each group of weights matters, for --recipe auto",
}


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f".{argv[0]}_cli", __package__).main(argv[1:])
    args = _parser().parse_args(argv)
    if args.out is None and not args.dry_run:
        _parser().error("OUT is needed, unless --dry-run is given")
    is_gguf = args.out is not None and args.out.lower().endswith(".gguf")
    if is_gguf and args.to == "mlx":
        _parser().error(f"--to mlx writes a folder, found OUT {args.out}")
    to = args.to or ("gguf" if is_gguf else "mlx")
    if args.recipe == "auto" and args.budget is None:
        _parser().error("--recipe auto needs --budget, as 14GB or 4.5bpw")
    if args.recipe == "auto" and args.tensor_type:
        _parser().error("--recipe auto chooses for all tensors; leave --tensor-type out, or change the recipe it saves")
    if args.recipe == "auto" and args.low_disk:
        _parser().error("--recipe auto reads all weights to choose, which --low-disk never has; leave one of them out")
    if args.recipe != "auto" and (args.budget or args.sensitivity or args.save_recipe):
        _parser().error("--budget, --sensitivity and --save-recipe belong to --recipe auto")
    return guarded(lambda: _run(args, to))


def _run(args, to):
    console = Console(stderr=True)
    before = signal.signal(signal.SIGTERM, _terminated)  # so that `kill` cleans up as Ctrl-C does
    try:
        recipe = args.recipe
        if recipe == "auto":
            from .auto_recipe import write_json

            recipe, save = _chosen(args, to, console), _place_of_recipe(args)
        with _Screen(console, quiet=args.dry_run, verify=args.verify) as screen:
            report = convert(
                args.src,
                args.out,
                to=to,
                recipe=recipe,
                tensor_types=tuple(args.tensor_type),
                imatrix=args.imatrix,
                dry_run=args.dry_run,
                verify=args.verify,
                low_disk=args.low_disk,
                refit=args.refit,
                gptq=args.gptq,
                on_event=screen.draw,
            )
        if args.recipe == "auto" and save is not None:
            write_json(recipe, Path(save))
    finally:
        signal.signal(signal.SIGTERM, before)
    print(json.dumps(_as_json(report)) if args.json else _as_text(report))
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description=_description(),
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="SRC", help="checkpoint folder, GGUF file, or a hub id such as owner/name")
    parser.add_argument("out", metavar="OUT", nargs="?", help="new folder or .gguf file; not needed with --dry-run")
    parser.add_argument("--to", choices=TARGETS, help="what to write (default: gguf where OUT ends so, else mlx)")
    parser.add_argument("--recipe", metavar="R", help="a recipe below, or a JSON file (default: q4, Q4_K_M)")
    parser.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="ROLE=P",
        help="another precision for one role or GGUF tensor, as expert=Q5_0 or ffn_down_exps=Q5_0; may be repeated",
    )
    parser.add_argument("--budget", metavar="SIZE", help="of recipe auto: size of the weights, as 14GB or 4.5bpw")
    parser.add_argument(
        "--sensitivity", metavar="FILE", help="of recipe auto: from `convert sensitivity` (default: sensitivity.json)"
    )
    parser.add_argument(
        "--save-recipe", metavar="FILE", help="of recipe auto: where the recipe goes (default: OUT.recipe.json)"
    )
    parser.add_argument("--imatrix", metavar="FILE", help="importance matrix, from llama.cpp or `convert imatrix`")
    parser.add_argument("--refit", action="store_true", help="MLX: less error in the same bytes; slower")
    parser.add_argument("--gptq", metavar="FILE", help="from `convert gptq`: rounding makes up for its errors")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and stop; needs only config.json; for auto, weights"
    )
    parser.add_argument("--verify", action="store_true", help="reopen the result and report the error per role")
    parser.add_argument(
        "--low-disk", action="store_true", help="of a hub id: fetch, convert and delete one shard at a time"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _description():
    lines = ["Convert a DiffusionGemma checkpoint to a folder for MLX or to a GGUF file.", "", "other commands:"]
    lines += [f"  python -m convert {name + ' --help':<20}{what}" for name, what in COMMANDS.items()]
    return "\n".join(lines)


def _epilog():
    lines = []
    for to, recipes in TARGETS.items():
        lines.append(f"recipes of --to {to} (default {DEFAULTS[to]}):")
        lines += [f"  {recipe.name:<6} {recipe.summary}" for recipe in recipes.values()]
    lines.append("recipe of both: auto, what costs the least quality within --budget; needs a sensitivity")
    lines.append("a JSON file serves both:")
    lines.append('  {"name": "mine", "roles": {"expert": "mxfp4", "attention": "q6"}}, every other role q8')
    return "\n".join(lines)


def _chosen(args, to, console):
    """Recipe auto, saved where a later conversion finds it."""
    from .auto_recipe import SENSITIVITY, choose

    if args.out is not None:
        check_free_name(Path(args.out))  # before minutes of work
    if args.save_recipe is not None:
        check_free_name(Path(args.save_recipe))
    if (save := _place_of_recipe(args)) is not None:
        check_writable(save)
    if args.gptq is not None:
        Factors(args.gptq)
    progress = Bars(TextColumn("errors"), BarColumn(), MofNCompleteColumn(), console=console, transient=True)
    task = progress.add_task("errors", total=None)

    def draw(done, total):
        progress.start()
        progress.update(task, completed=done, total=total)

    try:
        refit = args.refit or args.gptq is not None
        recipe = choose(args.src, to, args.budget, args.sensitivity or SENSITIVITY, draw, refit)
    finally:
        if progress.live.is_started:  # else stopping would print an empty line
            progress.stop()
    return recipe


def _place_of_recipe(args):
    """Where it is kept: beside OUT, once there is an OUT."""
    if args.save_recipe is None and not args.dry_run:
        return args.out.rstrip("/") + ".recipe.json"
    return args.save_recipe


class _Screen:
    """Draws the events of a conversion: the plan first, then one bar per phase."""

    def __init__(self, console, quiet, verify):
        self.console, self.quiet, self.verify = console, quiet, verify
        columns = TextColumn("{task.description:>8}"), BarColumn(), DownloadColumn()
        self.progress = Bars(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.progress.live.is_started:  # else stopping would print an empty line
            self.progress.stop()

    def draw(self, event):
        if self.quiet:
            return
        if isinstance(event, Planned):
            self.console.print(plan_text(event.plan, event.notes), highlight=False, markup=False, soft_wrap=True)
            self.progress.start()
            self.tasks = {"convert": self.progress.add_task("convert", total=event.plan.total_bytes)}
            if self.verify:
                self.tasks["verify"] = self.progress.add_task("verify", total=event.plan.compared_bytes)
        elif isinstance(event, Resumed):
            notes = list(event.notes)
            if event.tensors:
                taken = f"{count(event.tensors, 'tensor')}, {human_bytes(event.bytes)}"
                notes.append(f"going on where an interrupted run stopped: {taken} are there")
            for note in notes:
                self.console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
            self.progress.reset(self.tasks["convert"], completed=event.bytes)
        elif isinstance(event, Fetching):
            self.console.print(f"fetching {event.file}, {human_bytes(event.bytes)}", highlight=False, markup=False)
        else:
            self.progress.advance(self.tasks[event.phase], event.bytes)


def plan_text(plan, notes) -> str:
    """A table for people: per role tensors, precision, parameters and size, then totals and notes."""
    rows = [("role", "precision", "tensors", "parameters", "size")]
    rows += [(r.role, r.precision, f"{r.tensors:,}", f"{r.parameters:,}", human_bytes(r.bytes)) for r in plan.by_role()]
    rows.append(
        ("total", plan.recipe.name, f"{plan.tensor_count:,}", f"{plan.parameters:,}", human_bytes(plan.total_bytes))
    )
    lines = [_row(row) for row in rows]
    lines += [f"note: {note}" for note in notes]
    return "\n".join(lines)


def _row(row):
    name, precision, *numbers = row
    return f"{name:<18}{precision:<10}" + "".join(f"{n:>{w}}" for n, w in zip(numbers, (8, 16, 12), strict=True))


def _as_text(report):
    plan = report.plan
    if report.out is None:
        bits = 8 * plan.total_bytes / plan.parameters
        size = f"{plan.total_bytes} bytes{_pieces(plan)}, {bits:.2f} bits per weight"
        return f"{plan_text(plan, report.notes)}\n{size}"
    lines = []
    if report.errors is not None:
        lines.append(error_table(report.errors))
    lines.append(f"{report.out}: {human_bytes(plan.total_bytes)}{_pieces(plan)}, {report.seconds:.1f} s")
    return "\n".join(lines)


def _pieces(plan):
    """How the bytes are cut: into shards, or into tensors of several types."""
    if isinstance(plan, GgufPlan):
        return " (" + ", ".join(f"{name} {n}" for name, n in plan.histogram().items()) + ")"
    return " in " + count(len(plan.shards), "shard")


def _as_json(report):
    plan = report.plan
    cut = {"types": plan.histogram()} if isinstance(plan, GgufPlan) else {"shards": len(plan.shards)}
    return {
        "out": None if report.out is None else str(report.out),
        "recipe": plan.recipe.name,
        "tensors": plan.tensor_count,
        "parameters": plan.parameters,
        "bytes": plan.total_bytes,
        **cut,
        "roles": [r._asdict() for r in plan.by_role()],
        "notes": list(report.notes),
        "verify": None if report.errors is None else [e._asdict() for e in report.errors],
        "seconds": round(report.seconds, 3),
    }


def _terminated(*_):
    raise KeyboardInterrupt
