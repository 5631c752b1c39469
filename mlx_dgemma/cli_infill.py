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

from rich.console import Console

from .errors import DgemmaError
from .events import BlockDone, Done, StepDone
from .files import read_text, same_file
from .infilling import DOUBT, GUESS, INFILL_PROMPT, LENGTHS, SEARCH_STEPS, Filled, Searched, fill, parse
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


def context_of_text(parts: list, prompt: str | None, tokenizer) -> int:
    """About how many tokens the text, what is asked of it and its holes take."""
    texts = [part for part in parts if isinstance(part, str)]
    holes = sum(part.length or GUESS for part in parts if isinstance(part, Hole))
    return len(tokenizer.encode("".join([prompt or INFILL_PROMPT, *texts]))) + holes


def is_quiet(options) -> bool:
    """Whether stderr stays empty: an editor that filters a text through a command may read both streams."""
    return options.json or options.infill == "-"


def infill(session, parts, prompt, settings, options) -> int:
    """Fill the holes and print; returns the exit code."""
    lengths = read_lengths(options.lengths)
    if options.lengths is not None and lengths[0] > session.canvas_length:
        raise DgemmaError(
            f"--lengths is {options.lengths}, the canvas has {count(session.canvas_length, 'token')}; give fewer"
        )
    searches = any(isinstance(part, Hole) and part.length is None for part in parts)
    quiet = is_quiet(options)
    if searches and not quiet:
        print(f"trying {count(len(lengths), 'length')} for each hole without one", file=sys.stderr)
    events = fill(session, parts, settings, prompt=prompt, seed=options.seed, lengths=lengths)
    shown = "".join("…" if isinstance(part, Hole) else part for part in parts)
    with View(session.tokenizer, settings, quiet=quiet, writes=False) as view, SearchStatus(quiet) as status:
        for event in recorded(events, options, session.tokenizer, settings, shown):
            status.draw(event)
            if not isinstance(event, Filled | Searched):
                view.draw(event)
        if not quiet:
            remark(view, event)
            view.final_line(event.done.stats, options.seed)
    if options.json:
        write_exactly(json.dumps(report(event, options), ensure_ascii=False) + "\n")
    else:
        write_exactly(event.text if options.infill is not None else event.holes[0])
    return 0


class SearchStatus:
    """On a terminal, one line that says how far the search for a length is."""

    def __init__(self, quiet: bool):
        self._quiet, self._status = quiet, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def draw(self, event) -> None:
        """Any event: what is no step of a search ends the line."""
        if not isinstance(event, Searched):
            self._stop()
        elif not self._quiet:
            if self._status is None:
                self._status = Console(stderr=True).status("")
                self._status.start()
            text = f"hole {event.hole + 1}: {count(event.lengths, 'length')}, step {event.step + 1} of {SEARCH_STEPS}"
            self._status.update(text)

    def _stop(self):
        if self._status is not None:
            self._status.stop()
            self._status = None


def remark(view: View, filled: Filled) -> None:
    """What the search cost, and whether the model stands by what it wrote."""
    if filled.search_steps:
        view.note(f"compared lengths in {count(filled.search_steps, 'step')}, {filled.search_seconds:.2f} s")
    if filled.doubt is not None and filled.doubt >= DOUBT:
        view.note(f"the model doubts the result ({filled.doubt:.1f} nats): look at it twice")


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
            if recorder is not None:  # a search comes before
                recorder.take(event)
            is_done = isinstance(event, Done) or (is_done and not isinstance(event, StepDone | BlockDone))
            yield event
    finally:
        if recorder is not None:
            recorder.write(options.record)


def shown_doubt(filled: Filled) -> float | None:
    """For JSON."""
    return None if filled.doubt is None else round(filled.doubt, 3)


def report(filled: Filled, options) -> dict:
    """What --json prints."""
    return {
        "text": filled.text,
        "holes": filled.holes,
        "lengths": filled.lengths,
        "search_steps": filled.search_steps,
        "search_seconds": round(filled.search_seconds, 3),
        "doubt": shown_doubt(filled),
        "seed": options.seed,
        "model": options.model,
        "stats": dataclasses.asdict(filled.done.stats),
    }
