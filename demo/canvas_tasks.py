"""Tasks whose answer has known parts: the middle of a function, a bug to fix in place, Sudoku with its givens clamped.

Shapes   a task name and a seeded random.Random in, CanvasInstances out; judge(instance, parts) -> bool
Source   our own; functions, boards and the split between training and held out are those of tasks.py
Differs  from tasks.py, where the prompt says everything: here the canvas does. An infilling prompt does not hold the
         text at all, a Sudoku prompt holds no given
"""

import random
import re
from typing import NamedTuple

from demo.python_tasks import Function, behaves_like, break_one_token, draw_function
from demo.tasks import Instance, _agrees, _lines, _valid, is_held_out, make_sudoku
from mlx_dgemma.infilling import INFILL_PROMPT

EDIT_INSTRUCTION = "Fix the bug:"
BLANK_BOARD = "Solve this Sudoku:\n" + _lines("." * 16)


class Part(NamedTuple):
    """A piece of the answer behind the prefix."""

    text: str  # as it should become
    free: bool
    old: str = ""  # what stands there now, where something does


class CanvasInstance(NamedTuple):
    task: str
    prompt: str  # the user's turn
    prefix: str  # the answer's beginning; known
    parts: tuple[Part, ...]
    truth: object
    content: str  # as in tasks.Instance


def canvas_instances(task, seed, held_out):
    """Endless stream of one side of the split, which is that of tasks.py."""
    rng = random.Random(f"canvas/{task}/{seed}/{held_out}")
    while True:
        instance = MAKERS[task](rng)
        subject = "sudoku" if task == "sudoku" else "python"
        if is_held_out(Instance(subject, "", "", None, instance.content)) == held_out:
            yield instance._replace(task=task)


def canvas_held_out(task, n, seed=0):
    """The first n distinct held-out instances of a seed."""
    seen = {}
    for instance in canvas_instances(task, seed, held_out=True):
        seen.setdefault((instance.prompt, instance.prefix, instance.parts), instance)
        if len(seen) == n:
            return list(seen.values())


# Fill the middle of a function

LOOP_NAMES = ("x", "n", "v", "i", "k")
RESULT_NAMES = ("result", "total", "out", "found", "kept")
MOST_PIECES = 12  # a hole's words, marks and spaces


def make_infill(rng):
    """A hole anywhere in the body. Names are drawn, so that the text around the hole decides some of it."""
    function = _renamed(rng, draw_function(rng))
    start, stop = _hole(rng, function.body)
    return _infill(function, start, stop, function.body)


def make_infill_own(rng):
    """The same, but one token in front of the hole or behind it is not what the docstring says: the text stands."""
    while True:
        function = _renamed(rng, draw_function(rng))
        own = break_one_token(rng, function)
        start, stop = _hole(rng, own.body)
        at = _differ_at(own.body, function.body)
        behind = len(own.body) - _differ_at(own.body[::-1], function.body[::-1])
        if stop <= at or behind <= start:
            return _infill(own, start, stop, own.body)


def _differ_at(a, b):
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def _infill(function, start, stop, body):
    prefix = f"{function.documented}\n{body[:start]}"
    parts = (Part(body[start:stop], True), Part(body[stop:] + "\n", False))
    return CanvasInstance("", INFILL_PROMPT, prefix, parts, function, function.doc)


def _renamed(rng, function: Function) -> Function:
    if function.kind != "list":
        return function
    body = re.sub(r"\bx\b", rng.choice(LOOP_NAMES), function.body)
    return function._replace(body=re.sub(r"\bresult\b", rng.choice(RESULT_NAMES), body))


def _hole(rng, body):
    """Where the hole begins and ends: some words and marks, or whole lines. Text follows it."""
    while True:
        # Lines; words with the space in front of them; words without.
        pattern = rng.choices((r".*\n", r" ?\w+|\s|[^\w\s]", r"\w+|\s|[^\w\s]"), (0.25, 0.5, 0.25))[0]
        ends = [0, *(match.end() for match in re.finditer(pattern, body))]
        if len(ends) == 1:
            continue
        first = rng.randrange(len(ends) - 1)
        last = min(len(ends) - 1, first + rng.randint(1, MOST_PIECES))
        if body[ends[first] : ends[last]].strip() and body[ends[last] :].strip():
            return ends[first], ends[last]


# Fix a bug in place


def make_edit(rng):
    """The user's turn has the function with a wrong token; the canvas starts from its body."""
    function = draw_function(rng)
    broken = break_one_token(rng, function)
    head = function.documented + "\n"
    parts = (Part(function.body + "\n", True, broken.body + "\n"),)
    return CanvasInstance(
        "", f"{EDIT_INSTRUCTION}\n{head}{broken.body}\n", head, parts, (function, broken), function.doc
    )


# Sudoku


def make_sudoku_canvas(rng):
    _, answer, givens, _ = make_sudoku(rng)
    shown = _lines(givens)
    parts = tuple(Part(cell, given == ".") for cell, given in zip(answer, shown, strict=True))
    return CanvasInstance("", BLANK_BOARD, "", parts, givens, givens)


MAKERS = {
    "infill": make_infill, "infill_own": make_infill_own, "edit": make_edit, "sudoku": make_sudoku_canvas,
}  # fmt: skip


# Judging


def judge(instance, texts):
    """Is the answer right whose parts behind the prefix are `texts`? Known parts must be as given."""
    if any(text != part.text for text, part in zip(texts, instance.parts, strict=True) if not part.free):
        return False
    answer = "".join(texts)
    if instance.task == "sudoku":
        cells = answer.replace("\n", "")
        return len(cells) == 16 and _valid(cells) and _agrees(instance.truth, cells)
    function = instance.truth[0] if instance.task == "edit" else instance.truth
    return behaves_like(instance.prefix + answer, function)
