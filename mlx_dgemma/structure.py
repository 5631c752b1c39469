"""What a text has to look like, as people write it: a regex, a JSON schema, or a template with slots.

Source   ours for templates; json_schema.py for schemas
Differs  Rust's regex syntax: no look-around, no back-references. The whole text matches, so `^` and `$` are not needed

Everything becomes one regex, and `compile` makes it a Language.
"""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

from .automaton import compile_regex, lift, shortened, token_bytes, without_outer_anchors
from .config import GenerationConfig
from .errors import DgemmaError
from .json_schema import INTEGER, NUMBER, literal, read_schema, schema_regex
from .language import Language
from .tokenizer import Tokenizer

SLOT_FORMS = "<|choice:red,green|>, <|integer|>, <|number|>, <|string|>, <|string:20|>, <|regex:[A-Z]+|>"
_SLOT = re.compile(r"<\|(.*?)\|>", re.DOTALL)
_PLAIN = r'[^"\\\x00-\x1F\x7F-\x9F]'


class Slot(NamedTuple):
    """A hole in a template."""

    kind: str  # choice, integer, number, string or regex
    choices: tuple[str, ...]  # of a choice
    regex: str


def compile(regex: str, tokenizer: Tokenizer, settings: GenerationConfig) -> Language:
    """The language of texts that match `regex` as a whole. Raises DgemmaError where it is wrong, empty or too large."""
    return _compile(regex, tokenizer, settings.stop_token_ids, settings.pad_token_id)


@functools.lru_cache(maxsize=16)
def _compile(regex, tokenizer, stop_ids, pad_id):
    settings = GenerationConfig(stop_token_ids=stop_ids, pad_token_id=pad_id)
    texts = list(token_bytes(tokenizer))
    for token in (*stop_ids, *Language.fill_ids(settings)):
        if token < len(texts):
            texts[token] = None  # it ends a text, so it is no part of one
    return Language.of(lift(compile_regex(regex), texts), settings)


def json_schema(source: str | Path | dict) -> str:
    """The regex of a JSON schema, given as a dict, as its text (which begins with a brace) or as a file's path."""
    text = json.dumps(source) if isinstance(source, dict) else str(source)
    if text.lstrip().startswith("{"):
        return schema_regex(read_schema(text))
    try:
        content = Path(text).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DgemmaError(f"{text}: not UTF-8 text; expected a JSON schema") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", error)
        raise DgemmaError(
            f"{shortened(text)}: cannot be read ({why}); give a JSON schema's file, or its text, which begins with {{"
        ) from None
    return schema_regex(read_schema(content, text))


def template(text: str) -> str:
    """The regex of a template: fixed text with slots of SLOT_FORMS. Raises DgemmaError, naming the slot."""
    return "".join(part.regex if isinstance(part, Slot) else literal(part) for part in parts(text))


def only_choices(text: str) -> bool:
    """Whether a template asks for nothing but choices, which need no denoising."""
    return all(part.kind == "choice" for part in parts(text) if isinstance(part, Slot))


def parts(text: str) -> list[str | Slot]:
    """Fixed texts and slots of a template, in order. Raises DgemmaError for an unknown slot, or where there is none."""
    found, at = [], 0
    for match in _SLOT.finditer(text):
        found += [text[at : match.start()], _slot(match[1], match[0])]
        at = match.end()
    if not found:
        found = "a slot that no |> closes" if "<|" in text else "no slot"
        raise DgemmaError(f"the template has {found}, expected one such as: {SLOT_FORMS}")
    return [part for part in (*found, text[at:]) if part != ""]


def _slot(inside, shown):
    kind, colon, argument = inside.partition(":")
    match kind:
        case "choice" if argument:
            choices = tuple(argument.split(","))
            if "" in choices or len(set(choices)) < len(choices) or len(choices) < 2:
                raise DgemmaError(
                    f"the slot {shown} has one choice, or an empty or repeated one, expected different texts"
                )
            return Slot(kind, choices, "(?:" + "|".join(map(literal, choices)) + ")")
        case "integer" if not colon:
            return Slot(kind, (), f"(?:{INTEGER})")
        case "number" if not colon:
            return Slot(kind, (), f"(?:{NUMBER})")
        case "string" if not colon:
            return Slot(kind, (), f"{_PLAIN}*")
        case "string" if re.fullmatch("[0-9]+", argument) and int(argument) > 0:
            return Slot(kind, (), f"{_PLAIN}{{0,{int(argument)}}}")
        case "regex" if argument:
            return Slot(kind, (), f"(?:{without_outer_anchors(argument)})")
    raise DgemmaError(f"the slot {shown} is not known, expected one of: {SLOT_FORMS}")
