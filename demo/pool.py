"""The training examples, tokenized once and served in batches of similar length.

Shapes   prefix (B, P) left-padded with its mask (B, P); canvas, span and old (B, C)
Source   the technical report (arXiv 2608.00146): prompt and answer in blocks of C, the last one filled with EOS
Differs  each block of an answer is an example of its own
"""

import itertools
import multiprocessing
import random
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from demo.canvas_tasks import canvas_instances
from demo.model import CANVAS
from demo.tasks import instances
from demo.tokenizer import EOS, PAD, TURN_END, build, render

MIX = {"sudoku": 0.2, "python_complete": 0.25, "python_fix": 0.3, "json": 0.25}
# What demo/infill was trained on further; "canvas:" marks a task of canvas_tasks.py.
INFILL_MIX = {
    "sudoku": 0.08, "python_complete": 0.1, "python_fix": 0.12, "json": 0.25,
    "canvas:infill": 0.28, "canvas:edit": 0.1, "canvas:sudoku": 0.07,
}  # fmt: skip


class Example(NamedTuple):
    prefix: np.ndarray  # (P,)
    canvas: np.ndarray  # (C,) clean
    span: np.ndarray | None = None  # (C,) bool, slots that noise may reach; None: all
    old: np.ndarray | None = None  # (C,) what stood there before an edit; None: the same


def examples(tokenizer, instance):
    """Yield an example for every block of one answer."""
    prompt = tokenizer.encode(render(instance.prompt)).ids
    answer = [*tokenizer.encode(instance.answer).ids, TURN_END]
    answer += [EOS] * (-len(answer) % CANVAS)
    for start in range(0, len(answer), CANVAS):
        yield _example(prompt + answer[:start], answer[start : start + CANVAS])


def canvas_example(tokenizer, instance) -> Example | None:
    """The one canvas of an answer with known parts; None where it is too long."""
    prefix = tokenizer.encode(render(instance.prompt)).ids + tokenizer.encode(instance.prefix).ids
    canvas, span, old = [], [], []
    for part in instance.parts:
        new = tokenizer.encode(part.text).ids
        before = tokenizer.encode(part.old).ids
        canvas += new
        span += [part.free] * len(new)
        old += before if len(before) == len(new) else new
    if len(canvas) >= CANVAS:
        return None
    fill = CANVAS - len(canvas)
    end = [TURN_END] + [EOS] * (fill - 1)
    return _example(prefix, canvas + end, np.array(span + [False] * fill), np.array(old + end, np.int16))


def _example(prefix, canvas, span=None, old=None):
    return Example(np.array(prefix, np.int16), np.array(canvas, np.int16), span, old)


def _part(job):
    task, seed, count, tokenizer = job
    tokenizer = Tokenizer.from_str(tokenizer)
    if task.startswith("canvas:"):
        made = itertools.islice(canvas_instances(task.removeprefix("canvas:"), seed, held_out=False), count)
        return [x for instance in made if (x := canvas_example(tokenizer, instance))]
    made = itertools.islice(instances(task, seed, held_out=False), count)
    return [x for instance in made for x in examples(tokenizer, instance)]


def make_pool(size, seed, mix=MIX, workers=2):
    """About `size` shuffled examples. Every worker's part has its own seed, so their number does not matter."""
    parts, tokenizer = 8, build().to_str()
    jobs = [
        (task, f"{seed}.{part}", int(size * share / parts), tokenizer)
        for task, share in mix.items()
        for part in range(parts)
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        found = [x for part in pool.map(_part, jobs, chunksize=1) for x in part]
    random.Random(seed).shuffle(found)
    return found


def collate(rows, multiple=8):
    """Examples → tokens (B, P), valid (B, P), canvas, span and old (B, C)"""
    length = -(-max(len(x.prefix) for x in rows) // multiple) * multiple
    tokens = np.full((len(rows), length), PAD, np.int64)
    valid = np.zeros((len(rows), length), bool)
    for row, x in enumerate(rows):
        tokens[row, length - len(x.prefix) :] = x.prefix
        valid[row, length - len(x.prefix) :] = True
    canvas = np.stack([x.canvas for x in rows]).astype(np.int64)
    span = np.stack([np.ones(len(x.canvas), bool) if x.span is None else x.span for x in rows])
    old = np.stack([x.canvas if x.old is None else x.old for x in rows]).astype(np.int64)
    return tuple(map(torch.from_numpy, (tokens, valid, canvas, span, old)))


def batches(pool, size, seed, window=32):
    """Endless batches; within a window of batches rows are sorted by length, so little is padding."""
    rng = random.Random(seed)
    for _epoch in itertools.count():
        order = list(range(len(pool)))
        rng.shuffle(order)
        for start in range(0, len(order) - size * window + 1, size * window):
            near = sorted(order[start : start + size * window], key=lambda i: len(pool[i].prefix))
            groups = [near[i : i + size] for i in range(0, len(near), size)]
            rng.shuffle(groups)
            for group in groups:
                rng.shuffle(group)  # the first half of a batch gets self-conditioning
                yield collate([pool[i] for i in group])
