"""Rewrite some lines of a text in place: denoising starts from the old lines, and everything else is given.

Source   ours; docs/infilling.md
Differs  asking for the edit in the prompt lets the model write the whole text again, and change any of it

Knows no engine, like infilling.py, which does the work.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator
from typing import NamedTuple

from .config import GenerationConfig
from .errors import DgemmaError
from .events import BlockDone, Done, Stats, StepDone
from .infilling import Filled, fill
from .layout import Hole, encode_text, has_crlf, head, with_crlf
from .session import Session
from .units import count

NOISE = 0.5  # share of the old tokens that denoising starts without
DELTAS = (-4, -3, -2, -1, 0, 1, 2, 3, 4)  # how many tokens more than the old lines the new ones may take
PARTS = re.compile(r"(\ufeff?)(.*?)(\r?\n|)", re.S)  # byte order mark, text, end of its last line


class Edited(NamedTuple):
    """The last event of `edit`."""

    text: str
    canvases: list[Filled]  # one for each canvas that it took

    @property
    def stats(self) -> Stats:
        """Of all canvases together."""
        every = [x.done.stats for x in self.canvases]
        summed = ("prompt_tokens", "reused_tokens", "tokens", "blocks", "steps", "seconds")
        return dataclasses.replace(
            every[0],
            **{name: sum(getattr(x, name) for x in every) for name in summed},
            **{name: max(getattr(x, name) for x in every) for name in ("peak_memory", "cache_bytes")},
        )


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
    if not 0 <= noise <= 1:
        raise DgemmaError(f"noise is {noise}, expected a share between 0 and 1")
    is_crlf = has_crlf(text)
    text = text.replace("\r\n", "\n") if is_crlf else text
    # A last line without its end is edited as one that has it: models know lines, and the end would cost a slot.
    end = "" if text.endswith("\n") else "\n"
    text += end if text else ""
    pieces = [part for piece in cut(text, lines) for part in _canvas_sized(piece, session)]
    prompt, done = f"{instruction}\n{text}", []
    sizes = [len(encode_text(piece.text, session.tokenizer)) for piece in pieces]
    for group in _groups(pieces, sizes, session.canvas_length // 2):
        parts = [Hole(sizes[i], piece.text) if i in group else piece.text for i, piece in enumerate(pieces)]
        for event in fill(session, parts, settings, prompt=prompt, seed=seed, noise=noise, deltas=DELTAS):
            yield event
        done.append(event)
        for i, new in zip(group, event.holes, strict=True):
            pieces[i] = pieces[i]._replace(text=new)
    new = "".join(piece.text for piece in pieces).removesuffix(end)
    yield Edited(with_crlf(new) if is_crlf else new, done)


class Piece(NamedTuple):
    text: str
    editable: bool


def split_lines(text: str) -> list[str]:
    """Lines as an editor and a diff count them, with their ends. str.splitlines also ends one at a form feed."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def cut(text: str, lines: list[tuple[int, int]] | None) -> list[Piece]:
    """The text between the ranges, and in them. Raises DgemmaError for a range that is not there, or overlaps.

    The end of a range's last line stays, so that the next line is one as before; so does a byte order mark.
    """
    every = split_lines(text)
    if not every:
        raise DgemmaError("the text is empty, expected something to edit; to write into it use --infill")
    pieces, at, given = [], 0, ""
    ranges = [(1, len(every))] if lines is None else [(x, x) if isinstance(x, int) else x for x in lines]
    for first, last in sorted(ranges):
        if not 1 <= first <= last <= len(every):
            raise DgemmaError(
                f"lines {first}:{last} are not in the text, which has {count(len(every), 'line')}; "
                f"expected FIRST:LAST between 1 and {len(every)}"
            )
        if first <= at:
            raise DgemmaError(f"lines {first}:{last} overlap with a range that ends at line {at}; give each line once")
        mark, old, end = PARTS.fullmatch("".join(every[first - 1 : last])).groups()
        if not old.strip():
            raise DgemmaError(f"lines {first}:{last} are blank, expected text to rewrite; to write there use --infill")
        pieces += [Piece(given + "".join(every[at : first - 1]) + mark, False), Piece(old, True)]
        at, given = last, end
    return [*pieces, Piece(given + "".join(every[at:]), False)]


def _canvas_sized(piece: Piece, session: Session) -> list[Piece]:
    """An editable piece as pieces of at most half a canvas: the other half shows what follows. Whole lines, where one
    line is not longer than that."""
    most, tokenizer = session.canvas_length // 2, session.tokenizer
    if not piece.editable or len(encode_text(piece.text, tokenizer)) <= session.canvas_length:
        return [piece]
    parts, room = [], 0
    for line in split_lines(piece.text):
        size = len(encode_text(line, tokenizer))
        if size <= room:
            parts[-1] += line
            room -= size
            continue
        while size > most:
            _, rest = head(line, most, tokenizer)
            parts.append(line.removesuffix(rest) or line[0])
            line = line[len(parts[-1]) :]
            size = len(encode_text(line, tokenizer))
        parts.append(line)
        room = most - size
    split = (PARTS.fullmatch(part).groups() for part in parts)
    return [Piece(text, bool(i == 1 and text.strip())) for three in split for i, text in enumerate(three)]


def _groups(pieces: list[Piece], sizes: list[int], most: int) -> list[list[int]]:
    """Which editable pieces share a canvas, with all that stands between them: together at most `most` tokens."""
    groups: list[list[int]] = []
    for i in (i for i, piece in enumerate(pieces) if piece.editable):
        if groups and sum(sizes[groups[-1][0] : i + 1]) <= most:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def diff(before: str, after: str, name: str) -> str:
    """A unified diff, "" where nothing changed. name: the file's, as `patch -p1` looks for it."""
    old, new = split_lines(before), split_lines(after)
    # A last line without its end is marked as git and diff mark it.
    lines = [line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
             for line in difflib.unified_diff(old, new, _quoted(f"a/{name}"), _quoted(f"b/{name}"))]  # fmt: skip
    return "".join(lines)


def _quoted(name):
    """A file's name as git writes it in a diff: in quotes where a character has a meaning there."""
    if re.search(r'[\x00-\x1f"\\\x7f]', name):
        return '"' + re.sub(r'[\x00-\x1f"\\\x7f]', lambda match: f"\\{ord(match[0]):03o}", name) + '"'
    return name + "\t" * (" " in name)
