"""End to end: how often answers are right, in how many steps, and whether they run out of steps or go in circles.

Shapes   an answer is a row of a batch, its index the row id, so batching changes nothing
Source   demo.evaluate and demo.evaluate_canvas, which also say what each engine is
Differs  rates carry Wilson's 95 % interval, means the standard error over answers; `lost` and `gained` pair the answers
         with the reference's, which tells more than two intervals do

exact_match is for a data file with answers: equal to the file's answer once runs of white space are one space.
"""

import math
import time
import unicodedata
from collections.abc import Callable

import numpy as np

from demo.canvas_tasks import MAKERS as CANVAS_TASKS
from demo.evaluate import Answer, wilson
from demo.tasks import TASKS, check, held_out
from mlx_dgemma.errors import DgemmaError

from .quality_data import Data
from .quality_engines import Model
from .quality_scores import ratio

EXACT_MATCH = "exact_match"
CLAMPED = {"sudoku_clamp" if task == "sudoku" else task: task for task in CANVAS_TASKS}  # given text stands
KNOWN = (*TASKS, *CLAMPED)


def chosen_tasks(asked: list[str] | None, data: Data, from_file: bool) -> list[str]:
    """Raises DgemmaError for a name that is none."""
    if asked is None:
        return ([EXACT_MATCH] if data.questions else []) if from_file else list(TASKS)
    known = KNOWN + ((EXACT_MATCH,) if data.questions else ())
    if unknown := [task for task in asked if task not in known]:
        raise DgemmaError(f"--tasks {unknown[0]}: not known here, expected some of {', '.join(known)}")
    return list(dict.fromkeys(asked))


def run_tasks(
    model: Model, tasks: list[str], data: Data, canvas_length: int, n: int, seed: int, batch: int,
    on_task: Callable = lambda task, n: None, advance: Callable = lambda n: None,
) -> dict:  # fmt: skip
    """Task → its row; with several that tell as much, "all" of them as one row."""
    rows, every = {}, []
    for task in tasks:
        began = time.perf_counter()
        if task in CLAMPED:
            on_task(task, None)
            rows[task] = _clamped(model, task, n, seed, batch)
            continue
        prompts, judge, settings = _asked(task, data, canvas_length, model, n, seed)
        on_task(task, len(prompts))
        engine, answers = model.answers(**settings), []
        for start in range(0, len(prompts), batch):
            numbers = list(range(start, min(start + batch, len(prompts))))
            answers += engine([prompts[i] for i in numbers], numbers, seed)
            advance(len(numbers))
        verdicts = [judge(i, answer.text) for i, answer in enumerate(answers)]
        rows[task] = summary_of(answers, verdicts, time.perf_counter() - began)
        every += zip(answers, verdicts, strict=True)
    if len(rows) > 1 and every:
        seconds = sum(row["seconds"] for row in rows.values())
        rows["all"] = summary_of(*map(list, zip(*every, strict=True)), seconds)
    return rows


def _asked(task, data, canvas_length, model, n, seed):
    """Prompts, a judge of (number, text), and settings that differ from the checkpoint's."""
    if task != EXACT_MATCH:
        instances = held_out(task, n, seed)
        return [i.prompt for i in instances], lambda i, text: check(instances[i], text), {}
    questions = data.questions[:n]
    longest = max(question.tokens for question in questions)
    room = math.ceil((longest + 1) / canvas_length) * canvas_length  # the stop token too
    settings = {"max_new_tokens": max(room, 256)}
    return [q.messages for q in questions], lambda i, text: normal(text) == normal(questions[i].answer), settings


def normal(text: str) -> str:
    """One spelling of what looks the same: Unicode composed, runs of white space one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def summary_of(answers: list[Answer], verdicts: list[bool], seconds: float) -> dict:
    each = np.arange(len(answers))
    steps, blocks, tokens = (np.array([getattr(a, x) for a in answers], float) for x in ("steps", "blocks", "tokens"))
    told = all(answer.at_limit is not None for answer in answers)
    return {
        **_rate("right", verdicts),
        "verdicts": "".join("01"[v] for v in verdicts),
        "steps_per_block": ratio(steps, blocks, each),
        "tokens_per_forward": ratio(tokens, steps, each),
        "blocks": int(blocks.sum()),
        "blocks_at_limit": counted(sum(a.at_limit for a in answers), int(blocks.sum())) if told else None,
        "loops": counted(sum(answer.loops for answer in answers), len(answers)),
        "seconds": round(seconds, 1),
    }


def _rate(name, verdicts):
    return {"n": len(verdicts), name: sum(verdicts), **counted(sum(verdicts), len(verdicts))}


def counted(k: int, n: int) -> dict:
    """k of n as a rate with its interval."""
    low, high = wilson(k, n)
    return {"count": int(k), "rate": k / n, "low": low, "high": high}


def _clamped(model, task, n, seed, batch):
    """A task whose given text stands. Blocks and loops are not counted: a canvas is one, and starts part way."""
    from demo.evaluate_canvas import evaluate_mode

    opened = model.session()
    if opened is None:
        raise DgemmaError(f"--tasks {task}: transformers has no clamp, expected mlx: or ggml:; leave the task out")
    row = evaluate_mode(*opened, CLAMPED[task], "clamp", n, seed, batch)
    return {
        "n": n, "right": row["right"], **counted(row["right"], n),
        "verdicts": None, "steps_per_block": {"mean": row["steps"], "se": None},
        "tokens_per_forward": {"mean": row["tpf"], "se": None}, "blocks": n, "blocks_at_limit": None, "loops": None,
        "seconds": row["seconds"],
    }  # fmt: skip


def paired(rows: dict, reference: dict) -> dict:
    """The same rows, with the answers that the reference had right and this model not, and the other way round."""
    made = {}
    for task, row in rows.items():
        ours, theirs = row["verdicts"], (reference.get(task) or {}).get("verdicts")
        made[task] = dict(row)
        if ours and theirs and len(ours) == len(theirs):
            pairs = list(zip(theirs, ours, strict=True))
            made[task] |= {"lost": pairs.count(("1", "0")), "gained": pairs.count(("0", "1"))}
    return made
