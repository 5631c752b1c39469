"""Fill holes in a text: what stands around them is given, and stays as it is.

Source   ours; docs/infilling.md. Lengths tried in a batch and judged after few steps: as arXiv 2602.00476 does with the
         confidence of the first one
Differs  mlx-vlm and transformers only start from a text, and may change all of it

Knows no engine, like session.py.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .clamp import joined
from .config import GenerationConfig
from .errors import DgemmaError
from .events import BlockDone, Done, StepDone
from .layout import Hole, Layout, lay_out
from .noise import NoiseStream
from .session import Session

INFILL_PROMPT = "Fill in the missing part."
CONTEXT = "The text goes on:"  # before what the canvas has no room for
MARKER = re.compile(r"<\|hole(?::([^|]*))?\|>")
LENGTHS = (*range(1, 17), 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192)  # slots tried where nobody says
SEARCH_STEPS = 4  # steps after which lengths are compared
GUESS = 8  # slots of a later hole while an earlier one is searched


class Filled(NamedTuple):
    """A text whose holes are filled. The last event of `fill`."""

    text: str
    holes: list[str]  # what was written into each
    lengths: list[int]  # tokens of each
    done: Done  # of the generation that wrote them
    search_steps: int  # decoder passes, summed over rows, that compared lengths


def parse(text: str) -> list:
    """Text with markers → parts for `fill`. Raises DgemmaError where it has none, or one without a usable length."""
    parts, at = [], 0
    for match in MARKER.finditer(text):
        parts += [text[at : match.start()], Hole(_length(match))]
        at = match.end()
    if not parts:
        raise DgemmaError("found no hole in the text, expected <|hole|> or <|hole:N|> where something is to be written")
    return [*parts, text[at:]]


def _length(match):
    if match[1] is None:
        return None
    if not re.fullmatch(r"0*[1-9]\d{0,5}", match[1]):
        raise DgemmaError(f"found {match[0]!r}, expected <|hole:N|> with N tokens, at least 1, or <|hole|>")
    return int(match[1])


def fill(
    session: Session,
    parts: list,
    settings: GenerationConfig,
    *,
    prompt: str | None = None,
    seed: int = 0,
    noise: float = 1.0,
    lengths: tuple[int, ...] = LENGTHS,
) -> Iterator[StepDone | BlockDone | Done | Filled]:
    """Write the holes among `parts` (texts and Holes); ends with a Filled.

    prompt: the user's turn, INFILL_PROMPT by default; text that does not fit the canvas is added to it. noise: the
    share of a hole's old text that denoising starts without. lengths: slots to try for a hole without a length.
    Raises DgemmaError where the holes and what stands between them do not fit one canvas.
    """
    tokenizer, C = session.tokenizer, session.canvas_length
    settings = settings.replace(max_new_tokens=C)
    chosen, spent = [], []
    for hole in (part for part in parts if isinstance(part, Hole)):
        old = None if hole.old is None else len(tokenizer.encode(hole.old))
        chosen.append(hole.length or old)

    def run(candidates, settings):
        layouts = [lay_out(parts, each, tokenizer, settings, C) for each in candidates]
        prompts = [tokenizer.chat([{"role": "user", "content": _user_turn(prompt, x)}]) + x.prefix for x in layouts]
        clamp = joined([x.clamp for x in layouts]).with_noise(noise, NoiseStream(seed))
        return layouts, session.stream(prompts, settings, seed, clamp=clamp)

    for at, length in enumerate(chosen):
        if length is None:
            chosen[at], stats = _search(run, chosen, at, lengths, settings, C)
            spent.append(stats)
    layouts, events = run([chosen], settings)
    canvas = None
    for event in events:
        if isinstance(event, BlockDone):
            canvas = event.tokens[0]
        done = event
        yield event
    holes = layouts[0].texts(canvas, tokenizer)
    written = iter(holes)
    text = "".join(next(written) if isinstance(part, Hole) else part for part in parts)
    yield Filled(text, holes, chosen, done, sum(stats.steps for stats in spent))


def _search(run, chosen, at, lengths, settings, C):
    """How many slots hole `at` should have. Holes behind it that have no length yet get as many as they may need."""
    fits = []
    for length in sorted(set(lengths)):
        candidate = [x or min(GUESS, C) for x in (*chosen[:at], length, *chosen[at + 1 :])]
        try:
            run([candidate], settings)
        except DgemmaError:
            break
        fits.append(candidate)
    if not fits:
        run([[x or 1 for x in chosen]], settings)  # says why not
    layouts, events = run(fits, settings.replace(max_denoising_steps=SEARCH_STEPS))
    for event in events:
        if isinstance(event, StepDone):
            last = event
    entropy = [float(last.entropy[row][x.holes[at]].mean()) for row, x in enumerate(layouts)]
    return fits[int(np.argmin(entropy))][at], event.stats


def _user_turn(prompt, layout: Layout):
    prompt = INFILL_PROMPT if prompt is None else prompt
    return f"{prompt}\n{CONTEXT}\n{layout.rest}" if layout.rest else prompt
