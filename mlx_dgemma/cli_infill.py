"""The infilling options of the command line: `--infill FILE`, or `--prefix FILE --suffix FILE`.

The whole text goes to stdout with --infill; with --prefix and --suffix only what belongs between them, so that an
editor can insert it; neither adds a newline. A file called - is standard input.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from typing import TextIO

from .errors import DgemmaError
from .events import BlockDone, Done, StepDone
from .files import read_text, same_file
from .infilling import LENGTHS, Filled, fill, parse
from .layout import Hole
from .record import Recorder
from .units import count
from .view import View, printable

# What a conversation has and a text does not.
NOT_WITH_INFILL = (
    "chat", "system", "thinking", "template", "regex", "json_schema", "max_tokens", "first_canvas", "drop_tail",
)  # fmt: skip


def add_infill_options(parser) -> None:
    add = parser.add_argument
    add(
        "--infill",
        metavar="FILE",
        help="a text with <|hole|> or <|hole:N|> (N tokens) where something is to be written",
    )
    add("--prefix", metavar="FILE", help="the text before one hole; prints what belongs between it and --suffix")
    add("--suffix", metavar="FILE", help="the text behind that hole")
    add("--lengths", metavar="A-B", help="tokens to try for a hole without N (default: 1 to 16, then fewer and fewer)")


def check_infill_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> bool:
    """Whether there is something to infill. Ends with a usage error where options exclude each other."""
    given = [name for name in ("infill", "prefix", "suffix") if getattr(options, name) is not None]
    if not given:
        if options.lengths is not None:
            parser.error("--lengths is for --infill, or --prefix and --suffix")
        return False
    if "infill" in given and len(given) > 1:
        parser.error(f"--infill and --{given[1]} exclude each other")
    for name in NOT_WITH_INFILL:
        if getattr(options, name) not in (None, False):
            parser.error(f"--{given[0]} and --{name.replace('_', '-')} exclude each other")
    if [getattr(options, name) for name in given].count("-") + (options.prompt == "-") > 1:
        parser.error("standard input can be read once; give the other text as a file")
    return True


def read_parts(options) -> list | None:
    """The text and its holes, or None where nothing is to be infilled. Raises DgemmaError for all that is wrong with
    the options, before a model is loaded."""
    files = [name for name in (options.infill, options.prefix, options.suffix) if name is not None]
    if not files:
        return None
    read_lengths(options.lengths)
    check_record(options.record, files)
    if options.infill is not None:
        return parse(read_text(options.infill))
    before, behind = ("" if name is None else read_text(name) for name in (options.prefix, options.suffix))
    if not before and not behind:
        raise DgemmaError(
            "--prefix and --suffix are empty, expected text on one side of the hole; use --prompt instead"
        )
    return [before, Hole(), behind]


def check_record(record: str | None, files: list[str]) -> None:
    """Raises DgemmaError where the page that --record writes would replace a file that is read."""
    for name in files:
        if record is not None and name != "-" and same_file(record, name):
            raise DgemmaError(f"--record {record}: is the text itself, expected a page's name; choose another name")


def is_quiet(options) -> bool:
    """Whether stderr stays empty: an editor that filters a text through a command may read both streams."""
    return options.json or options.infill == "-"


def infill(session, parts, prompt, settings, options) -> int:
    """Fill the holes and print; returns the exit code."""
    lengths = read_lengths(options.lengths)
    searches = any(isinstance(part, Hole) and part.length is None for part in parts)
    quiet = is_quiet(options)
    if searches and not quiet:
        print(f"trying {count(len(lengths), 'length')} for each hole without one", file=sys.stderr)
    events = fill(session, parts, settings, prompt=prompt, seed=options.seed, lengths=lengths)
    shown = "".join("…" if isinstance(part, Hole) else part for part in parts)
    with View(session.tokenizer, settings, quiet=quiet, writes=False) as view:
        for event in recorded(events, options, session.tokenizer, settings, shown):
            if not isinstance(event, Filled):
                view.draw(event)
        if not quiet:
            view.final_line(event.done.stats, options.seed)
    if options.json:
        write_exactly(json.dumps(report(event, options), ensure_ascii=False) + "\n")
    else:
        write_exactly(event.text if options.infill is not None else event.holes[0])
    return 0


def write_exactly(text: str, stream: TextIO | None = None) -> None:
    """Text to a stream (default: stdout): UTF-8 whatever the locale says, its own line ends. A terminal gets what is
    printable."""
    stream = stream or sys.stdout
    if stream.isatty():
        stream.write(printable(text))
    else:
        stream.flush()
        stream.buffer.write(text.encode())


def read_lengths(text: str | None) -> tuple[int, ...]:
    """ "4-12" or "8" → the numbers. Raises DgemmaError."""
    if text is None:
        return LENGTHS
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise DgemmaError(f"--lengths is {text!r}, expected tokens such as 4-12 or 8")
    return tuple(range(first, last + 1))


def recorded(events, options, tokenizer, settings, prompt) -> Iterator:
    """The same events; with --record they are also written as a page, as far as they came: the last canvas of several
    generations."""
    if not options.record:
        yield from events
        return
    recorder, is_done = None, True
    try:
        for event in events:
            if is_done and isinstance(event, StepDone | BlockDone):
                recorder = Recorder(tokenizer, settings, prompt=prompt, model=options.model, seed=options.seed)
            recorder.take(event)
            is_done = isinstance(event, Done) or (is_done and not isinstance(event, StepDone | BlockDone))
            yield event
    finally:
        if recorder is not None:
            recorder.write(options.record)


def report(filled: Filled, options) -> dict:
    """What --json prints."""
    return {
        "text": filled.text,
        "holes": filled.holes,
        "lengths": filled.lengths,
        "search_steps": filled.search_steps,
        "seed": options.seed,
        "model": options.model,
        "stats": dataclasses.asdict(filled.done.stats),
    }
