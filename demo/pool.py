"""The training examples: (prefix, canvas) pairs, tokenized once and served in batches of similar length.

Shapes   prefix (B, P) left-padded with its mask (B, P); canvas (B, C)
Source   the technical report (arXiv 2608.00146): prompt and answer in blocks of C, the last one filled with EOS
Differs  each block of an answer is an example of its own
"""

import itertools
import multiprocessing
import random

import numpy as np
import torch
from tokenizers import Tokenizer

from demo.model import CANVAS
from demo.tasks import instances
from demo.tokenizer import EOS, PAD, TURN_END, build, render

MIX = {"sudoku": 0.2, "python_complete": 0.25, "python_fix": 0.3, "json": 0.25}


def examples(tokenizer, instance):
    """Yield (prefix, canvas) for every block of one answer."""
    prompt = tokenizer.encode(render(instance.prompt)).ids
    answer = [*tokenizer.encode(instance.answer).ids, TURN_END]
    answer += [EOS] * (-len(answer) % CANVAS)
    for start in range(0, len(answer), CANVAS):
        yield prompt + answer[:start], answer[start : start + CANVAS]


def _part(job):
    task, seed, count, tokenizer = job
    tokenizer = Tokenizer.from_str(tokenizer)
    made = itertools.islice(instances(task, seed, held_out=False), count)
    return [pair for instance in made for pair in examples(tokenizer, instance)]


def make_pool(size, seed, mix=MIX, workers=2):
    """About `size` shuffled examples. Every worker's part has its own seed, so their number does not matter."""
    parts, tokenizer = 8, build().to_str()
    jobs = [
        (task, f"{seed}.{part}", int(size * share / parts), tokenizer)
        for task, share in mix.items()
        for part in range(parts)
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pairs = [pair for part in pool.map(_part, jobs, chunksize=1) for pair in part]
    random.Random(seed).shuffle(pairs)
    return [(np.array(prefix, np.int16), np.array(canvas, np.int16)) for prefix, canvas in pairs]


def collate(pairs, multiple=8):
    length = -(-max(len(prefix) for prefix, _ in pairs) // multiple) * multiple
    tokens = np.full((len(pairs), length), PAD, np.int64)
    valid = np.zeros((len(pairs), length), bool)
    for row, (prefix, _) in enumerate(pairs):
        tokens[row, length - len(prefix) :] = prefix
        valid[row, length - len(prefix) :] = True
    canvas = np.stack([canvas for _, canvas in pairs]).astype(np.int64)
    return torch.from_numpy(tokens), torch.from_numpy(valid), torch.from_numpy(canvas)


def batches(pool, size, seed, window=32):
    """Endless batches; within a window of batches rows are sorted by length, so little is padding."""
    rng = random.Random(seed)
    for _epoch in itertools.count():
        order = list(range(len(pool)))
        rng.shuffle(order)
        for start in range(0, len(order) - size * window + 1, size * window):
            near = sorted(order[start : start + size * window], key=lambda i: len(pool[i][0]))
            groups = [near[i : i + size] for i in range(0, len(near), size)]
            rng.shuffle(groups)
            for group in groups:
                rng.shuffle(group)  # the first half of a batch gets self-conditioning
                yield collate([pool[i] for i in group])
