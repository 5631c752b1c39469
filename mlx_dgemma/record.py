"""Records one generation and writes it as a page that replays it: one HTML file, which needs no network.

Shapes   C canvas slots of one row, S steps of one block
Differs  a page keeps each draft as what changed since the step before, and entropies as float16 (three digits)

The page is replay.html with the data below put in, as JSON. Generated text is hostile: in the page it exists as data
and as text nodes, never as markup, and the page's policy runs no script but its own.

    format, version           "dgemma-replay", 1
    title, prompt, model, seed, settings
    states                    {name: what it means}; a step counts them from 0
    tokens                    [[id, text], …], and [id, "", name] of special ones; the rest are places in this table
    blocks                    one per canvas:
        slots                 C
        steps                 temperature; draft [slot, token, …] where it changed; canvas [slot, token, …] where it is
                              not the draft; states, C digits; entropy, base64 of C float16; end, slot where text ends
        settled               for each slot the step from which its draft stays
        tokens, end           what was committed, and where its text ends
    totals                    steps, tokens, known of these, tokens_per_forward, stopped, seconds; of an interrupted run
                              the last two are null
"""

import base64
import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from .config import GenerationConfig
from .events import BlockDone, Done, StepDone
from .files import replace_text
from .slots import STATES, known_slots, slot_states, text_end
from .tokenizer import Tokenizer

FORMAT, VERSION = "dgemma-replay", 1
TEMPLATE = Path(__file__).with_name("replay.html")


class Recorder:
    """Listens to one generation and keeps what a replay of its first row shows."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: GenerationConfig,
        *,
        prompt: str = "",
        model: str = "",
        seed: int = 0,
        title: str = "",
    ):
        """prompt, model, seed and title are shown above the canvas; of a model's path only its last part."""
        self._tokenizer, self._settings = tokenizer, settings
        self._head = {
            "title": title or "A text, denoised step by step",
            "prompt": prompt,
            "model": Path(model).resolve().name if model and os.path.exists(model) else model,
            "seed": seed,
        }
        self._places: dict[int, int] = {}  # token id → place in the table
        self._blocks: list[dict] = []
        self._steps: list[dict] = []  # of the block at hand
        self._drafts: list[np.ndarray] = []
        self._known = np.ones(0, bool)  # slots of that block
        self._n_known = 0
        self._done: Done | None = None

    def take(self, event: StepDone | BlockDone | Done) -> None:
        match event:
            case StepDone(block=0, step=0) if self._done is not None:  # another canvas of the same work: show the last
                self._blocks, self._n_known, self._done = [], 0, None
                self._take_step(event)
            case StepDone() if event.running[0]:
                self._take_step(event)
            case BlockDone() if self._steps or (event.tokens[0] != self._settings.pad_token_id).any():
                self._close_block(event.tokens[0])
            case Done():
                self._done = event

    def page(self) -> str:
        """The HTML page. Also of a generation that was interrupted, as far as it came."""
        if self._steps:
            self._close_block(self._drafts[-1])
        shell = TEMPLATE.read_text(encoding="utf-8")
        script = re.search(r"<script>(.*?)</script>", shell, flags=re.S)[1]
        fingerprint = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        return shell.replace("SCRIPT_HASH", fingerprint, 1).replace("REPLAY_DATA", _embedded(self._data()), 1)

    def write(self, path: str | Path) -> None:
        """Write the page; an older file of that name stays until the new one is complete. Raises DgemmaError."""
        replace_text(path, self.page())

    def _take_step(self, event):
        draft, canvas, entropy = event.draft[0], event.canvas[0], event.entropy[0]
        self._known = known_slots(event)
        before = self._drafts[-1] if self._drafts else None
        changed = np.arange(len(draft)) if before is None else np.flatnonzero(draft != before)
        self._steps.append(
            {
                "temperature": round(float(np.ravel(event.temperature)[0]), 4),
                "draft": self._entries(draft, changed),
                "canvas": self._entries(canvas, np.flatnonzero(canvas != draft)),
                "states": "".join(map(str, slot_states(event, before).tolist())),
                "entropy": base64.b64encode(entropy.astype("<f2").tobytes()).decode(),
                "end": text_end(draft, self._settings, self._known),
            }
        )
        self._drafts.append(draft.copy())

    def _entries(self, tokens, slots):
        return [n for slot in slots.tolist() for n in (slot, self._place(int(tokens[slot])))]

    def _place(self, token):
        return self._places.setdefault(token, len(self._places))

    def _close_block(self, tokens):
        before = sum(block["slots"] for block in self._blocks)
        end = min(text_end(tokens, self._settings), max(0, self._settings.max_new_tokens - before))
        known = self._known if self._steps else np.ones(len(tokens), bool)  # with nothing to fill there is no step
        self._n_known += int(known[: end + 1].sum())
        self._blocks.append(
            {
                "slots": len(tokens),
                "steps": self._steps,
                "settled": settled_steps(self._drafts).tolist() if self._steps else [],
                "tokens": [self._place(token) for token in tokens.tolist()],
                "end": end,
            }
        )
        self._steps, self._drafts = [], []

    def _data(self):
        tokens = list(self._places)
        named = [[token, text] for token, text in zip(tokens, self._tokenizer.pieces(tokens), strict=True)]
        table = [[*x, self._tokenizer.vocabulary.token(x[0])] if not x[1] else x for x in named]
        return {
            "format": FORMAT,
            "version": VERSION,
            **self._head,
            "settings": dataclasses.asdict(self._settings),
            "states": STATES,
            "totals": self._totals(),
            "tokens": table,
            "blocks": self._blocks,
        }

    def _totals(self):
        steps, done = sum(len(block["steps"]) for block in self._blocks), self._done
        if done is None:
            tokens, stopped, seconds = sum(block["end"] for block in self._blocks), None, None
        else:
            stopped, seconds = done.stopped[0], round(done.stats.seconds, 3)
            tokens = len(done.tokens[0]) + stopped  # as in Stats, the stop id counts
        return {
            "steps": steps,
            "tokens": tokens,
            "known": self._n_known,
            "tokens_per_forward": round((tokens - self._n_known) / steps, 2) if steps else None,
            "stopped": stopped,
            "seconds": seconds,
        }


def settled_steps(drafts: list[np.ndarray]) -> np.ndarray:
    """For each slot the first step from which its draft stays as it is. drafts: S × (C,) → (C,)"""
    drafts = np.stack(drafts)
    moved = drafts[1:] != drafts[:-1]  # (S-1, C)
    steps = np.arange(1, len(drafts))[:, None]
    return (moved * steps).max(axis=0, initial=0)


def _embedded(data):
    """JSON that no HTML parser sees a tag in: ASCII, with the characters that begin or end one escaped."""
    text = json.dumps(data, separators=(",", ":"))
    return text.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&"})
