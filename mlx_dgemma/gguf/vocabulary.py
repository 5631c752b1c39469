"""The `tokenizer.*` metadata of a GGUF: written from a checkpoint folder, and turned back into tokenizer files.

Source   llama.cpp at 00ad355: its converter and gguf-py's SpecialVocab for the keys, llama-vocab.cpp for the checks; a
         test compares ids with the llama.cpp inside xllamacpp
Differs  a vocabulary that a GGUF reader would read otherwise is refused; nothing here needs transformers

Two kinds: "gemma4" (tokenizer.json, gemma4.py) and "llama" (tokenizer.model, sentencepiece_model.py).
"""

import json
from pathlib import Path

from ..config import read_json
from ..errors import DgemmaError
from ..tokenizer import JsonVocabulary, SentencePieceVocabulary, template_source
from . import gemma4
from .reader import GgufFile, Value
from .sentencepiece_model import SentencePieceModel, parse_model, write_model
from .tokens import BYTE, TokenList

KEY = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
# What tokenizer_config.json calls <name>_token → the GGUF key; a file without the first two does not run.
ID_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id"}
ID_KEYS |= {"pad": "padding_token_id", "mask": "mask_token_id"}
REQUIRED = ("bos", "eos")
OTHER_IDS = ("eot_token_id", "eom_token_id", "seperator_token_id")  # gguf-py's spelling; optional in published files


def vocabulary_metadata(folder: Path, vocab_size: int) -> dict[str, Value]:
    """All `tokenizer.*` keys for a checkpoint folder, with one token for each of the model's `vocab_size` rows.

    Raises DgemmaError where a file is missing or unreadable, or no GGUF reader would give the same ids.
    """
    folder = Path(folder)
    names = _special_names(folder)
    if (folder / "tokenizer.json").exists():
        kind = "gemma4"
        tokens = _json_tokens(folder / "tokenizer.json", set(names.values()), vocab_size)
        names = gemma4.NAMES | names
    elif (folder / "tokenizer.model").exists():
        model = _model_tokens(folder / "tokenizer.model", vocab_size)
        kind, tokens = "llama", model.tokens
        names = {"mask": "<mask>"} | model.names | names
    else:
        raise DgemmaError(f"{folder}: found no tokenizer.json and no tokenizer.model; download the checkpoint again")
    metadata = {
        KEY + "model": Value("str", kind),
        KEY + "tokens": Value("arr[str]", tokens.texts),
        KEY + "scores": Value("arr[f32]", tokens.scores),
        KEY + "token_type": Value("arr[i32]", tokens.types),
    }
    if kind == "gemma4":
        metadata[KEY + "merges"] = Value("arr[str]", tokens.merges)
    for name, token_id in _special_ids(names, tokens, folder).items():
        metadata[KEY + ID_KEYS[name]] = Value("u32", token_id)
    if source := template_source(folder):
        metadata[TEMPLATE] = Value("str", source)
    metadata[KEY + "add_space_prefix"] = Value("bool", False)
    metadata[KEY + "add_bos_token"] = Value("bool", True)
    return metadata


def tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """File name → content of what a Hugging Face or MLX folder holds beside the weights to turn text into tokens.

    Raises DgemmaError where the vocabulary is of a kind this model family does not use, or inconsistent.
    """
    name, content = vocabulary_file(file)
    special = _special_tokens(file, _texts(file))
    config = {f"{role}_token": text for role, text in special.items()}
    # GemmaTokenizer is what transformers builds from a tokenizer.model; a tokenizer.json describes itself.
    config["tokenizer_class"] = "PreTrainedTokenizerFast" if name == "tokenizer.json" else "GemmaTokenizer"
    config |= {"clean_up_tokenization_spaces": False, "padding_side": "left"}
    files = {name: content, "tokenizer_config.json": _json_bytes(config, indent=2)}
    if source := chat_template(file):
        files["chat_template.jinja"] = source.encode()
    return files


def vocabulary_file(file: GgufFile) -> tuple[str, bytes]:
    """("tokenizer.json" or "tokenizer.model", its content) for the vocabulary of a GGUF. Raises DgemmaError."""
    kind = _scalar(file, KEY + "model", "str")
    if kind not in ("gemma4", "llama"):
        raise DgemmaError(
            f'{file.path}: the vocabulary is of the kind {kind!r}, expected "gemma4" or "llama" '
            "as DiffusionGemma files have it; download a GGUF of this model"
        )
    tokens = _read_tokens(file, kind)
    special = _special_tokens(file, tokens.texts)
    if kind == "gemma4":
        return "tokenizer.json", _json_bytes(gemma4.json_from_tokens(tokens, special.get("unk"), file.path))
    if _scalar(file, KEY + "add_space_prefix", "bool", True):  # a reader's default for this kind
        raise DgemmaError(
            f"{file.path}: {KEY}add_space_prefix is not false, so a space stands before every text; "
            "expected Gemma's vocabulary, download a GGUF of this model"
        )
    return "tokenizer.model", write_model(SentencePieceModel(tokens, special), file.path)


def chat_template(file: GgufFile) -> str | None:
    """The chat template a GGUF carries, or None."""
    return _scalar(file, TEMPLATE, "str", None)


def _json_tokens(path, special, vocab_size):
    # The library finds what is malformed, so what follows reads a tokenizer.json of the right shape.
    vocabulary = JsonVocabulary(path.read_bytes(), path)
    return gemma4.tokens_from_json(read_json(path), vocabulary, special, vocab_size, path)


def _model_tokens(path, vocab_size):
    data = path.read_bytes()
    SentencePieceVocabulary(data, path)  # for its checks
    return parse_model(data, vocab_size, path)


def _special_names(folder):
    """Role → token, as far as tokenizer_config.json names them."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    names = {}
    for role in ID_KEYS:
        value = config.get(f"{role}_token")
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            names[role] = text
    return names


def _special_ids(names, tokens, folder):
    """Role → id, for the roles whose token the vocabulary has."""
    ids = {text: i for i, text in enumerate(tokens.texts)}
    for role in REQUIRED:
        if names[role] not in ids:
            raise DgemmaError(
                f"{folder}: the {role} token {names[role]!r} is not in the vocabulary; "
                "download the tokenizer files again"
            )
    return {role: ids[names[role]] for role in ID_KEYS if names[role] in ids}


def _read_tokens(file, kind):
    texts = _texts(file)
    types = _list(file, "token_type", "arr[i32]", len(texts))
    if wrong := {t for t in types if not 1 <= t <= BYTE}:
        raise _corrupt(file, f"the token type {min(wrong)} is not known")
    if kind == "llama":
        return TokenList(texts, _list(file, "scores", "arr[f32]", len(texts)), types, [])
    if KEY + "scores" in file.metadata:
        _list(file, "scores", "arr[f32]", len(texts))
    return TokenList(texts, [], types, _list(file, "merges", "arr[str]"))


def _texts(file):
    texts = _list(file, "tokens", "arr[str]")
    if not texts or len(set(texts)) < len(texts):
        raise _corrupt(file, "the vocabulary is empty or has a token twice")
    return texts


def _special_tokens(file, texts):
    """Role → token text, from the ids a GGUF names. Every id is checked, also those that only other programs use."""
    special = {}
    for role, key in [*ID_KEYS.items(), *((None, key) for key in OTHER_IDS)]:
        token_id = _scalar(file, KEY + key, "u32", None)
        if token_id is None and role in REQUIRED:
            raise _corrupt(file, f"{KEY + key} is missing")
        if token_id is not None and token_id >= len(texts):
            raise _corrupt(file, f"{KEY + key} is {token_id}, and there are {len(texts)} tokens")
        if token_id is not None and role:
            special[role] = texts[token_id]
    return special


_NEEDED = object()


def _scalar(file, key, kind, default=_NEEDED):
    if key not in file.metadata and default is not _NEEDED:
        return default
    return _value(file, key, kind)


def _list(file, name, kind, length=None):
    values = _value(file, KEY + name, kind)
    if length is not None and len(values) != length:
        raise _corrupt(file, f"{KEY + name} has {len(values)} entries for {length} tokens")
    return values


def _value(file, key, kind):
    found = file.metadata.get(key)
    if found is None:
        raise _corrupt(file, f"{key} is missing")
    if found.type != kind:
        raise _corrupt(file, f"{key} is stored as {found.type}, expected {kind}")
    return found.value


def _corrupt(file, found):
    return DgemmaError(f"{file.path}: {found}; the file is corrupt or not a whole model, download it again")


def _json_bytes(value, **options):
    return json.dumps(value, ensure_ascii=False, **options).encode()
