"""A vocabulary as GGUF stores it: parallel lists with one entry per token id.

Source   llama.cpp's llama_token_type, which is SentencePiece's enum
"""

from typing import NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

NO_SCORE = -1000.0  # what llama.cpp's converter writes where a vocabulary has merges instead of scores


class TokenList(NamedTuple):
    texts: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str]  # "left right", surest first; empty in a SentencePiece vocabulary


def placeholder(token_id: int) -> str:
    """The text of an id that the model has and the tokenizer lacks."""
    return f"[PAD{token_id}]"


def is_placeholder(tokens: TokenList, token_id: int) -> bool:
    return tokens.types[token_id] == UNUSED and tokens.texts[token_id] == placeholder(token_id)
