"""Texts as the model was trained on them: a prompt, an answer in whole canvases, and noise on one of them.

Shapes   prompt (P,) and answer (blocks × C,) token ids; a canvas (C,)
Source   the technical report (arXiv 2608.00146): the last canvas is filled with EOS; each token of a canvas becomes a
         uniform random one with probability t
Differs  nothing marks which tokens are noise, as in training; the noise is seeded per example, block and t
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_dgemma.config import GenerationConfig, ModelConfig
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.tokenizer import Tokenizer

BLOCKS_OF_TEXT = 4  # canvases per example where a file is plain text
FORM = '{"prompt": "...", "answer": "..."} or {"messages": [...]}'


class Example(NamedTuple):
    prompt: list[int]
    answer: list[int]  # a multiple of the canvas length


def read_examples(path: Path, tokenizer: Tokenizer, config: ModelConfig, settings: GenerationConfig) -> list[Example]:
    """A .jsonl file, one {"prompt", "answer"} or {"messages"} per line; any other file is plain text.

    Raises DgemmaError for a file that cannot be read or holds no example.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DgemmaError(f"{path}: cannot be read ({error}); give a UTF-8 text or .jsonl file") from None
    if path.suffix == ".jsonl":
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        conversations = [_conversation(line, f"{path}:{n}") for n, line in lines]
        examples = [make_example(*c, tokenizer, config, settings) for c in conversations]
    else:
        examples = _from_text(text, tokenizer, config, settings)
    if not examples:
        raise DgemmaError(f"{path}: holds no text, expected examples; give a text file, or one {FORM} per line")
    return examples


def make_example(
    messages: list[dict], answer: str, tokenizer: Tokenizer, config: ModelConfig, settings: GenerationConfig
) -> Example:
    """One conversation and what the model should say, the end of its turn included."""
    eos = settings.stop_token_ids[0]
    turn_end = tokenizer.vocabulary.token_id("<turn|>")
    tokens = [*tokenizer.encode(answer), eos if turn_end is None else turn_end]
    return Example(tokenizer.chat(messages), tokens + [eos] * (-len(tokens) % config.canvas_length))


def corrupt(clean: np.ndarray, t: float, vocab_size: int, *seed: int) -> np.ndarray:
    """A canvas (C,) with each token replaced by a uniform one with probability t; the same seed, the same noise."""
    draw = np.random.default_rng([round(t * 1000), *seed])
    noisy = draw.random(len(clean)) < t
    return np.where(noisy, draw.integers(0, vocab_size, len(clean)), clean).astype(np.int32)


def _conversation(line, where):
    """(messages before the answer, answer)"""
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise DgemmaError(f"{where}: not valid JSON ({error}); expected {FORM} per line") from None
    if isinstance(raw, dict) and isinstance(raw.get("prompt"), str) and isinstance(raw.get("answer"), str):
        return [{"role": "user", "content": raw["prompt"]}], raw["answer"]
    messages = raw.get("messages") if isinstance(raw, dict) else None
    if isinstance(messages, list) and len(messages) > 1 and all(_is_message(m) for m in messages):
        return messages[:-1], messages[-1]["content"]
    raise DgemmaError(f"{where}: found {line[:60]!r}, expected {FORM}; correct the line")


def _is_message(message):
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _from_text(text, tokenizer, config, settings):
    tokens = tokenizer.encode(text)
    length = config.canvas_length
    step = BLOCKS_OF_TEXT * length
    pieces = [tokens[i : i + step] for i in range(0, len(tokens), step)]
    whole = [piece[: len(piece) // length * length] for piece in pieces]
    return [Example([settings.bos_token_id], piece) for piece in whole if piece]
