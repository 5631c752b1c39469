"""What the commands share that run a model over examples: imatrix, gptq, sensitivity."""

import argparse
from collections.abc import Callable
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.progress import Bars

EPILOG = """\
FILE of --data, UTF-8: one JSON object per line where its name ends in .jsonl,
  {"prompt": "…", "answer": "…"}
  {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
else plain text. A few hundred examples of what the model is used for are enough; every expert should see some.
"""
Result = TypeVar("Result")


def parser_of(command: str, description: str, out: str) -> argparse.ArgumentParser:
    """The options that all of them have. out: the name of the new file, where none is given."""
    parser = argparse.ArgumentParser(
        prog=f"python -m convert {command}",
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, GGUF file or hub id: the one to quantize, or an 8-bit copy")
    add("--data", required=True, metavar="FILE", help="examples, see below")
    add("--out", default=out, metavar="FILE", help=f"new file (default: {out})")
    add("--seed", type=int, default=0, help="chooses the noise (default 0)")
    add("--json", action="store_true", help="print the result as one JSON object")
    return parser


def add_examples(parser: argparse.ArgumentParser) -> None:
    """--examples N"""
    parser.add_argument("--examples", type=_positive, metavar="N", help="use the first N examples (default: all)")


def _positive(text):
    if (n := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"is {n}, expected at least 1")
    return n


def over_examples(name: str, model: str, data: str, work: Callable[..., Result]) -> Result:
    """What `work(model, tokenizer, examples, on_event)` returns, its events (done, total) on stderr. Raises
    DgemmaError."""
    try:
        from mlx_dgemma import load
    except ImportError:
        raise DgemmaError("running a model takes MLX, which is not installed here; see README.md, Install") from None
    from .examples import read_examples

    examples = read_examples(data)  # before the weights, so that a wrong file costs nothing
    loaded, tokenizer = load(model)
    with Bars(TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(name, total=None)

        def draw(event):
            progress.update(task, completed=event.done, total=event.total)

        return work(loaded, tokenizer, examples, draw)
