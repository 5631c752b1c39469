"""python -m convert imatrix MODEL --data FILE --out FILE: what `--imatrix` of `python -m convert` reads.

The result goes to stdout, progress to stderr. Exit codes: 0 done, 1 an `error:` line, 2 wrong usage, 130 interrupted;
after anything but 0 nothing is left behind.
"""

import json
import time
from pathlib import Path

from mlx_dgemma.cli import guarded
from mlx_dgemma.units import count

from .collecting import add_examples, over_examples, parser_of
from .imatrix import Imatrix, write_imatrix
from .output import appears_when_done


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    return guarded(lambda: _run(args))


def _run(args):
    began = time.monotonic()
    with appears_when_done(Path(args.out), 0, folder=False) as scratch:  # a wrong place is known before the work
        imatrix, passages = _collect(args)
        write_imatrix(imatrix, scratch)
    report = {"out": args.out, "examples": passages} | summary(imatrix)
    report["seconds"] = round(time.monotonic() - began, 3)
    print(json.dumps(report) if args.json else _as_text(report))
    return 0


def _parser():
    parser = parser_of(
        "imatrix", "Collect an importance matrix over denoising steps, for better GGUF quantization.", "imatrix.gguf"
    )
    add_examples(parser)
    return parser


def _collect(args):
    """The importance matrix, and how many examples it took."""
    used = 0

    def work(model, tokenizer, examples, draw):
        from .calibrate import collect

        def count_and_draw(event):
            nonlocal used
            used = event.done
            draw(event)

        return collect(model, tokenizer, examples, seed=args.seed, limit=args.examples, on_event=count_and_draw)

    imatrix = over_examples("imatrix", args.model, args.data, work)
    return imatrix._replace(datasets=(Path(args.data).name,)), used


def summary(imatrix: Imatrix) -> dict:
    """Counts for people: an expert that saw nothing is quantized without importance."""
    experts = [entry.counts for name, entry in imatrix.entries.items() if "ffn_gate_up_exps" in name]
    return {
        "matrices": len(imatrix.entries),
        "canvases": imatrix.chunks,
        "experts": sum(map(len, experts)),
        "unseen_experts": int(sum((counts == 0).sum() for counts in experts)),
    }


def _as_text(report):
    examples = count(report["examples"], "example")
    text = "{out}: {matrices} matrices, {0}, {canvases:,} canvases, {seconds:.1f} s".format(examples, **report)
    if report["unseen_experts"]:
        unseen = f"{report['unseen_experts']:,} of {report['experts']:,} experts"
        text += f"\nnote: {unseen} saw no token and will be quantized without importance; give more or other examples"
    return text
