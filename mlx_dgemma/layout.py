"""Where the parts of a text go: committed prefix, canvas, and what no longer fits behind it.

Shapes   C canvas slots, L slots of one hole
Source   ours; docs/infilling.md

A text is a list of parts: known text, and holes. What stands before the first hole is encoded like a prompt; the
canvas holds everything from the first hole to the last, and as much of the text behind it as fits. If all of it does,
the end of the answer is known too. Parts become tokens one by one: no token reaches over the edge of a hole, and known
text is given back as it came, never as decoded tokens.
"""

from typing import NamedTuple

import numpy as np

from .clamp import Clamp
from .config import GenerationConfig
from .errors import DgemmaError
from .tokenizer import Tokenizer
from .units import count

TURN_END, FILL = (
    "<turn|>",
    "<eos>",
)  # what follows an answer in training: one, and then the other up to the canvas's end


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

    def texts(self, canvas: np.ndarray, tokenizer: Tokenizer) -> list[str]:
        """What stands in each hole. canvas (C,)"""
        return [tokenizer.decode(canvas[slots].tolist()) for slots in self.holes]


def lay_out(parts: list, lengths: list[int], tokenizer: Tokenizer, settings: GenerationConfig, C: int) -> Layout:
    """parts: texts and Holes. lengths: of each hole. Raises DgemmaError where what stands from the first hole to the
    last does not fit the canvas."""
    first, last = (next(i for i in order if isinstance(parts[i], Hole))
                   for order in (range(len(parts)), range(len(parts) - 1, -1, -1)))  # fmt: skip
    prefix = [token for text in parts[:first] for token in tokenizer.encode(text)]
    tokens, known, noisy, holes = [], [], [], []

    def add(new, is_known, is_noisy):
        tokens.extend(new)
        known.extend([is_known] * len(new))
        noisy.extend([is_noisy] * len(new))

    remaining = iter(lengths)
    for part in parts[first : last + 1]:
        if isinstance(part, Hole):
            length = next(remaining)
            old = tokenizer.encode(part.old or "")[:length]
            holes.append(slice(len(tokens), len(tokens) + length))
            add(old, False, False)
            add([settings.pad_token_id] * (length - len(old)), False, True)
        else:
            add(tokenizer.encode(part), True, False)
    if len(tokens) > C:
        raise _too_long(tokens, known, C)
    suffix, rest = _head("".join(parts[last + 1 :]), C - len(tokens), tokenizer)
    add(suffix, True, False)
    if not rest:
        end = [_end_token(tokenizer, settings, TURN_END), *[_end_token(tokenizer, settings, FILL)] * C]
        add(end[: C - len(tokens)], True, False)
    row = (np.array(array, kind)[None] for array, kind in ((tokens, np.int32), (known, bool), (noisy, bool)))
    return Layout(prefix, Clamp(*row), holes, rest)


def _head(text, room, tokenizer):
    """The first tokens of `text`, at most `room`, and the text that is left."""
    tokens = tokenizer.encode(text)
    if len(tokens) <= room:
        return tokens, ""
    head = tokens[:room]
    # A character may be spread over several tokens: cut where text and tokens agree.
    while head and not text.startswith(tokenizer.decode(head)):
        head = head[:-1]
    shown = tokenizer.decode(head)
    # Fewer tokens than room would leave slots without a meaning: the text's own next tokens fill them.
    return tokens[:room], text[len(shown) :]


def _too_long(tokens, known, C):
    fixed, free = sum(known), len(known) - sum(known)
    if fixed > C:
        return DgemmaError(
            f"the known text between the holes alone takes {count(fixed, 'token')}, the canvas has {C}; fill one hole "
            "at a time"
        )
    between = f" and the text between them {count(fixed, 'token')}" if fixed else ""
    return DgemmaError(
        f"the holes take {count(free, 'token')}{between}, the canvas has {C}; make them shorter, or fill one at a time"
    )


def _end_token(tokenizer, settings, name):
    found = tokenizer.vocabulary.token_id(name)
    return settings.stop_token_ids[0] if found is None else found
