"""The text that models are judged on: a file of the user's, or the demo's held-out tasks.

Shapes   C canvas slots; canvases and passages are in tokens
Source   convert.examples for the forms of a file, and for what becomes of a conversation
Differs  of plain text only whole canvases are taken: the filling behind a cut sentence would be no text
"""

import hashlib
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.examples import Canvas, Example, passages, read_examples
from demo.tasks import TASKS, held_out
from mlx_dgemma.config import ModelConfig
from mlx_dgemma.errors import ContextError, DgemmaError
from mlx_dgemma.tokenizer import Tokenizer
from mlx_dgemma.units import count

DEMO_CANVASES, FILE_CANVASES = 200, 64  # by default, where there is as much
DEMO = "the demo's held-out tasks"


class Text(NamedTuple):
    """A line of text in tokens, for the encoder: what is judged begins at `first`."""

    tokens: list[int]
    first: int


class Question(NamedTuple):
    """An end-to-end task of a data file."""

    messages: tuple[dict, ...]
    answer: str
    tokens: int  # of the answer


class Data(NamedTuple):
    name: str
    canvases: list[Canvas]
    texts: list[Text]  # one per instance
    questions: list[Question]  # of a file whose lines have answers

    @property
    def instance(self) -> np.ndarray:
        return np.array([canvas.instance for canvas in self.canvases])

    @property
    def fingerprint(self) -> str:
        """Of the tokens: a file's name and format do not matter."""
        digest = hashlib.blake2b(digest_size=16)
        for canvas in self.canvases:
            numbers = [canvas.instance, canvas.block, *canvas.prefix, *canvas.clean.tolist()]
            digest.update(np.array([len(numbers), *numbers], "<i8").tobytes())
        return digest.hexdigest()


def read_data(file: str | None, tokenizer: Tokenizer, config: ModelConfig, wanted: int | None, seed: int) -> Data:
    """`wanted` canvases of `file`, or without one of the demo's tasks. Raises DgemmaError where there are fewer."""
    examples = _demo_examples(wanted or DEMO_CANVASES, seed) if file is None else read_examples(file)
    most = wanted or (DEMO_CANVASES if file is None else FILE_CANVASES)
    found, texts = [], []
    C = config.canvas_length
    for instance, (prompt, blocks) in enumerate(_passages(examples, tokenizer, C)):
        if len(found) >= most:
            break
        for block, clean in enumerate(blocks[: most - len(found)]):
            found.append(Canvas(instance, block, [*prompt, *blocks[:block].ravel().tolist()], clean))
        texts.append(_text(prompt, blocks[: found[-1].block + 1], tokenizer))
    name = DEMO if file is None else Path(file).name
    if not found:
        n = sum(len(tokenizer.encode(example.answer)) for example in examples)
        raise DgemmaError(
            f"{name}: found {count(n, 'token')} of text, expected at least one whole canvas of {C}; give a longer text"
        )
    if wanted and len(found) < wanted:
        raise DgemmaError(
            f"{name}: holds text for --canvases {len(found)} of {C} tokens, expected {wanted}; give a longer text, or "
            "ask for fewer"
        )
    _check_context(found, config)
    questions = [
        Question(e.messages, e.answer, len(tokenizer.encode(e.answer))) for e in examples if file and e.messages
    ]
    return Data(name, found, texts, questions)


def _demo_examples(canvases, seed):
    """Instances of all tasks in turn. An answer fills one canvas at least."""
    per_task = -(-canvases // len(TASKS))
    turns = itertools.chain(*zip(*(held_out(task, per_task, seed) for task in TASKS), strict=True))
    return [Example(({"role": "user", "content": i.prompt},), i.answer) for i in turns]


def _passages(examples, tokenizer, C):
    """Prompt tokens and canvases (blocks, C) of each; of plain text only whole canvases."""
    for example in examples:
        left = None if example.messages else len(tokenizer.encode(example.answer)) // C
        if left == 0:
            continue
        for passage in passages([example], tokenizer, C):
            blocks = passage.canvases if left is None else passage.canvases[:left]
            left = left if left is None else left - len(blocks)
            if len(blocks):
                yield passage.prompt.tolist(), blocks


def _text(prompt, blocks, tokenizer):
    """What the encoder reads: without the <eos> that fill the last canvas up."""
    tokens, eos = blocks.ravel().tolist(), tokenizer.vocabulary.token_id("<eos>")
    while tokens and tokens[-1] == eos:
        tokens.pop()
    return Text([*prompt, *tokens], len(prompt))


def _check_context(found, config):
    longest = max(len(canvas.prefix) + len(canvas.clean) for canvas in found)
    if longest > config.max_position_embeddings:
        raise ContextError(
            f"an example has {longest} tokens, the model's context is {config.max_position_embeddings}; shorten it"
        )


def check_same_tokens(data: Data, again: Data, name: str) -> None:
    """Raises DgemmaError where a candidate's tokenizer makes other tokens of the text."""
    if data.fingerprint != again.fingerprint:
        raise DgemmaError(
            f"{name}: its tokenizer or chat template makes other tokens of the text than the reference's, expected the "
            "same; convert it from the same checkpoint"
        )
