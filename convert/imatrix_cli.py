"""python -m convert imatrix MODEL --data FILE --out FILE

Results go to stdout, the progress bar to stderr. Exit codes: 0 done, 1 an `error:` line, 2 wrong usage, 130 interrupted.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.units import count

from .imatrix import Imatrix, write_imatrix
from .output import appears_when_done, check_free_name


def main(argv) -> int:
    args = _parser().parse_args(argv)
    try:
        report = _run(args)
    except DgemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report) if args.json else _as_text(report))
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m convert imatrix",
        description="Measure which input channels of every matrix matter, over real denoising steps.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, GGUF file, or hub id; the less it is quantized the better")
    add("--data", required=True, metavar="FILE", help='text, or .jsonl with {"prompt", "answer"} or {"messages"} lines')
    add("--out", required=True, metavar="FILE", help="new GGUF file, for --imatrix here or in llama-quantize")
    add("--examples", type=int, metavar="N", help="use the first N examples only")
    add("--seed", type=int, default=0, help="of the noise (default 0)")
    add("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _run(args):
    if args.examples is not None and args.examples < 1:
        raise DgemmaError(f"--examples is {args.examples}, expected at least 1")
    out = Path(args.out)
    check_free_name(out)
    if not Path(args.data).is_file():
        raise DgemmaError(f"{args.data}: no such file, expected a text or .jsonl file")
    import mlx_dgemma

    from .calibrate import TS, collect
    from .examples import read_examples

    started = time.monotonic()
    model, tokenizer = mlx_dgemma.load(args.model)
    examples = read_examples(args.data, tokenizer, model.config, model.generation_config)[: args.examples]
    columns = TextColumn("collect"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("collect", total=len(examples))
        entries = collect(model, examples, args.seed, TS, lambda done: progress.update(task, completed=done))
    blocks = sum(len(e.answer) for e in examples) // model.config.canvas_length
    imatrix = Imatrix(out, entries, (Path(args.data).name,), blocks, model.config.canvas_length)
    with appears_when_done(out, 4 * sum(e.sums.size for e in entries.values()), folder=False) as scratch:
        write_imatrix(imatrix, scratch)
    return {
        "out": str(out),
        "examples": len(examples),
        "blocks": blocks,
        "tensors": len(entries),
        "experts_without_input": sum(int((e.counts == 0).sum()) for e in entries.values()),
        "seconds": round(time.monotonic() - started, 1),
    }


def _as_text(report):
    unseen = report["experts_without_input"]
    note = f"; {unseen} expert matrices saw no input: give more data" if unseen else ""
    done = f"{count(report['examples'], 'example')}, {count(report['blocks'], 'block')}, {report['seconds']} s"
    return f"{report['out']}: {count(report['tensors'], 'tensor')} from {done}{note}"
