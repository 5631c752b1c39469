"""python -m convert fit [MODEL] --memory 18GB: which recipes fit, for MLX and for ggml.

The table goes to stdout, what was found here to stderr. Exit codes: 0 done, 1 an `error:` line, 2 wrong usage, 130
Ctrl-C.
"""

import argparse
import json

from mlx_dgemma.cli import guarded, print_note
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.units import count, human_bytes, parse_bytes

from .fit import CONTEXT, Line, Room, Source, fit, open_source, rooms, usual_context

EPILOG = """\
MODEL is a folder, a GGUF file, a config.json or a hub id, whose config.json alone is fetched; without one the released
26B is planned. SIZE is what the device may use: a Mac's GPU about two thirds of 16 GB and three quarters of 36 GB or
more, unless `sudo sysctl iogpu.wired_limit_mb=N` says otherwise; a card all it has but what the desktop takes.
"""
NAMES = {"mlx": "MLX", "gguf": "GGUF"}


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    return guarded(lambda: _run(args))


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m convert fit",
        description="Say which recipes fit a device's memory, and with how many tokens. Reads no weights.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="what to plan (default: the released 26B)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--memory", metavar="SIZE", help="what a GPU may use: 18GB, 16GiB, or 24 for gigabytes")
    where.add_argument("--this-machine", action="store_true", help="what is found here (default)")
    parser.add_argument("--context", type=int, metavar="N", help=f"tokens, prompt and answer (default: {CONTEXT})")
    parser.add_argument(
        "--recipe", action="append", default=[], metavar="FILE", help="a JSON recipe to plan too; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def _run(args):
    found, notes = rooms(None if args.memory is None else _bytes(args.memory))
    source = open_source(args.model)
    context = usual_context(source.config) if args.context is None else args.context
    lines = list(fit(source, found, context, tuple(args.recipe)))
    if args.json:
        print(json.dumps(as_json(source, found, lines, context)))
        return 0
    for target, room in found.items():
        if args.memory is None:
            print_note(f"{room.told}: {human_bytes(room.bytes)} for {NAMES[target]}")
    for note in notes:
        print_note(note)
    print(as_text(source, lines, context))
    return 0


def _bytes(text):
    try:
        return parse_bytes(text, "GB")
    except ValueError as error:
        raise DgemmaError(f"--memory: {error}") from None


def as_text(source: Source, lines: list[Line], context: int) -> str:
    """A table for people."""
    rooms = sorted({line.room for line in lines})
    room = " and ".join(human_bytes(n) for n in rooms)
    rows = [("", "recipe", "weights", "keys, values", "computing", "total", "verdict")]
    for line in lines:
        rows.append((NAMES[line.target], line.recipe, *map(human_bytes, (*line.need, line.need.total)), verdict(line)))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    table = ["  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]),
                        *(cell.rjust(w) for cell, w in zip(row[2:6], widths[2:], strict=True)), row[6]]).rstrip()
             for row in rows]  # fmt: skip
    return "\n".join([f"{source.name}, {context:,} tokens, {room}", *table])


def verdict(line: Line) -> str:
    """What to expect, in words."""
    if line.verdict == "fits":
        return f"fits, up to {line.tokens:,} tokens" if line.tokens else "fits"
    ways = [f"with {line.tokens:,} tokens at most"] * bool(line.tokens)
    if line.layers:
        ways.append(f"with {count(line.layers, 'layer')} on the GPU, the others on the CPU")
    too_large = f"too large by {human_bytes(line.over)}"
    return f"{too_large}; fits {', or '.join(ways)}" if ways else too_large


def as_json(source: Source, found: dict[str, Room], lines: list[Line], context: int) -> dict:
    """What --json prints."""
    return {
        "model": source.name,
        "context": context,
        "memory": {target: room._asdict() for target, room in found.items()},
        "recipes": [
            {
                "target": line.target,
                "recipe": line.recipe,
                **line.need._asdict(),
                "total": line.need.total,
                "verdict": line.verdict,
                "missing": line.over,
                "tokens": line.tokens,
                "layers": line.layers,
            }
            for line in lines
        ],
    }
