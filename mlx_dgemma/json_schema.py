"""A JSON schema → the regex of JSON texts that satisfy it.

Source   JSON Schema 2020-12; RFC 8259 for the texts, RFC 3339 for dates and times
Differs  not every satisfying value is written (an object has its listed properties alone, in their order; a number's
         exponent has two digits), but every written one satisfies. outlines-core's translation does not promise that:
         it ignores minimum, uniqueItems, if and an undeclared required property, reads allOf as one after the other
         and oneOf as anyOf, lets a pattern break out of its quotes, and takes other scripts' digits in a date

A keyword outside the table below is refused by name and path, so that nothing is silently ignored.
"""

import json
import re
from urllib.parse import unquote

from .automaton import compile_regex
from .errors import DgemmaError

SPACE = " ?"  # behind a comma or a colon
CHARACTER = r'(?:[^"\\\x00-\x1F\x7F-\x9F]|\\["\\/bfnrt])'
INTEGER = r"-?(?:0|[1-9][0-9]*)"
NUMBER = INTEGER + r"(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?"

_DAY = (
    "[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
FORMATS = {
    "date": _DAY.replace("[0-9]{4}", "(?:[1-9][0-9]{3})", 1),
    "time": _TIME,
    "date-time": f"(?:[1-9][0-9]{{3}}){_DAY.removeprefix('[0-9]{4}')}T{_TIME}",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "email": r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*@[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*(?:\.[A-Za-z0-9]+)+",
}

# What a schema of each form may hold; None: a schema without a type.
ANNOTATIONS = {
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples",
    "deprecated", "readOnly", "writeOnly",
}  # fmt: skip
KEYWORDS = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": set(),
    "number": set(),
    "boolean": set(),
    "null": set(),
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "enum": {"enum", "type"},
    "const": {"const", "type"},
    "anyOf": {"anyOf"},
    "allOf": {"allOf"},
    "$ref": {"$ref"},
}
_TYPES = {"string": str, "boolean": bool, "null": type(None), "object": dict, "array": list}


def schema_regex(schema: dict) -> str:
    """Raises DgemmaError for what cannot be promised: found where, expected what."""
    try:
        return _Walk(schema).regex(schema, "#", ())
    except RecursionError:
        raise DgemmaError("the schema is nested too deep to follow, expected fewer levels; take some out") from None


def read_schema(text: str, source: str = "the schema") -> dict:
    """Parses a schema. Raises DgemmaError where it is no JSON object."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DgemmaError(f"{source} is not JSON ({error}); expected a JSON schema") from None
    if not isinstance(schema, dict):
        raise DgemmaError(f"{source} is a JSON {type(schema).__name__}, expected a schema: an object with a type")
    return schema


def literal(text: str) -> str:
    """A regex that matches `text` alone."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&~-]", r"\\\g<0>", text)


class _Walk:
    def __init__(self, root):
        self.root = root

    def regex(self, schema, path, inside) -> str:
        """inside: the references on the way here."""
        if not isinstance(schema, dict):
            raise DgemmaError(
                f"{path} is {json.dumps(schema)}, expected a schema with a type; a regex cannot hold any value"
            )
        forms = [form for form in ("$ref", "enum", "const", "anyOf", "allOf") if form in schema]
        if forms:
            self._check(schema, KEYWORDS[forms[0]], f"beside {forms[0]!r}", path)
            return getattr(self, "_" + forms[0].lstrip("$"))(schema, path, inside)
        types = schema["type"] if "type" in schema else self._implied(schema, path)
        types = types if isinstance(types, list) and types else [types]
        for kind in types:
            if kind not in (*_TYPES, "integer", "number"):
                raise DgemmaError(f'{path}/type is {json.dumps(kind)}, expected a JSON type such as "string"')
        self._check(schema, set().union({"type"}, *(KEYWORDS[kind] for kind in types)), f"for {'/'.join(types)}", path)
        return _either(getattr(self, "_" + kind)(schema, path, inside) for kind in types)

    def _implied(self, schema, path):
        for kind in ("object", "array", "string"):
            if KEYWORDS[kind] & set(schema):
                return kind
        raise DgemmaError(f'{path} has no type, expected one: a regex cannot hold any value; add "type"')

    def _check(self, schema, allowed, where, path):
        for keyword in schema:
            if keyword not in allowed | ANNOTATIONS:
                supported = ", ".join(sorted(allowed)) or "none"
                raise DgemmaError(
                    f"{path}/{keyword}: this keyword is not supported {where}, expected one of: {supported};"
                    " remove it and check that in your program"
                )

    def _ref(self, schema, path, inside):
        ref = schema["$ref"]
        if not isinstance(ref, str) or not re.match("#(/|$)", ref):
            raise DgemmaError(
                f"{path}/$ref is {json.dumps(ref)}, expected a place in the same schema, such as #/$defs/name"
            )
        if ref in inside or ref == "#":
            raise DgemmaError(
                f"{path}/$ref: {ref} holds itself, and a regex cannot nest without end; write the levels out"
            )
        target = self.root
        for part in ref.removeprefix("#").split("/")[1:]:
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or part not in target:
                raise DgemmaError(f"{path}/$ref: found no {ref} in the schema, expected one; add it to $defs")
            target = target[part]
        return self.regex(target, ref, (*inside, ref))

    def _enum(self, schema, path, inside):
        values = schema["enum"]
        if not isinstance(values, list) or not (fitting := [v for v in values if _has_type(v, schema.get("type"))]):
            raise DgemmaError(f"{path}/enum is {json.dumps(values)}, expected a list with a value of the schema's type")
        return _either(_written(value, f"{path}/enum") for value in fitting)

    def _const(self, schema, path, inside):
        return self._enum({"enum": [schema["const"]], **schema}, path, inside)

    def _anyOf(self, schema, path, inside):
        parts = self._list(schema, "anyOf", path)
        return _either(self.regex(part, f"{path}/anyOf/{i}", inside) for i, part in enumerate(parts))

    def _allOf(self, schema, path, inside):
        parts = self._list(schema, "allOf", path)
        if len(parts) > 1:
            raise DgemmaError(f"{path}/allOf has {len(parts)} schemas, expected 1; merge them into one")
        return self.regex(parts[0], f"{path}/allOf/0", inside)

    def _list(self, schema, keyword, path):
        parts = schema[keyword]
        if not isinstance(parts, list) or not parts:
            raise DgemmaError(f"{path}/{keyword} is {json.dumps(parts)}, expected a list of schemas")
        return parts

    def _null(self, schema, path, inside):
        return "null"

    def _boolean(self, schema, path, inside):
        return "(?:true|false)"

    def _integer(self, schema, path, inside):
        return INTEGER

    def _number(self, schema, path, inside):
        return NUMBER

    def _string(self, schema, path, inside):
        given = [keyword for keyword in ("pattern", "format") if keyword in schema]
        lengths = [keyword for keyword in ("minLength", "maxLength") if keyword in schema]
        if not given:
            return f'"{CHARACTER}{_times(*self._range(schema, "minLength", "maxLength", path))}"'
        if len(given + lengths) > 1:
            raise DgemmaError(f"{path} has {' and '.join(given + lengths)}, expected one of them; say all in a pattern")
        if given == ["pattern"]:
            return f'"(?:{self._pattern(schema["pattern"], path)})"'
        if schema["format"] not in (*FORMATS,):
            raise DgemmaError(f"{path}/format is {json.dumps(schema['format'])}, expected one of: {', '.join(FORMATS)}")
        return f'"{FORMATS[schema["format"]]}"'

    def _pattern(self, pattern, path):
        """Anchored, its classes ASCII as in JavaScript, and without what a JSON string has to escape."""
        if not isinstance(pattern, str) or not (pattern.startswith("^") and pattern.endswith("$")):
            raise DgemmaError(
                f"{path}/pattern is {json.dumps(pattern)}, expected ^…$: what the whole string looks like"
            )
        for found in re.finditer(r"\\.|\[\^?(?:\\.|[^\]\\])*\]", pattern):
            if found[0][0] == "[" and re.search(r"^\[\^?\]|(?!^)\[|&&|--|~~", re.sub(r"\\.", "", found[0])):
                raise DgemmaError(
                    f"{path}/pattern holds {json.dumps(found[0])}, which Rust reads otherwise than JavaScript; escape"
                    " brackets and doubled marks inside a class with a backslash"
                )
        ascii_only = {r"\d": "[0-9]", r"\w": "[A-Za-z0-9_]"}
        inner = re.sub(r"\\.", lambda match: ascii_only.get(match[0], match[0]), pattern[1:-1])
        automaton = compile_regex(inner)
        dead = len(automaton.next) - 1
        broken = [byte for byte in (*range(32), 34, 92, 127) if (automaton.next[:, byte] != dead).any()]
        if broken:
            raise DgemmaError(
                f"{path}/pattern {json.dumps(pattern)} allows {json.dumps(chr(broken[0]))}, which a JSON string has to"
                " escape; expected a pattern without quotes, backslashes and control characters, so name what it allows"
            )
        return inner

    def _range(self, schema, least, most, path):
        for keyword in (least, most):
            value = schema.get(keyword, 0)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise DgemmaError(f"{path}/{keyword} is {json.dumps(value)}, expected a whole number from 0 on")
        low, high = schema.get(least, 0), schema.get(most)
        if high is not None and high < low:
            raise DgemmaError(f"{path}: {least} is {low} and {most} {high}, expected {least} ≤ {most}")
        return low, high

    def _object(self, schema, path, inside):
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise DgemmaError(f"{path}: properties and required are no object and no list, expected those")
        unknown = [name for name in required if name not in [*properties]]
        if unknown:
            raise DgemmaError(f"{path}/required names {json.dumps(unknown[0])}, expected a listed property; add it")
        if not properties:
            return self._map(schema, path, inside)
        entries = [
            (
                f"{_written(name, path)}:{SPACE}{self.regex(value, f'{path}/properties/{name}', inside)}",
                name in required,
            )
            for name, value in properties.items()
        ]
        return r"\{" + _comma_separated(entries) + r"\}"

    def _map(self, schema, path, inside):
        values = schema.get("additionalProperties", True)
        if values is False:
            return r"\{\}"
        if values is True:
            raise DgemmaError(f"{path} lists no properties, expected some, or additionalProperties with a schema")
        entry = f'"{CHARACTER}*":{SPACE}{self.regex(values, f"{path}/additionalProperties", inside)}'
        return rf"\{{(?:{entry}(?:,{SPACE}{entry})*)?\}}"

    def _array(self, schema, path, inside):
        low, high = self._range(schema, "minItems", "maxItems", path)
        if "prefixItems" in schema:
            parts = self._list(schema, "prefixItems", path)
            if low > len(parts) or (high is not None and high < len(parts)) or schema.get("items", False) is not False:
                raise DgemmaError(f"{path}: prefixItems has {len(parts)} schemas, expected as many items and no others")
            parts = (self.regex(part, f"{path}/prefixItems/{i}", inside) for i, part in enumerate(parts))
            return r"\[" + f",{SPACE}".join(parts) + r"\]"
        if high == 0:
            return r"\[\]"
        if "items" not in schema:
            raise DgemmaError(f"{path} has no items, expected a schema for them: a regex cannot hold any value")
        item = self.regex(schema["items"], f"{path}/items", inside)
        more = _times(max(0, low - 1), None if high is None else high - 1)
        filled = f"{item}(?:,{SPACE}{item}){more}"
        return rf"\[{filled}\]" if low else rf"\[(?:{filled})?\]"


def _either(regexes):
    return "(?:" + "|".join(dict.fromkeys(regexes)) + ")"


def _times(low, high):
    if high is None:
        return "*" if low == 0 else f"{{{low},}}"
    return f"{{{low},{high}}}"


def _comma_separated(entries):
    """A regex of entries (regex, required) in their order. A required one decides which side a comma stands on."""
    fixed = next((i for i, (_, required) in enumerate(entries) if required), None)
    if fixed is None:  # any entry may be the first that is there
        tails = [_comma_separated([(entry, True), *entries[i + 1 :]]) for i, (entry, _) in enumerate(entries)]
        return "(?:" + "|".join(tails) + ")?"
    before = "".join(f"(?:{entry},{SPACE})?" for entry, _ in entries[:fixed])
    behind = "".join(
        f",{SPACE}{entry}" if required else f"(?:,{SPACE}{entry})?" for entry, required in entries[fixed + 1 :]
    )
    return before + entries[fixed][0] + behind


def _has_type(value, types):
    if types is None:
        return True
    for kind in types if isinstance(types, list) else [types]:
        if kind in ("integer", "number"):
            whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            if not isinstance(value, bool) and (whole or (kind == "number" and isinstance(value, float))):
                return True
        elif isinstance(value, _TYPES.get(kind, ())):
            return True
    return False


def _written(value, path):
    """A regex of the texts of one JSON value."""
    match value:
        case dict():
            entries = (f"{_written(str(k), path)}:{SPACE}{_written(v, path)}" for k, v in value.items())
            return r"\{" + f",{SPACE}".join(entries) + r"\}"
        case list():
            return r"\[" + f",{SPACE}".join(_written(item, path) for item in value) + r"\]"
        case float() if value != value or value in (float("inf"), float("-inf")):
            raise DgemmaError(f"{path} holds {value}, expected a number that JSON has")
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise DgemmaError(f"{path} holds half a surrogate pair, expected whole characters") from None
    return literal(text)
