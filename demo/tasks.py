"""Generated tasks with exact checks: Sudoku, Python completion and repair, sentences to JSON.

Shapes   a task name and a seeded random.Random in, Instances out; check(instance, text) -> bool
Source   our own; every answer is judged by what it does, never by its spelling
Differs  Sudoku boards are 4x4 and have exactly one solution
"""

import hashlib
import itertools
import json
import random
from typing import NamedTuple

from demo.python_tasks import make_complete, make_fix, passes

TASKS = ("sudoku", "python_complete", "python_fix", "json")


class Instance(NamedTuple):
    task: str
    prompt: str  # the user's turn
    answer: str  # one right answer; another may be right too
    truth: object  # what `check` compares with
    content: str  # what decides the answer; the split looks at this alone


def is_held_out(instance):
    """One content in ten, chosen by its hash, so neither a seed nor a function's name can move it.

    Both Python tasks share one split: a docstring held out of one is held out of the other.
    """
    subject = instance.task.split("_")[0]
    digest = hashlib.blake2b(f"{subject}\n{instance.content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def instances(task, seed, held_out):
    """Endless stream of one side of the split."""
    rng = random.Random(f"{task}/{seed}/{held_out}")
    make = MAKERS[task]
    while True:
        instance = Instance(task, *make(rng))
        if is_held_out(instance) == held_out:
            yield instance


def held_out(task, n, seed=0):
    """The first n distinct held-out instances of a seed."""
    seen = {}
    for instance in instances(task, seed, held_out=True):
        seen.setdefault(instance.prompt, instance)
        if len(seen) == n:
            return list(seen.values())


def contents(task, n, seed, held_out):
    """What the first n instances of one side are about; the two sides never share one."""
    return {instance.content for instance in itertools.islice(instances(task, seed, held_out), n)}


def check(instance, text):
    return CHECKS[instance.task](instance, text)


# Sudoku


def _all_grids():
    """The 288 valid boards, each a string of 16 digits."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    bands = [top + low for top, low in itertools.product(rows, rows) if set(top[:2]) | set(low[:2]) == set("1234")]
    return [board for board in map("".join, itertools.product(bands, bands)) if _valid(board)]


def _valid(cells):
    rows = [cells[4 * r : 4 * r + 4] for r in range(4)]
    columns = [cells[c::4] for c in range(4)]
    boxes = [cells[b : b + 2] + cells[b + 4 : b + 6] for b in (0, 2, 8, 10)]
    return all(set(unit) == set("1234") for unit in rows + columns + boxes)


GRIDS = _all_grids()


def _agrees(givens, cells):
    return all(given in (".", cell) for given, cell in zip(givens, cells, strict=True))


def _lines(cells):
    return "\n".join(cells[4 * r : 4 * r + 4] for r in range(4))


def make_sudoku(rng):
    while True:
        solution = rng.choice(GRIDS)
        blanks = set(rng.sample(range(16), rng.randint(6, 10)))
        givens = "".join("." if i in blanks else cell for i, cell in enumerate(solution))
        if sum(_agrees(givens, grid) for grid in GRIDS) == 1:
            return f"Solve this Sudoku:\n{_lines(givens)}", _lines(solution), givens, givens


def check_sudoku(instance, text):
    cells = text.strip().replace("\n", "")
    shaped = len(cells) == 16 and text.strip() == _lines(cells)
    return shaped and _valid(cells) and _agrees(instance.truth, cells)


# JSON

# ruff: noqa: SIM905  word lists read better as text
# fmt: off
NAMES = ("Anna Ben Clara David Emma Felix Grace Hugo Iris Jack Kate Leo Maria Nina Oscar Paul Rosa Sam Tina Victor "
         "Alice Bruno Carol Dora Erik Fiona Greta Hans Ivan Julia Karl Lucy Mark Nora Olga Peter Ruth Sofia Tom "
         "Vera").split()
CITIES = ("Paris London Berlin Madrid Rome Vienna Oslo Dublin Lisbon Athens Prague Warsaw "
          "Tokyo Delhi Cairo Lima Boston Denver Sydney Toronto").split()
ITEMS = "apples books chairs lamps pens cups shirts plates stamps eggs boxes keys maps bottles coats toys".split()
JOBS = "nurse teacher baker pilot lawyer farmer doctor painter driver cook writer judge".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SKIES = "sunny rainy windy cloudy foggy snowy".split()
# fmt: on


class Kind(NamedTuple):
    fields: tuple  # (key, draw) in the order of the record
    sentences: tuple


def _words(words):
    return lambda rng: rng.choice(words)


def _number(low, high):
    return lambda rng: rng.randint(low, high)


KINDS = (
    Kind(
        (("name", _words(NAMES)), ("age", _number(1, 99)), ("city", _words(CITIES)), ("job", _words(JOBS))),
        (
            "{name} is a {age} year old {job} from {city}.",
            "{name}, {age}, lives in {city} and works as a {job}.",
            "The {job} {name} lives in {city} and is {age}.",
            "In {city} lives a {job} called {name} who is {age}.",
        ),
    ),
    Kind(
        (("buyer", _words(NAMES)), ("item", _words(ITEMS)), ("count", _number(2, 99)), ("price", _number(1, 99))),
        (
            "{buyer} bought {count} {item} for {price} euros.",
            "For {price} euros {buyer} got {count} {item}.",
            "{count} {item} were sold to {buyer} for {price} euros.",
            "{buyer} paid {price} euros for {count} {item}.",
        ),
    ),
    Kind(
        (("city", _words(CITIES)), ("day", _words(DAYS)), ("sky", _words(SKIES)), ("degrees", _number(0, 40))),
        (
            "On {day} it was {sky} in {city} with {degrees} degrees.",
            "{city} was {sky} on {day} at {degrees} degrees.",
            "It was {degrees} degrees and {sky} in {city} on {day}.",
            "{day} in {city}: {sky}, {degrees} degrees.",
        ),
    ),
    Kind(
        (("from", _words(CITIES)), ("to", _words(CITIES)), ("day", _words(DAYS)), ("platform", _number(1, 30))),
        (
            "The {day} train from {from} to {to} leaves from platform {platform}.",
            "Platform {platform} is for the {day} train to {to} from {from}.",
            "From {from} to {to} by train on {day}, platform {platform}.",
            "On {day} a train goes to {to} from {from}, platform {platform}.",
        ),
    ),
)


def make_json(rng):
    # Three records need a second 64-token canvas.
    count = rng.choices((1, 2, 3), (0.70, 0.15, 0.15))[0]
    sentences, records = [], []
    for _ in range(count):
        kind = rng.choice(KINDS)
        record = {key: draw(rng) for key, draw in kind.fields}
        sentences.append(rng.choice(kind.sentences).format(**record))
        records.append(record)
    answer = "\n".join(json.dumps(record) for record in records)
    text = "\n".join(sentences)
    return f"As JSON:\n{text}", answer, records, text


def check_json(instance, text):
    def canonical(record):  # as text, where True is not 1 and the order of keys is free
        return json.dumps(record, sort_keys=True)

    try:
        records = [json.loads(line) for line in text.strip().split("\n")]
    except (ValueError, RecursionError):
        return False
    return [canonical(record) for record in records] == [canonical(record) for record in instance.truth]


MAKERS = {"sudoku": make_sudoku, "python_complete": make_complete, "python_fix": make_fix, "json": make_json}
CHECKS = {"sudoku": check_sudoku, "python_complete": passes, "python_fix": passes, "json": check_json}
