"""Sizes and rules of a graph description, as the short texts people read there: "N*D", "(P + t) % R", "k > q - W".

Grammar  whole numbers, names, + - * // %, parentheses, and for rules one comparison: < <= > >= ==
Differs  a text is parsed and walked, never executed; numpy arrays as values give arrays
"""

import ast
import functools
import operator

import numpy as np

from mlx_dgemma.errors import DgemmaError

_BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_COMPARE = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq}
MAX_LENGTH = 200  # characters; also bounds how deeply a text nests
MAX_SIZE = 1 << 48
MAX_VALUE = 1 << 62  # of whatever is computed on the way: it stays within numpy's 64 bits


def evaluate(text, names: dict):
    """The value of `text` (a whole number or an expression) where names have these values.

    Raises DgemmaError for anything outside the grammar, an unknown name, a division by zero.
    """
    if type(text) is int:
        return text
    if not isinstance(text, str) or len(text) > MAX_LENGTH:
        raise DgemmaError(f"found {str(text)[:50]!r}, expected a whole number or an expression such as 'N*D'")
    try:
        with np.errstate(divide="raise"):
            return _value(_parse(text), names)
    except (SyntaxError, ValueError, ArithmeticError, TypeError, RecursionError, MemoryError) as error:
        raise DgemmaError(f"expression {text!r}: {error}; expected whole numbers, names, + - * // %") from None


def size(text, names: dict) -> int:
    """A size: a whole number from 1 to 2^48. Raises DgemmaError."""
    value = evaluate(text, names)
    if type(value) is not int or not 0 < value <= MAX_SIZE:
        raise DgemmaError(f"size {text!r} is {value}, expected 1 to {MAX_SIZE}")
    return value


def used_names(text) -> set[str]:
    """The names an expression reads; none where it cannot be parsed."""
    try:
        return {n.id for n in ast.walk(_parse(text)) if isinstance(n, ast.Name)} if isinstance(text, str) else set()
    except SyntaxError:
        return set()


@functools.lru_cache(maxsize=4096)
def _parse(text):
    return ast.parse(text.strip(), mode="eval").body


def _value(node, names):
    match node:
        case ast.Constant(value=int() as value) if type(value) is int:
            return _bounded(value)
        case ast.Name(id=name):
            if name not in names:
                raise ValueError(f"unknown name {name}, known are {', '.join(sorted(map(str, names)))}")
            return names[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_value(left, names), _value(right, names)))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return _COMPARE[type(op)](_value(left, names), _value(right, names))
    raise ValueError(f"{type(node).__name__} is not allowed")


def _bounded(value):
    if isinstance(value, int) and abs(value) > MAX_VALUE:
        raise ValueError("the value is absurdly large")
    return value
