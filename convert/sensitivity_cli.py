"""python -m convert sensitivity MODEL --data FILE --out FILE: what `--recipe auto` of `python -m convert` reads.

The result goes to stdout, progress to stderr. Exit codes: 0 done, 1 an `error:` line, 2 wrong usage, 130 interrupted;
after anything but 0 nothing is left behind.
"""

import json
import time
from pathlib import Path

from mlx_dgemma.cli import guarded
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.hub import model_path
from mlx_dgemma.quality import first_bad_tensor, not_finite

from .auto import FEWEST, Sensitivity
from .auto_recipe import SENSITIVITY, as_json, write_json
from .collecting import over_examples, parser_of
from .output import appears_when_done
from .recipes_mlx import PRECISIONS

CANVASES = 64


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.canvases < FEWEST:
        _parser().error(f"--canvases must be at least {FEWEST}: fewer say little about any group")
    return guarded(lambda: _run(args))


def _run(args):
    began = time.monotonic()
    with appears_when_done(Path(args.out), 0, folder=False) as scratch:  # a wrong place is known before the work
        sensitivity = measure_model(args.model, args.data, args.canvases, args.probe, args.seed)
        write_json(as_json(sensitivity), scratch)
    seconds = round(time.monotonic() - began, 3)
    if args.json:
        print(json.dumps({"out": args.out, "seconds": seconds} | as_json(sensitivity)))
    else:
        measured = f"{len(sensitivity.groups)} groups, {sensitivity.canvases} canvases, {seconds:.1f} s"
        print(f"{_table(sensitivity)}\n{args.out}: {measured}")
    return 0


def measure_model(model: str, data: str, canvases: int = CANVASES, probe: str | None = None, seed: int = 0):
    """The Sensitivity of a model on disk, with progress on stderr. Raises DgemmaError."""

    def work(loaded, tokenizer, examples, draw):
        from .sensitivity import PROBE, NotFinite, measure

        try:
            return measure(loaded, tokenizer, examples, probe or PROBE, seed=seed, limit=canvases, on_event=draw)
        except NotFinite as error:
            if bad := first_bad_tensor(model_path(model)):
                raise not_finite(bad, model) from None
            raise DgemmaError(str(error)) from None

    return over_examples("sensitivity", model, data, work)


def _parser():
    parser = parser_of(
        "sensitivity", "Measure what rounding each group of weights costs, in KL on denoising batches.", SENSITIVITY
    )
    parser.add_argument(
        "--canvases", type=int, default=CANVASES, metavar="N", help=f"blocks of answers looked at (default: {CANVASES})"
    )
    parser.add_argument(
        "--probe",
        choices=[p.name for p in PRECISIONS.values() if p.is_quantized],
        metavar="P",
        help="MLX precision that is tried (default: q4)",
    )
    return parser


def _table(sensitivity: Sensitivity) -> str:
    """The groups, the one that matters most first."""
    groups = sorted(sensitivity.groups.items(), key=lambda item: -item[1].kl)
    lines = [f"{'group':<26}{'typical KL, nats':>20}{'standard error':>18}"]
    lines += [f"{key:<26}{group.kl:>20.3e}{group.standard_error:>18.1e}" for key, group in groups]
    if sum(g.standard_error > g.kl / 2 for g in sensitivity.groups.values()) > len(groups) / 2:
        lines.append(
            f"note: after {sensitivity.canvases} canvases most standard errors exceed half of their KL; "
            "more examples (and --canvases) make a better recipe"
        )
    return "\n".join(lines)
