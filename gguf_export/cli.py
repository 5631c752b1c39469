"""python -m gguf_export info FILE

Results go to stdout, progress to stderr. Exit codes: 0 done, 1 a bad input (one `error:` line), 2 wrong usage,
130 Ctrl-C. A command is a function that adds its options and sets `run`, which takes them and returns the exit code.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.quality import error_table


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. Ctrl-C passes through, to __main__.py."""
    options = _parser().parse_args(argv)
    try:
        code = options.run(options)
        sys.stdout.flush()  # so that a reader who left is noticed here
        return code
    except DgemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of stdout went away, as in `… | head`: nobody is left to answer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m gguf_export", description="Look into a GGUF file.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_info,):
        add(commands)
    return parser


def _add_info(commands):
    parser = commands.add_parser("info", help="what a file holds", description="Say what a GGUF file holds.")
    parser.add_argument("file", metavar="FILE", help="a GGUF file, of any architecture")
    parser.add_argument(
        "--verify",
        metavar="SRC",
        nargs="?",
        const="",
        help="reopen the file with llama.cpp's reader and dequantize every tensor; with SRC, the checkpoint folder or "
        "GGUF file it was made from, report the error per role",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.set_defaults(run=_info)


def _info(options):
    from mlx_dgemma.gguf.reader import read_gguf

    from .info import as_text, summarize

    summary = summarize(read_gguf(options.file))
    table = ""
    if options.verify is not None:
        from .verify import open_source, verify_gguf

        # Without a source the file is compared with itself, as our reader and llama.cpp's have it.
        errors = verify_gguf(Path(options.file), open_source(Path(options.verify or options.file)))
        summary["verify"] = [error._asdict() for error in errors] if options.verify else []
        table = (
            error_table(errors) if options.verify else "verified       every tensor is there, finite, and read alike"
        )
    print(json.dumps(summary) if options.json else as_text(summary))
    if table and not options.json:
        print(f"\n{table}")
    return 0
