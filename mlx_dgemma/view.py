"""Draws events: the canvas as it resolves on a terminal, finished text everywhere else.

All terminal codes of this package live here. Text goes to stdout, everything else to stderr.

On a terminal each token has the style of its slot's state, which the legend under the canvas shows. The four differ
without colours too. Without a terminal, or on one that cannot be drawn over (TERM=dumb), each block's text is written
as soon as the block is done.
"""

import sys

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from .config import GenerationConfig
from .events import BlockDone, Done, Stats, StepDone
from .slots import ACCEPTED, CHANGED, KNOWN, NOISY, STATES, known_slots, slot_states, text_end
from .tokenizer import Tokenizer
from .units import count, human_bytes

STYLES = {KNOWN: "bold green", ACCEPTED: "", CHANGED: "cyan", NOISY: "dim"}
WITHOUT_COLOURS = {**STYLES, CHANGED: "underline"}  # of the others the attribute is left
HIDDEN = "dim italic"  # what stands behind the text's end


class View:
    """Shows one generation of one row. Use as a context manager: leaving it restores the terminal, also on Ctrl-C."""

    def __init__(self, tokenizer: Tokenizer, settings: GenerationConfig, quiet: bool = False, writes: bool = True):
        """quiet: no text, no canvas. writes: the answer goes to stdout as it comes; otherwise only the canvas shows."""
        self._tokenizer, self._settings = tokenizer, settings
        self._console = Console(stderr=True)
        self._styles = WITHOUT_COLOURS if self._console.no_color else STYLES
        self._is_live = not quiet and self._console.is_interactive and sys.stdout.isatty()
        self._writes = writes and not quiet
        self._live: Live | None = None
        self._tokens: list[int] = []  # of finished blocks
        self._written = 0  # characters of the answer on stdout
        self._last_draft: np.ndarray | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._clear()

    def draw(self, event) -> None:
        match event:
            case StepDone() if self._is_live:
                self._draw_step(event)
            case BlockDone(tokens=tokens):
                self._clear()
                text = tokens[0, : text_end(tokens[0], self._settings)].tolist()
                self._tokens = [*self._tokens, *text][: self._settings.max_new_tokens]
                self._last_draft = None
                if self._writes:
                    self._write(final=False)
            case Done(tokens=tokens):
                self._clear()
                self._tokens = tokens[0]
                if self._writes:
                    self._write(final=True)

    def note(self, text: str) -> None:
        """A remark on stderr."""
        self._console.print(Text(printable(text), style="dim"), soft_wrap=True)

    def final_line(self, stats: Stats, seed: int) -> None:
        """The last line on stderr: what the generation cost."""
        self._console.print(
            f"{count(stats.blocks, 'block')}, {count(stats.steps, 'step')}, {count(stats.tokens, 'token')}, "
            f"{stats.tokens_per_forward:.1f} tokens per forward | {stats.tokens_per_second:.1f} tok/s, "
            f"first block after {stats.seconds_to_first_block:.2f} s | "
            f"peak {human_bytes(stats.peak_memory)}, cache {human_bytes(stats.cache_bytes)} | seed {seed}",
            style="dim",
            highlight=False,
            soft_wrap=True,
        )

    def _draw_step(self, event: StepDone):
        if self._live is None:
            # Transient: the canvas leaves no trace once its text is final.
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        draft = event.draft[0]
        end = text_end(draft, self._settings, known_slots(event))
        states = slot_states(event, self._last_draft)
        text = Text(self._unfinished_line())
        for i, (piece, state) in enumerate(zip(self._tokenizer.pieces(draft.tolist()), states.tolist(), strict=True)):
            if i >= end:
                text.append("·", HIDDEN)
            else:
                text.append(printable(piece) or "·" * (state == NOISY), self._styles[state])
        text.append("\n").append(self._status(event, states))
        self._last_draft = draft
        # The last lines that fit: the canvas is at the end, and what scrolled off cannot be drawn over.
        lines = text.wrap(self._console, self._console.width)
        self._live.update(Text("\n").join(lines[1 - self._console.height :]), refresh=True)

    def _status(self, event, states):
        """Where the step stands, and the legend where the terminal is wide enough."""
        free = states[states != KNOWN]
        share = 100 * (free != NOISY).mean() if free.size else 100
        status = Text().append(f"block {event.block + 1}, step {event.step + 1} | {share:.0f} % accepted", "dim")
        legend = Text().append(" |", "dim")
        for state, name in enumerate(STATES):
            if state != KNOWN or free.size < states.size:
                legend.append(" ").append(name, self._styles[state])
        return status + legend if len(status) + len(legend) <= self._console.width else status

    def _write(self, final):
        """Write what is new of the answer. Before the end, an unfinished character is held back; with a live canvas
        so is the unfinished line, which the canvas shows."""
        answer = self._tokenizer.reply(self._tokens).text
        if not final:
            answer = answer.rstrip("\ufffd")
            if self._is_live:
                answer = answer[: answer.rfind("\n") + 1]
        new = answer[self._written :]
        self._written += len(new)
        sys.stdout.write((printable(new) if sys.stdout.isatty() else new) + ("\n" if final else ""))
        sys.stdout.flush()

    def _unfinished_line(self):
        return printable(self._tokenizer.reply(self._tokens).text[self._written :])

    def _clear(self):
        if self._live is not None:
            self._live.stop()
            self._live = None


def printable(text: str) -> str:
    """Generated text without control characters, which a terminal would obey; newlines and tabs stay."""
    return "".join(c if (c >= " " and not "\x7f" <= c <= "\x9f") or c in "\n\t" else "·" for c in text)
