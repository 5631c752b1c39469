"""tokenizer.json ↔ the GGUF vocabulary kind "gemma4": BPE over characters, with byte fallback.

Source   llama.cpp at 00ad355: its converter of Gemma 4 for types and scores, llama-vocab.cpp for what a reader does:
         " " becomes "▁", control and user-defined tokens are found first, text is cut between newlines and the rest,
         a run of newlines that is a token is taken whole, merges apply by rank, what is left becomes <0xNN> bytes
Differs  llama.cpp's converter writes any tokenizer.json; here one that such a reader would read otherwise is refused.
         Added tokens that are not special are user-defined also below the base vocabulary's size, because every
         Hugging Face reader finds them in text.
"""

import re
from pathlib import Path

from ..errors import DgemmaError
from ..tokenizer import JsonVocabulary
from .tokens import (
    BYTE,
    CONTROL,
    NO_SCORE,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    TokenList,
    is_placeholder,
    placeholder,
)

# llama.cpp hides control tokens from its output; a chat parser needs to see these.
VISIBLE = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)
NAMES = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
# As transformers 5.23.0, GemmaTokenizer, has it. It never cuts: the normalizer has left no space.
PRE_TOKENIZER = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
MODEL = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
MODEL |= {"fuse_unk": True, "byte_fallback": True, "ignore_merges": False}


def tokens_from_json(raw: dict, vocabulary: JsonVocabulary, special: set[str], n_tokens: int, path: Path) -> TokenList:
    """What a GGUF holds of a tokenizer.json, padded to `n_tokens` ids.

    raw: the file as JSON; vocabulary: the same file, opened; special: tokens that tokenizer_config.json names.
    Raises DgemmaError where a gemma4 reader would give other ids.
    """
    _check_scheme(raw, path)
    added = {entry["content"]: entry for entry in raw.get("added_tokens") or ()}
    texts = _texts_by_id(raw["model"]["vocab"], added, vocabulary, path)
    if max(texts) >= n_tokens:
        raise DgemmaError(
            f"{path}: the tokenizer has an id {max(texts)} and the model {n_tokens} tokens; "
            "the files belong to different models"
        )
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in raw["model"]["merges"]]
    if any(len(merge) != 2 or " " in merge[0] + merge[1] for merge in merges):
        _refuse(path, "has a merge with a space in it")
    _check_newlines(texts, merges, vocabulary, path)
    types = [_token_type(texts[i], added, special) if i in texts else UNUSED for i in range(n_tokens)]
    padded = [texts.get(i, placeholder(i)) for i in range(n_tokens)]
    if len(set(padded)) < n_tokens:
        _refuse(path, "has two ids for one token")
    return TokenList(padded, [NO_SCORE] * n_tokens, types, [f"{left} {right}" for left, right in merges])


def json_from_tokens(tokens: TokenList, unknown: str | None, path: Path) -> dict:
    """A tokenizer.json that gives the ids a gemma4 reader gives. path: the GGUF, for errors."""
    vocab = {text: i for i, text in enumerate(tokens.texts) if not is_placeholder(tokens, i)}
    if missing := [text for text in BYTES if text not in vocab]:
        raise DgemmaError(f"{path}: the vocabulary lacks the byte token {missing[0]}; download the file again")
    merges = [merge.split(" ", 1) for merge in tokens.merges]
    for merge in merges:
        if len(merge) != 2 or not (merge[0] in vocab and merge[1] in vocab and merge[0] + merge[1] in vocab):
            raise DgemmaError(
                f"{path}: the merge {' '.join(merge)[:40]!r} names no token; the file is corrupt, download it again"
            )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(i, text, kind)
            for i, (text, kind) in enumerate(zip(tokens.texts, tokens.types, strict=True))
            if kind in (CONTROL, USER_DEFINED, UNKNOWN)
        ],
        "normalizer": NORMALIZER,
        "pre_tokenizer": PRE_TOKENIZER,
        # Instruction-tuned Gemma 4 adds no <bos> by itself: the chat template writes it.
        "post_processor": None,
        "decoder": DECODER,
        "model": {**MODEL, "unk_token": unknown, "vocab": vocab, "merges": merges},
    }


def _added_token(token_id, text, kind):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": text, **flags, "special": kind != USER_DEFINED or text in VISIBLE}


def _token_type(text, added, special):
    if text in VISIBLE:
        return USER_DEFINED
    if text in special or text in added:
        return CONTROL if text in special or added[text]["special"] else USER_DEFINED
    return BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else NORMAL


def _texts_by_id(vocab, added, vocabulary, path):
    texts = {i: text for text, i in vocab.items()}
    if "" in vocab:
        _refuse(path, "has an empty token")
    if len(texts) < len(vocab):
        _refuse(path, "gives one id to two tokens")
    for text, entry in added.items():
        if vocabulary.token_id(text) != entry["id"] or texts.setdefault(entry["id"], text) != text:
            _refuse(path, f"gives the added token {text!r} the id {entry['id']}, which another token has")
        in_place = not (entry["single_word"] or entry["lstrip"] or entry["rstrip"])
        if not in_place or (entry["normalized"] and re.search("[ ▁]", text)):
            _refuse(path, f"finds the added token {text!r} by rules of its own")
    return texts


def _check_scheme(raw, path):
    model = raw["model"]
    checks = {
        "model": model.get("type") == "BPE",
        "byte fallback": model.get("byte_fallback") and all(text in model["vocab"] for text in BYTES),
        "model options": not any(
            model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        ),
        "normalizer": raw.get("normalizer") == NORMALIZER,
        "pre-tokenizer": raw.get("pre_tokenizer") is None
        or {**raw["pre_tokenizer"], "behavior": "MergedWithPrevious"} == PRE_TOKENIZER,
        "decoder": raw.get("decoder") == DECODER,
    }
    for what, fits in checks.items():
        if not fits:
            _refuse(path, f"has another {what}")


def _check_newlines(texts, merges, vocabulary, path):
    for left, right in merges:
        both = left + right
        if "\n" in both and both.strip("\n"):
            _refuse(path, f"merges a newline with other text ({both!r})")
    for i, text in texts.items():
        if text and not text.strip("\n") and vocabulary.encode(text) != [i]:
            _refuse(path, f"has a token {text!r} that its merges do not reach")


def _refuse(path, found):
    raise DgemmaError(
        f"{path}: this tokenizer {found}, which a GGUF vocabulary cannot express; "
        "expected Gemma 4's BPE, so use the tokenizer.json of the original checkpoint"
    )
