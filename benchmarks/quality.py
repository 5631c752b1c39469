"""What a quantization costs: python -m benchmarks.quality REF CANDIDATE… [--json FILE] [--plot FILE.png]

    python -m benchmarks.quality plot JSON… --plot FILE.svg      draws what was measured before
    python -m benchmarks.quality compare JSON… --models A B      two of its candidates, instance by instance

Shapes   N canvases of C slots at five shares of noise, each denoised without and with self-conditioning
Source   quality_scores.py for what is measured, quality_tasks.py for what is asked end to end; docs/quality.md
Differs  models are loaded one after the other; the reference leaves a base on disk, with which the others are compared

A model is a folder, a GGUF file or a hub id, with an engine before it where it is not the usual one: mlx:, ggml:,
transformers:. Finished models are saved as they come (--json), and a second run goes on behind them.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from convert.examples import NOISE_SHARES
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.files import check_writable
from mlx_dgemma.progress import Bars
from mlx_dgemma.units import human_bytes

from . import quality_base as bases
from .quality_data import DEMO_CANVASES, FILE_CANVASES, check_same_tokens, read_data
from .quality_engines import load
from .quality_models import About, about, arithmetic, check_alike
from .quality_passes import NotFinite, Plan, fill, reference_scores, scores, why_not_finite
from .quality_plot import check_plot, plot
from .quality_report import (
    HEADLINE,
    TYPICAL,
    check_setting,
    comparison,
    merge,
    new_report,
    put,
    read_report,
    tables,
    write_report,
)
from .quality_scores import PASSES, compare
from .quality_tasks import KNOWN, chosen_tasks, paired, run_tasks

DTYPES = ("float32", "bfloat16", "float16")
# What a model may fail with; engines raise RuntimeError where memory runs out.
FAILURES = (DgemmaError, OSError, MemoryError, RuntimeError)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        other = {"plot": _redraw, "compare": _compare}.get(arguments[0] if arguments else "")
        failed = other(arguments[1:]) if other else _measure(parse(arguments))
    except DgemmaError as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit(1)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("reference", metavar="REF", help="folder, GGUF or hub id; ENGINE:PATH chooses the engine")
    parser.add_argument("candidates", metavar="CANDIDATE", nargs="+", help="what is compared with it")
    data = parser.add_argument_group("what is measured")
    data.add_argument(
        "--data", metavar="FILE", help=".jsonl of prompts and answers, or plain text (by default the demo's)"
    )
    data.add_argument(
        "--canvases", type=int, metavar="N",
        help=f"canvases of it (default: {DEMO_CANVASES}; of a file as many as it has, {FILE_CANVASES} at most)",
    )  # fmt: skip
    data.add_argument("--slots", type=int, default=32, help="slots of a canvas whose whole distribution is compared")
    data.add_argument("--seed", type=int, default=0, help="of instances, noise and sampled slots")
    data.add_argument("--no-tasks", action="store_true", help="nothing end to end")
    data.add_argument("--tasks", metavar="LIST", help=f"by comma, of {', '.join(KNOWN)}; exact_match for --data")
    data.add_argument("--n", type=int, default=100, help="instances per task (default: 100)")
    how = parser.add_argument_group("how")
    how.add_argument("--base", metavar="FILE", help="keeps what the reference said, or is what it said before")
    how.add_argument("--dtype", choices=DTYPES, help="activations, on MLX and transformers")
    how.add_argument("--device", default="auto", help="ggml: a name that `python -m gguf_export devices` prints")
    how.add_argument("--threads", type=int, help="ggml: on a CPU (default: all cores)")
    out = parser.add_argument_group("results")
    out.add_argument("--json", metavar="FILE", help="rewritten after each model; models in it are not measured again")
    out.add_argument("--again", action="store_true", help="measure models that --json holds, too")
    out.add_argument("--plot", metavar="FILE", help="KL against size: .png or .svg; needs the extra `plot`")
    args = parser.parse_args(arguments)
    for name, least in (("canvases", 1), ("slots", 2), ("n", 1), ("threads", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name} is {value}, expected {least} or more")
    if args.no_tasks and args.tasks:
        parser.error("--tasks and --no-tasks exclude each other")
    if twice := [name for name in args.candidates if args.candidates.count(name) > 1]:
        parser.error(f"{twice[0]} is given twice")
    return args


def _redraw(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality plot", description="Draw saved results.")
    parser.add_argument("reports", metavar="JSON", nargs="+", help="of one reference on the same data")
    parser.add_argument("--plot", metavar="FILE", required=True, help=".png or .svg")
    parser.add_argument(
        "--pass",
        dest="pass_",
        choices=(*PASSES, TYPICAL),
        default=HEADLINE,
        help=f"whose KL (default: %(default)s); {TYPICAL}: its geometric mean over instances",
    )
    args = parser.parse_args(arguments)
    check_plot(args.plot)
    merged = merge([(path, read_report(path)) for path in args.reports])
    print(tables(merged))
    _draw(merged, args.plot, args.pass_)


def _compare(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality compare",
        description="Compare the KL of two candidates, instance by instance (corrupted slots, self-conditioned).",
    )
    parser.add_argument("reports", metavar="JSON", nargs="+", help="what --json wrote")
    parser.add_argument("--models", metavar=("A", "B"), nargs=2, required=True, help="as the reports name them")
    args = parser.parse_args(arguments)
    merged = merge([(path, read_report(path)) for path in args.reports])
    rows = {row["model"]: row for row in merged["candidates"] if "kl_by_instance" in row}
    for model in args.models:
        if model not in rows:
            raise DgemmaError(f"{model}: is not among the measured candidates, expected one of {', '.join(rows)}")
    print(comparison(*args.models, compare(*(rows[model]["kl_by_instance"] for model in args.models))))
    return False


def _measure(args) -> list[str]:
    """Measures, prints and draws; returns the candidates that failed."""
    if args.json:
        check_writable(args.json)
    if args.base and not Path(args.base).is_file():  # one that is there is read only
        check_writable(args.base)
    if args.plot:
        check_plot(args.plot)
    reference, candidates = about(args.reference), [about(name) for name in args.candidates]
    for candidate in candidates:
        check_alike(reference, candidate)
    data = read_data(args.data, reference.tokenizer, reference.config, args.canvases, args.seed)
    for candidate in candidates:
        again = read_data(args.data, candidate.tokenizer, candidate.config, args.canvases, args.seed)
        check_same_tokens(data, again, candidate.name)
    tasks = [] if args.no_tasks else chosen_tasks(args.tasks and args.tasks.split(","), data, bool(args.data))
    plan = Plan(data, reference.config, reference.settings, args.slots, args.seed)
    return Measurement(args, reference, candidates, plan, tasks).run()


class Measurement:
    """The reference, then every candidate, with what is known of each saved as soon as it is."""

    def __init__(self, args, reference: About, candidates: list[About], plan: Plan, tasks: list[str]):
        self.args, self.reference, self.candidates, self.plan, self.tasks = args, reference, candidates, plan, tasks
        config, data = plan.config, plan.data
        self.setting = {
            "reference": reference.fingerprint, "engine": reference.engine,
            "arithmetic": arithmetic(reference, args.dtype), "data": data.name, "text": data.fingerprint,
            "canvases": len(data.canvases), "instances": len(data.texts), "canvas_length": config.canvas_length,
            "vocabulary": config.vocab_size, "slots": args.slots, "seed": args.seed, "t": list(NOISE_SHARES),
        }  # fmt: skip
        self.report = self._begun()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.progress = Bars(*columns, transient=True)

    def _begun(self):
        """What --json holds already."""
        asked = {"tasks": self.tasks, "n": self.args.n if self.tasks else None}
        path = self.args.json
        if not path or not Path(path).exists():
            return new_report(self.setting) | {"asked": asked}
        report = read_report(path)
        advice = "give another --json, or remove it"
        check_setting(report, self.setting, path, advice)
        if report.get("asked") != asked:
            raise DgemmaError(f"{path}: was asked for {report.get('asked')}, expected {asked}; {advice}")
        return report

    def run(self) -> list[str]:
        if not self.tasks and not self.args.no_tasks:
            self.note(f"nothing end to end: {self.args.data} has no answers; a .jsonl of prompts and answers has")
        left = [c for c in self.candidates if self.args.again or not self._done(c)]
        for candidate in (c for c in self.candidates if c not in left):
            self.note(f"{candidate.name}: in {self.args.json} already; --again measures it again")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.progress)
            if left or not self.report["reference"]:
                base = self._reference(stack)
                sums = reference_scores(self.plan, base)[1] if left else None
                for candidate in left:
                    put(self.report, self._candidate(candidate, base, sums))
                    self.save()
        asked = {candidate.name for candidate in self.candidates}
        failed = [row for row in self.report["candidates"] if "error" in row and row["model"] in asked]
        print(tables(self.report))
        for row in failed:
            print(f"error: {row['model']}: {row['error']}", file=sys.stderr)
        if self.args.plot:
            _draw(self.report, self.args.plot)
        return [row["model"] for row in failed]

    def _done(self, candidate):
        return any(
            row["model"] == candidate.name and row["fingerprint"] == candidate.fingerprint and "error" not in row
            for row in self.report["candidates"]
        )

    def _reference(self, stack):
        """The reference's distributions and its row: as --base and --json have them, or made now."""
        folder = None if self.args.base else stack.enter_context(tempfile.TemporaryDirectory())
        path = Path(self.args.base or Path(folder) / "base")
        of = {key: value for key, value in self.setting.items() if key != "data"}
        base, rows = None, (self.report["reference"] or {}).get("tasks")
        if path.exists():
            base = bases.open_base(path)
            bases.check_base(base, of)
        if base is None or (self.tasks and not rows):
            with self.loaded(self.reference) as model:
                base = base or self._filled(model, path, of)
                rows = rows or self._tasks(model, self.reference)
        stack.callback(base.close)
        made, _ = reference_scores(self.plan, base)
        self.report["reference"] = self._row(self.reference) | made | {"tasks": rows}
        self.save()
        return base

    def _filled(self, model, path, of):
        data, shares = self.plan.data, len(self.plan.ts)
        arrays = bases.shapes(len(data.canvases), len(data.texts), shares, self.plan.slots, self.plan.config)
        self.note(f"{self.reference.name}: its distributions take {human_bytes(bases.nbytes(arrays))} on disk")
        base = bases.create(path, of, arrays)
        try:
            with self.shown(self.reference, self.plan.passes) as advance:
                fill(model, self.plan, base, advance)
            return bases.finish(base, path)
        finally:
            bases.forget(path)

    def _candidate(self, candidate, base, sums):
        began, row = time.perf_counter(), self._row(candidate)
        try:
            with self.loaded(candidate) as model:
                with self.shown(candidate, self.plan.passes) as advance:
                    row |= scores(model, self.plan, base, sums, advance)
                row["tasks"] = paired(self._tasks(model, candidate), self.report["reference"]["tasks"] or {})
        except FAILURES as error:
            self.note(f"{candidate.name}: {error}")
            return self._row(candidate) | {"error": str(error)}
        row["seconds"] = round(time.perf_counter() - began, 1)
        self.note(f"{candidate.name}: measured in {row['seconds']:.0f} s")
        return row

    def _row(self, model):
        return {
            "model": model.name, "engine": model.engine, "arithmetic": arithmetic(model, self.args.dtype),
            "form": model.form, "weights_bytes": model.nbytes, "fingerprint": model.fingerprint,
        }  # fmt: skip

    def _tasks(self, model, who):
        if not self.tasks:
            return {}
        with contextlib.ExitStack() as stack:
            shown = []

            def on_task(task, n):
                shown[:] = [stack.enter_context(self.shown(who, n, f", {task}"))]

            args, plan = self.args, self.plan
            return run_tasks(
                model, self.tasks, plan.data, plan.config.canvas_length, args.n, args.seed, plan.rows,
                on_task, lambda n: shown[0](n),
            )  # fmt: skip

    @contextlib.contextmanager
    def loaded(self, model):
        opened = load(model, self.args.device, self.args.threads, self.args.dtype)
        try:
            yield opened
        except NotFinite:
            raise why_not_finite(model.path) from None
        finally:
            opened.close()

    @contextlib.contextmanager
    def shown(self, model, total, what=""):
        bar = self.progress.add_task(model.name + what, total=total)
        try:
            yield lambda n: self.progress.advance(bar, n)
        finally:
            self.progress.remove_task(bar)

    def note(self, text):
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def save(self):
        if self.args.json:
            write_report(self.report, self.args.json)


def _draw(report, path, pass_=HEADLINE):
    for model in plot(report, path, pass_):
        print(f"{model}: KL 0 or not measured, no point in {path}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
