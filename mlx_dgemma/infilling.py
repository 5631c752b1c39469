"""Fill holes in a text: what stands around them is given, and stays as it is.

Source   ours; docs/infilling.md. Lengths are tried in a batch, as in arXiv 2602.00476; the first step's confidence,
         which is judged there, finds the right one half as often here as a look at the filled canvas (docs/log.md)
Differs  mlx-vlm and transformers only start from a text, and may change all of it

Knows no engine, like session.py.
"""

import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .clamp import Clamp, joined
from .config import GenerationConfig
from .errors import DgemmaError
from .events import BlockDone, Done, StepDone
from .layout import Hole, Layout, encode_turn, lay_out, old_length
from .noise import NoiseStream
from .session import Session

INFILL_PROMPT = "Fill in the missing part."
CONTEXT = "The text goes on:"  # before what the canvas has no room for
MARKER = re.compile(r"<\|hole(?::([^|]*))?\|>")
LENGTHS = (*range(1, 17), 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192)  # slots tried where nobody says
SEARCH_STEPS = 8  # most steps that a candidate gets
DOUBT = 5.0  # nats that a token counts which the model would replace
SURE = 0.05  # nats of doubt below which an edit needs no other length; and another one must leave this share of it
MUCH_LESS = 0.5
MOST_ROWS = 32  # lengths tried at once
GUESS = 8  # slots of a later hole while an earlier one is searched


class Searched(NamedTuple):
    """A step of the search for a hole's length."""

    hole: int  # counts from 0, over all holes
    lengths: int  # that are compared at once
    step: int  # counts from 0


class Filled(NamedTuple):
    """A text whose holes are filled. The last event of `fill`."""

    text: str
    holes: list[str]  # what was written into each
    lengths: list[int]  # tokens of each
    done: Done  # of the generation that wrote them
    search_steps: int  # decoder passes, summed over rows, that compared lengths
    search_seconds: float
    doubt: float | None  # nats, see `_doubts`; None where no lengths were compared


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
    deltas: tuple[int, ...] = (),
) -> Iterator[Searched | StepDone | BlockDone | Done | Filled]:
    """Write the holes among `parts` (texts and Holes); ends with a Filled.

    prompt: the user's turn, INFILL_PROMPT by default; text that does not fit the canvas is added to it. noise: the
    share of a hole's old text that denoising starts without. lengths: slots to try for a hole without a length.
    deltas: slots more or fewer to try for a hole with old text, where the model doubts what it wrote. Raises
    DgemmaError where the holes and what stands between them do not fit one canvas.
    """
    if not 0 <= noise <= 1:
        raise DgemmaError(f"noise is {noise}, expected a share between 0 and 1")
    if wrong := [x.length for x in parts if isinstance(x, Hole) and x.length is not None and x.length < 1]:
        raise DgemmaError(f"a hole has {wrong[0]} tokens, expected at least 1")
    tokenizer, C = session.tokenizer, session.canvas_length
    settings = settings.replace(max_new_tokens=C, first_canvas=settings.first_canvas and C, drop_tail=False)
    chosen, searched, seconds, least = [], 0, 0.0, None
    for hole in (part for part in parts if isinstance(part, Hole)):
        chosen.append(hole.length if hole.old is None else old_length(hole, parts, tokenizer))

    def run(candidates, settings, clamp=None):
        layouts = [lay_out(parts, each, tokenizer, settings, C) for each in candidates]
        prompts = [encode_turn(_user_turn(prompt, x), tokenizer) + x.prefix for x in layouts]
        if clamp is None:
            clamp = joined([x.clamp.with_noise(noise, NoiseStream(seed)) for x in layouts])
        # The noise of each row is that of row 0: what a length gets does not depend on the others tried.
        return layouts, session.stream(prompts, settings, seed, rows=[0] * len(prompts), clamp=clamp)

    for at, length in enumerate(chosen):
        if length is None:
            began = time.perf_counter()
            chosen[at], least, steps = yield from _search(run, chosen, at, lengths, settings)
            searched, seconds = searched + steps, seconds + time.perf_counter() - began
    draft, holes, done = yield from _write(run, chosen, settings, tokenizer)
    for at, length in enumerate(chosen) if deltas else ():
        began = time.perf_counter()
        (doubt,), steps = _doubts(run, [chosen], draft[None], settings)
        searched, least = searched + steps, doubt
        if doubt < SURE:
            seconds += time.perf_counter() - began
            break
        near = [length + delta for delta in deltas if delta and length + delta > 0]
        try:
            other, less, steps = yield from _search(run, chosen, at, near, settings)
        except DgemmaError:  # no other length fits
            continue
        finally:
            seconds += time.perf_counter() - began
        searched += steps
        if less < MUCH_LESS * doubt:
            chosen[at], least = other, less
            draft, holes, done = yield from _write(run, chosen, settings, tokenizer)
    written = iter(holes)
    text = "".join(next(written) if isinstance(part, Hole) else part for part in parts)
    yield Filled(text, holes, chosen, done, searched, seconds, None if least is None else float(least))


def _write(run, lengths, settings, tokenizer):
    """Denoise holes of these lengths: the last draft (C,), what stands in each hole, and the Done."""
    (layout,), events = run([lengths], settings)
    draft = layout.clamp.tokens[0]  # where nothing is free there is no step
    for event in events:
        if isinstance(event, StepDone):
            draft = event.draft[0]
        elif isinstance(event, BlockDone):
            canvas = event.tokens[0]
        yield event
    return draft, layout.texts(canvas, tokenizer), event


def _search(run, chosen, at, lengths, settings):
    """How many slots hole `at` should have, the doubt that is left, and the steps that took. Holes behind it that have
    no length yet get as many as they may need."""
    if not lengths or min(lengths) < 1:
        raise DgemmaError(f"found {tuple(lengths)} as lengths to try, expected some of at least 1")
    fits = []
    for length in sorted(set(lengths)):
        try:
            fits.append(_candidate(run, [*chosen[:at], length, *chosen[at + 1 :]], settings))
        except DgemmaError:
            if not fits:
                raise
            break
    doubts, spent = [], 0
    for start in range(0, len(fits), MOST_ROWS):
        rows = fits[start : start + MOST_ROWS]
        _, events = run(rows, settings.replace(max_denoising_steps=SEARCH_STEPS))
        drafts, steps = yield from _last_draft(events, at)
        found, more = _doubts(run, rows, drafts, settings)
        doubts, spent = [*doubts, *found], spent + steps + more
    best = int(np.argmin(doubts))
    return fits[best][at], doubts[best], spent


def _candidate(run, chosen, settings):
    """Lengths of all holes, with as many slots for each unknown one as fit, up to GUESS. Raises DgemmaError."""
    for guess in range(GUESS, 0, -1) if None in chosen else [0]:
        candidate = [guess if length is None else length for length in chosen]
        try:
            run([candidate], settings)
            return candidate
        except DgemmaError as error:
            why_not = error
    raise why_not


def _doubts(run, candidates, drafts, settings):
    """How much the model doubts each whole canvas, in nats, and the steps that took.

    One pass reads the canvas as it is, at temperature 1 and without a belief from before: the entropies of all slots,
    and DOUBT for each token that it would replace. A hole of a wrong length shows in what follows it too.
    """
    plain = settings.replace(max_denoising_steps=1, t_min=1.0, t_max=1.0)
    nothing = np.zeros(drafts.shape, bool)
    _, events = run(candidates, plain, Clamp(drafts, nothing, nothing))
    event = next(e for e in events if isinstance(e, StepDone))
    return event.entropy.sum(axis=-1) + DOUBT * (event.draft != drafts).sum(axis=-1), len(drafts)


def _last_draft(events, hole):
    """The last draft (B, C), and the steps of all rows."""
    steps = 0
    for event in events:
        if isinstance(event, StepDone):
            draft, steps = event.draft, steps + int(event.running.sum())
            yield Searched(hole, len(draft), event.step)
    return draft, steps


def _user_turn(prompt, layout: Layout):
    prompt = INFILL_PROMPT if prompt is None else prompt
    return f"{prompt}\n{CONTEXT}\n{layout.rest}" if layout.rest else prompt
