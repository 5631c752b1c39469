"""Schemas and templates as regexes: what is written satisfies them, what cannot be promised is refused by name."""

import datetime
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from mlx_dgemma import structure
from mlx_dgemma.automaton import compile_regex, lift
from mlx_dgemma.config import GenerationConfig, read_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.language import Ending, Language, solve
from mlx_dgemma.tokenizer import Tokenizer

DEMO = Path(__file__).parent.parent / "demo" / "checkpoint"
BYTES = [None, None, *(bytes([b]) for b in range(1, 256))]


def samples(regex, n=20, slots=80):
    """Random texts of a regex, byte by byte; digits and letters are likelier than the rest."""
    language = Language(lift(compile_regex(regex), BYTES), (1,), (0, 1))
    rng = np.random.default_rng(0)
    usual = np.array([bool(BYTES[t] and BYTES[t].isalnum()) for t in language.alive])
    room = max(slots, int(language.fewest[language.start]))
    for _ in range(n):
        weights = (rng.normal(0, 2, (room, len(language.alive))) + 2 * usual).astype(np.float32)
        found = solve(language, weights, language.start, Ending(room), rng.random(room))
        for string in (found.draft, found.sample):
            yield b"".join(BYTES[t] or b"" for t in string).decode()


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, 'q"uote': {"type": "null"}},
    "required": ["age"],
}
SCHEMAS = [
    PERSON,
    {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "boolean"}, "c": {"const": 1}}},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "additionalProperties": False},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z]{2}\\d+$"},
    {"type": "string", "pattern": "^[\\[\\]a-]--|x$"},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 1},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}], "items": False},
    {"enum": ["a.b", 'q"', 1, -2.5, True, None, {"x": [1, {}]}, "é\n", 12345678901234567890123]},
    {"type": ["integer", "null"], "enum": [1, "no", None]},
    {"type": ["string", "null"], "maxLength": 3},
    {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/a~1b"}], "$defs": {"a/b": {"type": "string", "format": "uuid"}}},
    {"allOf": [{"$ref": "#/$defs/p"}], "$defs": {"p": PERSON}, "title": "one"},
    *({"type": "string", "format": form} for form in ("date", "time", "date-time", "uuid", "ipv4", "email")),
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:50])
def test_whatever_is_written_satisfies_the_schema(schema):
    # jsonschema's own check of `time` is that of an old draft, and it has none of date-time.
    formats = jsonschema.FormatChecker(["date", "email", "ipv4", "uuid"])
    validator = jsonschema.Draft202012Validator(schema, format_checker=formats)
    kind = {"time": datetime.time, "date-time": datetime.datetime}.get(schema.get("format"))
    texts = set(samples(structure.json_schema(json.dumps(schema))))
    for text in texts:
        validator.validate(json.loads(text))
        assert kind is None or kind.fromisoformat(json.loads(text)).tzinfo


def test_everything_an_object_may_leave_out_can_be_left_out():
    found = compile_regex(structure.json_schema(json.dumps(SCHEMAS[1])))

    def takes(text):
        state = found.start
        for byte in text.encode():
            state = found.next[state, byte]
        return bool(found.final[state])

    entries = ['"a": 1.5', '"b": true', '"c": 1']
    for chosen in range(8):
        text = "{" + ", ".join(entry for i, entry in enumerate(entries) if chosen >> i & 1) + "}"
        assert takes(text), text
    assert not takes('{"a": 1,}') and not takes('{"b": true, "a": 1}') and takes('{"a":1,"b":true}')


# fmt: off
REFUSED = [
    ({"type": "integer", "minimum": 3}, "#/minimum: this keyword is not supported for integer"),
    ({"type": "number", "multipleOf": 2}, "#/multipleOf"),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "#/uniqueItems"),
    ({"type": "array", "items": {"type": "integer"}, "contains": {}}, "#/contains"),
    ({"type": "object", "patternProperties": {}}, "#/patternProperties"),
    ({"type": "object", "properties": {"a": {"type": "null", "maximum": 3}}}, "#/properties/a/maximum"),
    ({"type": "object", "properties": {"a": {"type": "null"}}, "minProperties": 1}, "#/minProperties"),
    ({"not": {"type": "integer"}}, "#"),
    ({"type": "integer", "if": {}}, "#/if"),
    ({"oneOf": [{"type": "integer"}]}, "#"),
    ({"anyOf": [{"type": "integer"}], "type": "integer"}, "#/type: this keyword is not supported beside 'anyOf'"),
    ({"enum": ["a"], "maxLength": 3}, "#/maxLength"),
    ({"allOf": [{"type": "integer"}, {"type": "number"}]}, "#/allOf has 2 schemas, expected 1"),
    ({"type": "string", "pattern": "a"}, "expected ^…$"),
    ({"type": "string", "pattern": "^.*$"}, "which a JSON string has to escape"),
    ({"type": "string", "pattern": "^a$", "maxLength": 1}, "has pattern and maxLength"),
    ({"type": "string", "format": "uri"}, "#/format is \"uri\", expected one of: date"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength is 3 and maxLength 2"),
    ({"type": "string", "maxLength": "3"}, "expected a whole number"),
    ({"type": "object"}, "# lists no properties"),
    ({"type": "array"}, "# has no items"),
    ({"type": "object", "properties": {"a": {}}}, "#/properties/a has no type"),
    ({"type": "object", "properties": {"a": True}}, "#/properties/a is true"),
    ({"type": "object", "properties": {}, "required": ["z"]}, 'names "z", expected a listed property'),
    ({"type": "text"}, "expected a JSON type"),
    ({"type": []}, "#/type is [], expected a JSON type"),
    ({"type": "string", "format": ["date"]}, '#/format is ["date"]'),
    ({"type": "string", "minLength": None}, "#/minLength is null"),
    ({"type": "string", "pattern": "^[a&&b]$"}, "Rust reads otherwise than JavaScript"),
    ({"type": "string", "pattern": "^[]a]$"}, "Rust reads otherwise than JavaScript"),
    ({"type": "object", "properties": {"a": {"type": "null"}}, "required": [["a"]]}, 'names ["a"], expected a listed'),
    ({"enum": []}, "#/enum is []"),
    ({"type": "integer", "enum": ["a"]}, "a value of the schema's type"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}, "holds itself"),
    ({"$ref": "#"}, "holds itself"),
    ({"$ref": "#/$defs/a"}, "found no #/$defs/a"),
    ({"$ref": "http://x/y"}, "expected a place in the same schema"),
    ({"$ref": "#name"}, "expected a place in the same schema"),
]
# fmt: on


@pytest.mark.parametrize("schema, message", REFUSED, ids=[json.dumps(schema)[:50] for schema, _ in REFUSED])
def test_what_cannot_be_promised_is_refused_by_name(schema, message):
    with pytest.raises(DgemmaError, match=re.escape(message)):
        structure.json_schema(json.dumps(schema))


def test_a_schema_comes_from_a_file_or_as_text(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"type": "null"}')
    assert structure.json_schema(path) == structure.json_schema(str(path)) == structure.json_schema('{"type": "null"}')
    path.write_text("[1]")
    assert structure.json_schema({"enum": ["a"]}) == structure.json_schema('{"enum": ["a"]}')
    deep = '{"type": "array", "items": ' * 500 + '{"type": "null"}' + "}" * 500
    bad = ((path, "is a JSON list"), (tmp_path / "no", "cannot be read"), ("{", "not JSON"), ("\0", "null byte"))
    for source, message in (*bad, ("[]", "its text, which begins with {"), (deep, "nested too deep|recursion")):
        with pytest.raises(DgemmaError, match=message):
            structure.json_schema(source)


def test_a_template_keeps_its_text_and_fills_its_slots():
    text = "Is it (really)? <|choice:yes,no. way|>\nN = <|integer|>, <|number|>, '<|string:3|>' "
    text += "<|regex:^[A-C]+$|><|string|>"
    wanted = (
        r"Is it \(really\)\? (yes|no\. way)\nN = -?\d+, -?\d+(\.\d+)?([eE][+-]?\d+)?, '[^\"\\]{0,3}' [A-C]+[^\"\\]*"
    )
    found = list(samples(structure.template(text), slots=100))
    assert all(re.fullmatch(wanted, sample) for sample in found), found
    assert structure.parts("a<|integer|>")[0] == "a" and structure.parts("<|choice:x,y|>")[0].choices == ("x", "y")


@pytest.mark.parametrize(
    "text, message",
    [
        ("no slot", "has no slot"), ("<|float|>", "the slot <|float|> is not known"), ("<|string:x|>", "<|string:x|>"),
        ("<|string:0|>", "<|string:0|>"), ("<|choice:a,a|>", "repeated"),
        ("<|choice:a|>", "one choice"), ("<|choice:|>", "not known"),
        ("<|integer:3|>", "expected one of: <|choice:red,green|>"), ("<|regex:a)|>", "without ("),
    ],
)  # fmt: skip
def test_a_template_s_mistakes_are_named(text, message):
    with pytest.raises(DgemmaError, match=re.escape(message)):
        structure.template(text)


def test_compiling_is_kept_and_special_tokens_stay_out():
    tokenizer, settings = Tokenizer(DEMO, read_config(DEMO)), GenerationConfig()
    language = structure.compile("[^x]*", tokenizer, settings)
    assert structure.compile("[^x]*", tokenizer, settings.replace(max_new_tokens=3)) is language
    special = {0, 1, 50, 106}
    assert set(language.alive[language.class_of[language.alive] >= language.n_text].tolist()) == special
    assert not {2, 3, 4, 48, 100, 105} & set(language.alive.tolist())
    tokens = tokenizer.encode("naïve ☃ 日本\n\ttab")
    assert language.complete[language.advance(language.start, tokens)]
    with pytest.raises(DgemmaError, match="does not continue"):
        language.advance(language.start, tokenizer.encode("x"))
