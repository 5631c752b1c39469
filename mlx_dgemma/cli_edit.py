"""`python -m mlx_dgemma.edit`: rewrite lines of a file in place. `python -m gguf_export edit` is the same on ggml.

Prints a unified diff. The file is written with --write alone, and then all at once. --text is for an editor's filter.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from .cli import OPTIONS, Loaded, add_model_options, guarded, load_mlx, settings_of
from .cli_infill import SearchStatus, check_record, recorded, remark, shown_doubt, write_exactly
from .config import GenerationConfig
from .editing import NOISE, Edited, cut, diff, edit
from .errors import DgemmaError
from .events import BlockDone, Done, StepDone
from .files import check_writable, read_text, replace_text
from .fits import Context
from .tokenizer import check_prompt
from .view import View


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code. Ctrl-C passes through."""
    options = _parser().parse_args(argv)
    return guarded(lambda: run(options, lambda context: load_mlx(options, context)))


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m mlx_dgemma.edit", description="Rewrite lines of a file in place with DiffusionGemma on MLX."
    )
    add_edit_options(parser)
    add_model_options(parser)
    return parser


def add_edit_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help="the file to edit; - reads standard input")
    add("-i", "--instruction", required=True, help="what to change")
    add(
        "--lines",
        metavar="A:B",
        action="append",
        help="lines that may change, counted from 1, both included (default: all); repeatable",
    )
    add(
        "--noise", type=float, default=NOISE, metavar="T",
        help=f"share of the old tokens to begin without: near 0 keeps to them, 1 forgets them (default: {NOISE})",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="same seed, same text (default 0)")
    add("--steps", type=int, metavar="N", help="most denoising steps per canvas")
    add("--preset", metavar="P", help="exact (default), balanced or fast")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--diff", action="store_true", help="print a unified diff (default); write nothing")
    what.add_argument("--write", action="store_true", help="write the file, all at once; the diff goes to stderr")
    what.add_argument("--text", action="store_true", help="print the whole edited text, and no remarks: for a filter")
    what.add_argument("--json", action="store_true", help="print one JSON object: text, diff, stats")
    add("--record", metavar="FILE.html", help="write a page that replays the denoising of the last canvas")
    # Options of `generate` that no edit needs, at their defaults for what both share.
    parser.set_defaults(chat=False, **dict.fromkeys({*OPTIONS.values()} - {"steps"}))


def run(options, load: Callable[[Context], Loaded]) -> int:
    """Everything that can be wrong is found before `load` reads a model."""
    if not options.instruction.strip():
        raise DgemmaError('--instruction is empty, expected what to change, such as -i "Fix the bug"')
    check_prompt("user", options.instruction)
    if not 0 <= options.noise <= 1:
        raise DgemmaError(f"--noise is {options.noise}, expected a share between 0 and 1")
    settings_of(GenerationConfig(), options)
    ranges = None if options.lines is None else list(map(read_range, options.lines))
    if options.write and options.file == "-":
        raise DgemmaError("--write needs a file, found standard input; with --text the edited text goes to stdout")
    check_record(options.record, [options.file])
    before = read_text(options.file)
    cut(before, ranges)
    for path in [options.file] * options.write + [options.record] * (options.record is not None):
        check_writable(path)
    tokenizer, generation, session, _ = load(lambda tokenizer, *_: len(tokenizer.encode(options.instruction + before)))
    settings = settings_of(generation, options)
    quiet = options.json or options.text
    events = edit(session, before, options.instruction, settings, lines=ranges, seed=options.seed, noise=options.noise)
    with contextlib.ExitStack() as screen:
        view, status = None, screen.enter_context(SearchStatus(quiet))
        for event in recorded(events, options, tokenizer, settings, options.instruction):
            status.draw(event)
            view = view or screen.enter_context(View(tokenizer, settings, quiet=quiet, writes=False))
            if isinstance(event, StepDone | BlockDone | Done):
                view.draw(event)
            if isinstance(event, Done):  # the next canvas is another text
                last, view = view, None
    if not quiet:
        for filled in event.canvases:
            remark(last, filled)
        last.final_line(event.stats, options.seed)
    return show(event, before, options)


def show(edited: Edited, before: str, options) -> int:
    """Print or write what came of it."""
    changes = diff(before, edited.text, shown_name(options.file))
    if options.json:
        stats = [dataclasses.asdict(x.done.stats) for x in edited.canvases]
        doubts = [shown_doubt(x) for x in edited.canvases]
        found = {"text": edited.text, "diff": changes, "steps": edited.stats.steps, "doubts": doubts, "stats": stats}
        write_exactly(json.dumps(found | {"seed": options.seed}, ensure_ascii=False) + "\n")
    elif options.text:
        write_exactly(edited.text)
    elif not changes:
        print("nothing changed", file=sys.stderr)
    elif not options.write:
        write_exactly(changes)
    else:
        if read_text(options.file) != before:
            raise DgemmaError(f"{options.file}: has changed since it was read; nothing was written, run it again")
        replace_text(options.file, edited.text)
        write_exactly(changes, sys.stderr)
        print(f"wrote {options.file}", file=sys.stderr)
    return 0


def shown_name(file: str) -> str:
    """The file's name in a diff: seen from here where it lies below, so that `patch -p1` finds it."""
    if file == "-":
        return "stdin"
    path = os.path.relpath(file)
    return Path(file).name if path.startswith("..") else path


def read_range(text: str) -> tuple[int, int]:
    """ "3:7" or "3" → first and last line. Raises DgemmaError."""
    match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise DgemmaError(f"--lines is {text!r}, expected FIRST:LAST such as 3:7, counted from 1")
    return first, last
