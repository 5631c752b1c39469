"""tokenizer.model ↔ the GGUF vocabulary kind "llama": SentencePiece BPE with scores and byte fallback.

Source   sentencepiece 0.2, sentencepiece_model.proto for the field numbers; llama.cpp at 00ad355, llama-vocab.cpp:
         merges by score, no normalization but " " to "▁"
Differs  a model that puts a space before every text is refused: sentencepiece does so once for each piece of text
         between special tokens, llama.cpp by rules of its own. The protocol-buffer message is read and written by
         hand, so neither side needs protobuf

A message is a list of fields (number, value): int for a varint, bytes for a string or message, float for fixed32.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import DgemmaError
from .tokens import NO_SCORE, NORMAL, UNKNOWN, UNUSED, TokenList, is_placeholder, placeholder

# Field numbers.
PIECE, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
MODEL_TYPE, WHITESPACE_SUFFIX, BYTE_FALLBACK = 3, 24, 35
SPECIAL_IDS = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}
SPECIAL_PIECES = {"unk": 45, "bos": 46, "eos": 47, "pad": 48}
NORMALIZER_NAME, CHARSMAP, DUMMY_PREFIX, REMOVE_EXTRA_SPACES, ESCAPE_SPACES = 1, 2, 3, 4, 5
BPE = 2

DEFAULT_PIECES = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}


class SentencePieceModel(NamedTuple):
    tokens: TokenList
    names: dict[str, str]  # "bos" → its piece


def parse_model(data: bytes, n_tokens: int, path: Path) -> SentencePieceModel:
    """What a GGUF holds of a tokenizer.model (one that sentencepiece can open), padded to `n_tokens` ids.

    Raises DgemmaError where a "llama" reader would give other ids.
    """
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
        if number == PIECE:
            pieces.append(dict(_fields(value)))
        elif number == TRAINER:
            trainer = dict(_fields(value))
        elif number == NORMALIZER:
            normalizer = dict(_fields(value))
    _check_scheme(trainer, normalizer, path)
    if len(pieces) > n_tokens:
        raise DgemmaError(
            f"{path}: the tokenizer has {len(pieces)} tokens and the model {n_tokens}; "
            "the files belong to different models"
        )
    padding = range(len(pieces), n_tokens)
    tokens = TokenList(
        [piece[PIECE_TEXT].decode() for piece in pieces] + [placeholder(i) for i in padding],
        [piece.get(PIECE_SCORE, 0.0) for piece in pieces] + [NO_SCORE for _ in padding],
        [piece.get(PIECE_TYPE, NORMAL) for piece in pieces] + [UNUSED for _ in padding],
        [],
    )
    names = {
        name: trainer[number].decode() if number in trainer else DEFAULT_PIECES[name]
        for name, number in SPECIAL_PIECES.items()
    }
    return SentencePieceModel(tokens, names)


def write_model(model: SentencePieceModel, path: Path) -> bytes:
    """A tokenizer.model that gives the ids a "llama" reader gives. path: the GGUF, for errors."""
    tokens = model.tokens
    if (n_unknown := tokens.types.count(UNKNOWN)) != 1:
        raise DgemmaError(f"{path}: the vocabulary has {n_unknown} unknown tokens, expected 1; download the file again")
    n = len(tokens.texts)
    while is_placeholder(tokens, n - 1):
        n -= 1
    message = b"".join(
        _bytes_field(PIECE, _piece(*entry))
        for entry in zip(tokens.texts[:n], tokens.scores[:n], tokens.types[:n], strict=True)
    )
    trainer = _varint_field(MODEL_TYPE, BPE) + _varint_field(BYTE_FALLBACK, 1)
    for name, number in SPECIAL_IDS.items():
        if name in model.names:
            trainer += _varint_field(number, tokens.texts.index(model.names[name]))
            trainer += _bytes_field(SPECIAL_PIECES[name], model.names[name].encode())
    normalizer = _bytes_field(NORMALIZER_NAME, b"identity")
    normalizer += _varint_field(DUMMY_PREFIX, 0)
    normalizer += _varint_field(REMOVE_EXTRA_SPACES, 0) + _varint_field(ESCAPE_SPACES, 1)
    return message + _bytes_field(TRAINER, trainer) + _bytes_field(NORMALIZER, normalizer)


def _check_scheme(trainer, normalizer, path):
    checks = {
        "is not BPE": trainer.get(MODEL_TYPE) == BPE,
        "has no byte fallback": trainer.get(BYTE_FALLBACK),
        "puts a space before every text": not normalizer.get(DUMMY_PREFIX, True),
        "puts spaces behind words": not trainer.get(WHITESPACE_SUFFIX),
        "normalizes characters": not normalizer.get(CHARSMAP),
        "drops repeated spaces": not normalizer.get(REMOVE_EXTRA_SPACES, True),
        "keeps spaces as they are": normalizer.get(ESCAPE_SPACES, True),
    }
    for found, fits in checks.items():
        if not fits:
            raise DgemmaError(
                f"{path}: this tokenizer {found}, which a GGUF vocabulary cannot express; "
                "expected Gemma's SentencePiece BPE, so use the tokenizer files of the original checkpoint"
            )


def _piece(text, score, kind):
    score_field = bytes([PIECE_SCORE << 3 | 5]) + struct.pack("<f", score)
    return _bytes_field(PIECE_TEXT, text.encode()) + score_field + _varint_field(PIECE_TYPE, kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes | float]]:
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _read_varint(data, at)
        elif wire == 2:
            n, at = _read_varint(data, at)
            value, at = data[at : at + n], at + n
        elif wire == 5:
            (value,) = struct.unpack_from("<f", data, at)
            at += 4
        else:  # fixed64
            value, at = data[at : at + 8], at + 8
        yield number, value


def _read_varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _varint_field(number, value):
    return _varint(number << 3) + _varint(value)


def _bytes_field(number, value):
    return _varint(number << 3 | 2) + _varint(len(value)) + value
