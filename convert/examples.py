"""Examples of what a model is used for, in canvases and with noise: what calibrations and measurements read.

Shapes   C canvas slots
Source   the technical report (arXiv 2608.00146) for noisy canvases: a random token with probability t, nothing masked

Works without MLX.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.errors import ContextError, DgemmaError
from mlx_dgemma.noise import NoiseStream
from mlx_dgemma.tokenizer import Tokenizer

NOISE_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
TEXT_BLOCKS = 4  # canvases of one passage of plain text


class Example(NamedTuple):
    """A conversation and the model's answer to it; without a conversation, plain text."""

    messages: tuple[dict, ...]
    answer: str


class Passage(NamedTuple):
    """An example in tokens."""

    prompt: np.ndarray  # (T,) int32
    canvases: np.ndarray  # (blocks, C) int32, the last one filled up with <eos>


class Canvas(NamedTuple):
    """A block of a right answer, and what comes before it."""

    instance: int  # also the noise row
    block: int
    prefix: list[int]
    clean: np.ndarray  # (C,) int32


def read_examples(path: str | Path) -> list[Example]:
    """A data file: .jsonl with {"prompt", "answer"} or {"messages"} per line, anything else is plain text."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DgemmaError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise DgemmaError(f"{path}: not UTF-8 text; save it as UTF-8 and try again") from None
    if not text.strip():
        raise DgemmaError(f'{path}: is empty, expected text, or lines of {{"prompt", "answer"}}; give some')
    if path.suffix != ".jsonl":
        return [Example((), text)]
    lines = enumerate(text.split("\n"), start=1)
    return [_example(line, f"{path}, line {n}") for n, line in lines if line.strip()]


def _example(line, where):
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DgemmaError(f"{where}: not JSON ({error}); correct the line") from None
    match raw:
        case {"prompt": str(prompt), "answer": str(answer)}:
            return Example(({"role": "user", "content": prompt},), answer)
        case {"messages": [_, *_, {"role": "assistant", "content": str(answer)}]} if all(
            map(_is_message, raw["messages"])
        ):
            return Example(tuple(raw["messages"][:-1]), answer)
    raise DgemmaError(
        f'{where}: found {line[:60]!r}, expected {{"prompt": "...", "answer": "..."}} or {{"messages": [...]}} that '
        "ends with the assistant's; correct the line"
    )


def _is_message(raw):
    return isinstance(raw, dict) and isinstance(raw.get("role"), str) and isinstance(raw.get("content"), str)


def passages(examples: Iterable[Example], tokenizer: Tokenizer, canvas_length: int) -> Iterator[Passage]:
    """Prompt and canvases of every example; plain text is cut into several passages of TEXT_BLOCKS canvases."""
    bos, eos, turn_end = (_token(tokenizer, name) for name in ("<bos>", "<eos>", "<turn|>"))

    def passage(prompt, tokens):
        tokens = tokens + [eos] * (-len(tokens) % canvas_length)
        return Passage(np.array(prompt, np.int32), np.array(tokens, np.int32).reshape(-1, canvas_length))

    for example in examples:
        tokens = tokenizer.encode(example.answer)
        if example.messages:
            yield passage(tokenizer.chat(list(example.messages)), [*tokens, turn_end])
            continue
        if len(tokens) < canvas_length:
            raise DgemmaError(
                f"the text has {len(tokens)} tokens, expected at least one canvas of {canvas_length}; give a longer one"
            )
        for start in range(0, len(tokens), TEXT_BLOCKS * canvas_length):
            yield passage([bos], tokens[start : start + TEXT_BLOCKS * canvas_length])


def _token(tokenizer, name):
    token = tokenizer.vocabulary.token_id(name)
    if token is None:
        raise DgemmaError(f"{tokenizer.path}: the vocabulary has no {name}, expected Gemma 4's; download it again")
    return token


def canvases(
    examples: Iterable[Example], tokenizer: Tokenizer, canvas_length: int, limit: int | None = None
) -> list[Canvas]:
    """Every block of the examples' answers, `limit` at most."""
    found = []
    for instance, passage in enumerate(passages(examples, tokenizer, canvas_length)):
        for block, clean in enumerate(passage.canvases):
            if limit is not None and len(found) == limit:
                return found
            prefix = [*passage.prompt.tolist(), *passage.canvases[:block].ravel().tolist()]
            found.append(Canvas(instance, block, prefix, clean))
    return found


def check_context(lengths: Iterable[int], limit: int) -> None:
    """Raises ContextError for the first example that is too long."""
    for i, length in enumerate(lengths):
        if length > limit:
            raise ContextError(
                f"example {i + 1} has {length} tokens, the model's context is {limit}; shorten or remove the example"
            )


def corrupt(clean: np.ndarray, t: float, stream: NoiseStream, rows: list[int], block: int, vocab_size: int):
    """A random token in each slot with probability t. (B, C) int32, and where that happened (B, C) bool

    Depends on seed, row, block and t alone, as in training on any other token: the random one may be the right one.
    """
    C, step = clean.shape[-1], round(1000 * t)
    noisy = stream.uniforms(rows, block, step, C) < t
    return np.where(noisy, stream.renoise(rows, block, step, C, vocab_size), clean), noisy


def temperature_at(t: float, settings: GenerationConfig) -> float:
    """The sampler's temperature when a share t of the steps is left."""
    return settings.t_min + (settings.t_max - settings.t_min) * t
