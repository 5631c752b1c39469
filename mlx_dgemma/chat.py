"""The chat loop of the command line: prompts from standard input, until an empty line or the end.

On a terminal a line can be edited, and one that ends in a backslash goes on in the next. Ctrl-C stops the answer being
written; at the prompt it ends the chat. Answering is given as a function, so this module knows no model.
"""

import contextlib
import sys
from collections.abc import Callable

from .errors import ContextError, DgemmaError
from .events import Done


def chat(answer: Callable[[list[dict]], Done], messages: list[dict], first: str | None) -> int:
    """Answer `first` and then what is typed. messages: the system prompt, if any. Returns the exit code."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - gives input() line editing
        print("an empty line ends the chat", file=sys.stderr)
    prompt = first
    while prompt := prompt or read_prompt():
        turn = {"role": "user", "content": prompt}
        prompt = None
        try:
            done = answer([*messages, turn])
        except ContextError as error:
            if not messages:
                raise
            print(f"error: {error}; this conversation is full, start a new one", file=sys.stderr)
            return 1
        except DgemmaError as error:  # this prompt's fault; the conversation goes on without it
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("stopped; the conversation goes on without this turn", file=sys.stderr)
        else:
            messages = [*messages, turn, {"role": "assistant", "content": done.text}]
    return 0


def read_prompt() -> str:
    """One prompt, "" at the end."""
    lines, ask = [], sys.stdin.isatty()
    try:
        while True:
            line = input("> " if not lines else "… ") if ask else sys.stdin.readline().rstrip("\n")
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines).strip()
    except EOFError:
        print(file=sys.stderr)
        return ""
    except UnicodeDecodeError:
        raise DgemmaError("the prompt is not valid UTF-8; save it as UTF-8 and try again") from None
