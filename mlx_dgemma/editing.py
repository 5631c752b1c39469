"""Rewrite some lines of a text in place: denoising starts from the old lines, and everything else is given.

Source   ours; docs/infilling.md
Differs  asking for the edit in the prompt lets the model write the whole text again, and change any of it

Knows no engine, like infilling.py, which does the work.
"""

import difflib
from collections.abc import Iterator
from typing import NamedTuple

from .config import GenerationConfig
from .errors import DgemmaError
from .events import BlockDone, Done, StepDone
from .infilling import Filled, fill
from .layout import Hole
from .session import Session
from .units import count

NOISE = 0.5  # share of the old tokens that denoising starts without


class Edited(NamedTuple):
    """The last event of `edit`."""

    text: str
    canvases: list[Filled]  # one for each canvas that it took


def edit(
    session: Session,
    text: str,
    instruction: str,
    settings: GenerationConfig,
    *,
    lines: list[tuple[int, int]] | None = None,
    seed: int = 0,
    noise: float = NOISE,
) -> Iterator[StepDone | BlockDone | Done | Filled | Edited]:
    """Rewrite lines of `text` as `instruction` says; ends with an Edited.

    lines: ranges that may change, counted from 1, both ends included; by default all. Ranges that do not fit one canvas
    together are rewritten one after the other, long ones in parts. noise: near 0 keeps to the old text, 1 forgets it.
    Raises DgemmaError for ranges outside the text, or that overlap.
    """
    pieces = [part for piece in cut(text, lines) for part in _canvas_sized(piece, session)]
    prompt, done = f"{instruction}\n{text}", []
    for group in _groups(pieces, session):
        parts = [Hole(old=piece.text) if i in group else piece.text for i, piece in enumerate(pieces)]
        for event in fill(session, parts, settings, prompt=prompt, seed=seed, noise=noise):
            yield event
        done.append(event)
        for i, new in zip(group, event.holes, strict=True):
            pieces[i] = pieces[i]._replace(text=new)
    yield Edited("".join(piece.text for piece in pieces), done)


class Piece(NamedTuple):
    text: str
    editable: bool


def cut(text: str, lines: list[tuple[int, int]] | None) -> list[Piece]:
    """The text between the ranges, and in them. Raises DgemmaError for a range that is not there, or overlaps."""
    every = text.splitlines(keepends=True)
    if not every:
        raise DgemmaError("the text is empty, expected something to edit; to write into it use --infill")
    pieces, at = [], 0
    for first, last in sorted(lines or [(1, len(every))]):
        if not 1 <= first <= last <= len(every):
            raise DgemmaError(
                f"lines {first}:{last} are not in the text, which has {count(len(every), 'line')}; "
                f"expected FIRST:LAST between 1 and {len(every)}"
            )
        if first <= at:
            raise DgemmaError(f"lines {first}:{last} overlap with a range that ends at line {at}; give each line once")
        pieces += [Piece("".join(every[at : first - 1]), False), Piece("".join(every[first - 1 : last]), True)]
        at = last
    return [*pieces, Piece("".join(every[at:]), False)]


def _canvas_sized(piece: Piece, session: Session) -> list[Piece]:
    """An editable piece as pieces of whole lines of at most half a canvas: the other half shows what follows."""
    most, parts, taken = session.canvas_length // 2, [], 0
    size = len(session.tokenizer.encode(piece.text))
    if not piece.editable or size <= session.canvas_length:
        return [piece]
    for line in piece.text.splitlines(keepends=True):
        size = len(session.tokenizer.encode(line))
        if parts and taken + size <= most:
            parts[-1] += line
            taken += size
        else:
            parts.append(line)
            taken = size
    return [Piece(part, True) for part in parts]


def _groups(pieces: list[Piece], session: Session) -> list[list[int]]:
    """Which editable pieces share a canvas, with all that stands between them."""
    groups: list[list[int]] = []
    for i, piece in enumerate(pieces):
        if not piece.editable:
            continue
        if groups:
            whole = "".join(other.text for other in pieces[groups[-1][0] : i + 1])
            if len(session.tokenizer.encode(whole)) <= session.canvas_length // 2:
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


def diff(before: str, after: str, name: str) -> str:
    """A unified diff, "" where nothing changed."""
    old, new = (text.splitlines(keepends=True) for text in (before, after))
    # A last line without its end is marked as git and diff mark it.
    lines = [line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
             for line in difflib.unified_diff(old, new, f"a/{name}", f"b/{name}")]  # fmt: skip
    return "".join(lines)
