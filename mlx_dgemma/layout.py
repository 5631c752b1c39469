"""Where the parts of a text go: committed prefix, canvas, and what no longer fits behind it.

Shapes   C canvas slots, L slots of one hole
Source   ours; docs/infilling.md

A text is a list of parts: known text, and holes. What stands before the first hole is encoded like a prompt; the
canvas holds everything from the first hole to the last, and as much of the text behind it as fits. If all of it does,
the end of the answer is known too. Parts become tokens one by one: no token reaches over the edge of a hole, and known
text is given back as it came, never as decoded tokens.

What looks like a special token in a text is text. As a token, <eos> would end the answer in front of a later hole, and
<|turn> would begin a turn. The model reads and writes LF; in a text whose lines all end in CRLF, so do those of holes.
"""

import re
from typing import NamedTuple

import numpy as np

from .clamp import Clamp
from .config import GenerationConfig
from .errors import DgemmaError
from .tokenizer import Tokenizer
from .units import count

# What follows an answer in training: one, and then the other up to the canvas's end.
TURN_END, FILL = "<turn|>", "<eos>"
# Behind the first character of what looks like a special token: encoded in two, it is none.
INSIDE_SPECIAL = re.compile(r"(?<=<)(?=\|[^\s<>|]+\|?>|[^\s<>|]+\|>|(?:pad|eos|bos|unk|mask)>)")


class Hole(NamedTuple):
    """A part to be written."""

    length: int | None = None  # slots; None: as many as the text that stands there takes, or not known yet
    old: str | None = None  # the text that stands there now


class Layout(NamedTuple):
    """One row of a batch."""

    prefix: list[int]  # of the answer, to be encoded behind the prompt
    clamp: Clamp  # of one row and one canvas; a hole's slots are noisy, those of old text are not
    holes: list[slice]  # slots of the canvas
    rest: str  # known text that the canvas has no room for
    is_crlf: bool = False  # its lines end in CRLF

    def texts(self, canvas: np.ndarray, tokenizer: Tokenizer) -> list[str]:
        """What stands in each hole. canvas (C,)"""
        texts = [tokenizer.decode(canvas[slots].tolist()) for slots in self.holes]
        return list(map(with_crlf, texts)) if self.is_crlf else texts


def lay_out(parts: list, lengths: list[int], tokenizer: Tokenizer, settings: GenerationConfig, C: int) -> Layout:
    """parts: texts and Holes. lengths: of each hole. Raises DgemmaError where what stands from the first hole to the
    last does not fit the canvas, or without a hole."""
    if not any(isinstance(part, Hole) for part in parts):
        raise DgemmaError("found no hole among the parts, expected at least one; without one there is nothing to write")
    if is_crlf := has_crlf(" ".join(part for part in parts if isinstance(part, str))):
        parts = [_with_lf(part) for part in parts]
    first, last = (next(i for i in order if isinstance(parts[i], Hole))
                   for order in (range(len(parts)), range(len(parts) - 1, -1, -1)))  # fmt: skip
    prefix = [token for text in parts[:first] for token in encode_text(text, tokenizer)]
    tokens, known, noisy, holes = [], [], [], []

    def add(new, is_known, is_noisy):
        tokens.extend(new)
        known.extend([is_known] * len(new))
        noisy.extend([is_noisy] * len(new))

    remaining = iter(lengths)
    for part in parts[first : last + 1]:
        if isinstance(part, Hole):
            length = next(remaining)
            old = encode_text(part.old or "", tokenizer)[:length]
            holes.append(slice(len(tokens), len(tokens) + length))
            add(old, False, False)
            add([settings.pad_token_id] * (length - len(old)), False, True)
        else:
            add(encode_text(part, tokenizer), True, False)
    if len(tokens) > C:
        raise _too_long(len(holes), known, C)
    suffix, rest = head("".join(parts[last + 1 :]), C - len(tokens), tokenizer)
    add(suffix, True, False)
    if not rest:
        end = [_end_token(tokenizer, settings, TURN_END), *[_end_token(tokenizer, settings, FILL)] * C]
        add(end[: C - len(tokens)], True, False)
    row = (np.array(array, kind)[None] for array, kind in ((tokens, np.int32), (known, bool), (noisy, bool)))
    return Layout(prefix, Clamp(*row), holes, rest, is_crlf)


def old_length(hole: Hole, parts: list, tokenizer: Tokenizer) -> int:
    """Slots of a hole with old text: what it asks for, or as many as that text takes."""
    is_crlf = has_crlf(" ".join(part for part in parts if isinstance(part, str)))
    return hole.length or len(encode_text(_with_lf(hole).old if is_crlf else hole.old, tokenizer))


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of `text`, none of which is special."""
    return [token for piece in INSIDE_SPECIAL.split(text) for token in tokenizer.encode(piece)]


def encode_turn(text: str, tokenizer: Tokenizer) -> list[int]:
    """A user's turn of `text`, none of which is special, up to where the model's begins."""
    # The template makes text of text. So a mark that no text has cuts what looks special, and its token is taken out.
    marked, mark = INSIDE_SPECIAL.sub("\0", text), tokenizer.encode("\0")
    if marked == text or len(mark) != 1 or tokenizer.decode(mark) != "\0":
        return tokenizer.chat([{"role": "user", "content": text}])
    return [t for t in tokenizer.chat([{"role": "user", "content": marked}]) if t != mark[0]]


def head(text: str, room: int, tokenizer: Tokenizer) -> tuple[list[int], str]:
    """The first tokens of `text`, at most `room`, and the text that is left."""
    tokens = encode_text(text, tokenizer)
    if len(tokens) <= room:
        return tokens, ""
    whole = tokens[:room]
    # A character may be spread over several tokens: cut where text and tokens agree.
    while whole and not text.startswith(tokenizer.decode(whole)):
        whole = whole[:-1]
    shown = tokenizer.decode(whole)
    # Fewer tokens than room would leave slots without a meaning: the text's own next tokens fill them.
    return tokens[:room], text[len(shown) :]


def has_crlf(text: str) -> bool:
    """Whether every line of `text` ends in CRLF, and there is one that ends."""
    return 0 < text.count("\r\n") == text.count("\n") == text.count("\r")


def with_crlf(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\n", "\r\n")


def _with_lf(part):
    if isinstance(part, Hole):
        return part._replace(old=part.old and part.old.replace("\r\n", "\n"))
    return part.replace("\r\n", "\n")


def _too_long(n_holes, known, C):
    fixed, free = sum(known), len(known) - sum(known)
    if fixed > C:
        return DgemmaError(
            f"the known text between the holes alone takes {count(fixed, 'token')}, the canvas has {C}; fill one hole "
            "at a time"
        )
    if n_holes == 1:
        return DgemmaError(f"the hole takes {count(free, 'token')}, the canvas has {C}; make it shorter")
    between = f" and the text between them {count(fixed, 'token')}" if fixed else ""
    return DgemmaError(
        f"the holes take {count(free, 'token')}{between}, the canvas has {C}; make them shorter, or fill one at a time"
    )


def _end_token(tokenizer, settings, name):
    found = tokenizer.vocabulary.token_id(name)
    return settings.stop_token_ids[0] if found is None else found
