"""Text ↔ token ids, and the chat template. Needs no MLX, so every engine uses it.

Source   `tokenizer.json` through tokenizers, or `tokenizer.model` through sentencepiece, from a folder or as a GGUF's
         metadata holds them; `chat_template.jinja` rendered by jinja2 with the settings of transformers'
         apply_chat_template
Differs  a prompt that holds a special-looking token this vocabulary lacks is refused, not split into characters
"""

import datetime
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .config import ModelConfig, read_json
from .errors import DgemmaError

if TYPE_CHECKING:
    from .gguf.reader import GgufFile

# What a special token of this family looks like: <|name>, <name|> or <|name|>.
SPECIAL_SHAPE = re.compile(r"<\|[a-z_]+\|?>|<[a-z_]+\|>")
IMAGE_TOKENS = ("<|image>", "<image|>", "<|image|>")


class Reply(NamedTuple):
    """Generated tokens as text: what is meant for the reader, and the thought before it ("" without one)."""

    text: str
    thought: str


class Vocabulary(Protocol):
    """Either tokenizer library behind one face."""

    size: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def token(self, token_id: int) -> str: ...


class Tokenizer:
    """The vocabulary and chat template of a model folder, or of a GGUF (`Tokenizer.from_gguf`).

    Raises DgemmaError where a file is missing, unreadable or larger than the model's vocabulary.
    """

    def __init__(self, folder: Path, config: ModelConfig):
        folder = Path(folder)
        self._set_up(folder, _open_vocabulary(folder), template_source(folder), config)

    @classmethod
    def from_gguf(cls, file: "GgufFile", config: ModelConfig) -> "Tokenizer":
        """The vocabulary and chat template in a GGUF's metadata; no other file is read. Raises DgemmaError."""
        from .gguf.vocabulary import chat_template, vocabulary_file  # which imports the vocabularies below

        name, content = vocabulary_file(file)
        tokenizer = cls.__new__(cls)
        tokenizer._set_up(file.path, VOCABULARIES[name](content, file.path), chat_template(file), config)
        return tokenizer

    def _set_up(self, path, vocabulary, template, config):
        if vocabulary.size > config.vocab_size:
            raise DgemmaError(
                f"{path}: the tokenizer has {vocabulary.size} tokens and the model {config.vocab_size}; "
                "the files belong to different models"
            )
        self.path, self.vocabulary = path, vocabulary
        self.template = None if template is None else _compile_template(template, path)
        self._channel = self.vocabulary.token_id("<|channel>"), self.vocabulary.token_id("<channel|>")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens recognised, none added."""
        return self.vocabulary.encode(text)

    def decode(self, tokens: list[int]) -> str:
        """Text of `tokens`, special tokens left out. Bytes that are not UTF-8 become U+FFFD."""
        return self.vocabulary.decode([t for t in tokens if not self._is_special(t)])

    def pieces(self, tokens: list[int]) -> list[str]:
        """Each token's own text, for a view that styles tokens one by one."""
        return [self.vocabulary.decode([t]) if not self._is_special(t) else "" for t in tokens]

    def reply(self, tokens: list[int]) -> Reply:
        """Split generated tokens into thought and answer: a thought stands between <|channel> and <channel|>."""
        opened, closed = self._channel
        if opened is None or opened not in tokens:
            return Reply(self.decode(tokens), "")
        start = tokens.index(opened)
        end = tokens.index(closed, start) if closed in tokens[start:] else len(tokens)
        thought = self.decode(tokens[start + 1 : end]).removeprefix("thought").strip()
        return Reply(self.decode(tokens[:start] + tokens[end + 1 :]).lstrip(), thought)

    def chat(self, messages: list[dict], thinking: bool = False, reply_next: bool = True) -> list[int]:
        """Token ids of a conversation. messages: [{"role": "user", "content": "…"}, …].

        reply_next: end where the model's answer begins. Raises DgemmaError for an empty prompt, images, unknown
        special tokens, or a template that refuses the conversation.
        """
        for message in messages:
            if message["role"] != "assistant":  # the model's own words are taken as they are
                check_prompt(message["role"], message.get("content"))
                self._check_special_tokens(message["content"])
        if self.template is None:
            missing = "chat_template.jinja" if self.path.is_dir() else "chat template"
            raise DgemmaError(f"{self.path}: found no {missing}; download the model again")
        try:
            text = self.template.render(
                messages=messages,
                tools=None,
                bos_token="<bos>",
                add_generation_prompt=reply_next,
                enable_thinking=thinking,
            )
        except Exception as error:  # a template is a program from a file: it may fail in any way
            raise DgemmaError(f"{self.path}: the chat template refused the conversation ({error})") from None
        return self.encode(text)

    def _check_special_tokens(self, content):
        for match in SPECIAL_SHAPE.finditer(content):
            if self.vocabulary.token_id(match[0]) is None:
                raise DgemmaError(
                    f"the prompt holds {match[0]!r}, which is not a special token of {self.path.name}; "
                    "write it with a space inside if it is meant as text"
                )

    def _is_special(self, token_id):
        return token_id < 5 or SPECIAL_SHAPE.fullmatch(self.vocabulary.token(token_id)) is not None


def check_prompt(role: str, content) -> None:
    """What can be said of a prompt without a vocabulary. Raises DgemmaError where it is no text, empty or an image."""
    if not isinstance(content, str) or any(token in content for token in IMAGE_TOKENS):
        raise DgemmaError("the prompt holds an image; image input is not supported yet, give text only")
    if role == "user" and not content.strip():
        raise DgemmaError("the prompt is empty; give some text with --prompt, or on standard input with --prompt -")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise DgemmaError("the prompt is not valid UTF-8; give it as UTF-8 text") from None


class JsonVocabulary:
    """The content of a tokenizer.json. path: named in errors."""

    def __init__(self, content: bytes, path: Path):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception
            raise DgemmaError(f"{path}: not a tokenizer ({error}); download the file again") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.size = self._tokenizer.get_vocab_size()

    def encode(self, text):
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens):
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def token_id(self, token):
        return self._tokenizer.token_to_id(token)

    def token(self, token_id):
        return self._tokenizer.id_to_token(token_id) or ""


class SentencePieceVocabulary:
    """The content of a tokenizer.model. path: named in errors."""

    def __init__(self, content: bytes, path: Path):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DgemmaError(f"{path}: not a SentencePiece model ({error}); download the file again") from None
        self.size = self._model.get_piece_size()
        pieces = (self._model.id_to_piece(i) for i in range(self.size))
        special = [p for p in pieces if SPECIAL_SHAPE.fullmatch(p)] + ["<bos>", "<eos>", "<pad>", "<unk>"]
        self._special = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def encode(self, text):
        tokens = []
        for part in self._special.split(text):
            if self._special.fullmatch(part):
                tokens.append(self._model.piece_to_id(part))
            elif part:
                tokens += self._model.encode(part)
        return tokens

    def decode(self, tokens):
        # sentencepiece drops a leading space; decoding behind a known token keeps it.
        anchor = self._model.piece_to_id("<0x0A>")
        # A model may have more ids than its tokenizer.
        known = [t for t in tokens if t < self.size]
        return self._model.decode([anchor, *known])[1:] if known else ""

    def token_id(self, token):
        token_id = self._model.piece_to_id(token)
        return None if token_id == self._model.unk_id() and token != "<unk>" else token_id

    def token(self, token_id):
        return self._model.id_to_piece(token_id) if token_id < self.size else ""


VOCABULARIES = {"tokenizer.json": JsonVocabulary, "tokenizer.model": SentencePieceVocabulary}  # the first one wins


def _open_vocabulary(folder) -> Vocabulary:
    for name, kind in VOCABULARIES.items():
        if (folder / name).exists():
            return kind(_read(folder / name), folder / name)
    raise DgemmaError(f"{folder}: found no tokenizer.json and no tokenizer.model; download the checkpoint again")


def _read(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise DgemmaError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def template_source(folder: Path) -> str | None:
    """The chat template of a model folder, or None. Raises DgemmaError."""
    path, config_path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.exists():
        try:
            return _read(path).decode()
        except UnicodeDecodeError:
            raise DgemmaError(f"{path}: not UTF-8 text; download the file again") from None
    source = read_json(config_path).get("chat_template") if config_path.exists() else None
    if source is not None and not isinstance(source, str):
        raise DgemmaError(f"{config_path}: chat_template is a {type(source).__name__}, expected one template as text")
    return source or None


def _compile_template(source, path):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except Exception as error:  # nested too deep for Python's compiler, for one
        raise DgemmaError(f"{path}: the chat template is not valid ({error}); download it again") from None


def _raise(message):
    raise jinja2.TemplateError(message)
