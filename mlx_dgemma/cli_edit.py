"""`python -m mlx_dgemma.edit`: rewrite lines of a file in place. `python -m gguf_export edit` is the same on ggml.

Prints a unified diff. The file is written with --write alone, and then all at once.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from .cli import Loaded, add_model_options, guarded, load_mlx
from .cli_infill import recorded
from .config import GenerationConfig
from .editing import NOISE, Edited, cut, diff, edit
from .errors import DgemmaError
from .events import BlockDone, Done, StepDone
from .files import check_writable, read_text, replace_text
from .presets import with_preset
from .tokenizer import check_prompt
from .view import View


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code. Ctrl-C passes through."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_dgemma.edit", description="Rewrite lines of a file in place with DiffusionGemma on MLX."
    )
    add_edit_options(parser)
    add_model_options(parser)
    options = parser.parse_args(argv)
    options.chat = False
    return guarded(lambda: run(options, lambda: load_mlx(options)))


def add_edit_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help="the file to edit; - reads standard input")
    add("-i", "--instruction", required=True, help="what to change")
    add(
        "--lines",
        metavar="A:B",
        action="append",
        help="lines that may change, both included (default: all); repeatable",
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
    what.add_argument("--json", action="store_true", help="print one JSON object: text, diff, stats")
    add("--record", metavar="FILE.html", help="write a page that replays the denoising of the last canvas")


def run(options, load: Callable[[], Loaded]) -> int:
    """Everything that can be wrong is found before `load` reads a model."""
    text, ranges = read_text(options.file), [read_range(x) for x in options.lines or []] or None
    cut(text, ranges)
    check_prompt("user", options.instruction)
    if not 0 <= options.noise <= 1:
        raise DgemmaError(f"--noise is {options.noise}, expected a share between 0 and 1")
    settings_of(GenerationConfig(), options)
    if options.write and options.file == "-":
        raise DgemmaError("--write needs a file, found standard input; leave --write out, the diff goes to stdout")
    for path in [options.file] * options.write + [options.record] * bool(options.record):
        check_writable(path)
    tokenizer, generation, session, _ = load()
    settings = settings_of(generation, options)
    events = edit(session, text, options.instruction, settings, lines=ranges, seed=options.seed, noise=options.noise)
    with View(tokenizer, settings, quiet=options.json, writes=False) as view:
        for event in recorded(events, options, tokenizer, settings, options.instruction):
            if isinstance(event, StepDone | BlockDone | Done):
                view.draw(event)
        if not options.json:
            view.final_line(event.canvases[-1].done.stats, options.seed)
    return show(event, text, options)


def show(edited: Edited, before: str, options) -> int:
    """Print or write what came of it."""
    name = "stdin" if options.file == "-" else Path(options.file).name
    changes = diff(before, edited.text, name)
    if options.json:
        steps = sum(x.done.stats.steps for x in edited.canvases)
        stats = [dataclasses.asdict(x.done.stats) for x in edited.canvases]
        found = {"text": edited.text, "diff": changes, "steps": steps, "stats": stats, "seed": options.seed}
        print(json.dumps(found, ensure_ascii=False))
        return 0
    if not changes:
        print("nothing changed", file=sys.stderr)
    elif not options.write:
        sys.stdout.write(changes)
    else:
        if read_text(options.file) != before:
            raise DgemmaError(f"{options.file}: has changed since it was read; nothing was written, run it again")
        replace_text(options.file, edited.text)
        sys.stderr.write(changes)
        print(f"wrote {options.file}", file=sys.stderr)
    return 0


def read_range(text: str) -> tuple[int, int]:
    """ "3:7" or "3" → first and last line. Raises DgemmaError."""
    match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text)
    if not match:
        raise DgemmaError(f"--lines is {text!r}, expected FIRST:LAST such as 3:7, counted from 1")
    return int(match[1]), int(match[2] or match[1])


def settings_of(base: GenerationConfig, options) -> GenerationConfig:
    return with_preset(base, options.preset).replace(max_denoising_steps=options.steps)
