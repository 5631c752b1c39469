"""Which values a node can have, as far as sizes tell: ids stay within their rows, and nothing sorts NaN.

Source   ggml's CPU kernels: an id outside its table, or NaN in std::sort, ends the process or reads other memory
Differs  interval arithmetic in the float32 that ggml computes in; what it cannot tell is "anything", and refused there

Bounds are (least, largest) and promise that no value is NaN; None is any value.
"""

import numpy as np

from mlx_dgemma.errors import DgemmaError

from .ops import Spec

Bounds = tuple[float, float] | None
SAME = ("reshape", "view", "permute", "cont", "repeat", "get_rows")  # values of the first input, and no others
SORTS = ("argsort", "argsort_top_k")  # top_k is a partial sort: a heap, which NaN cannot lead astray
ID_TABLES = {"get_rows": 1, "set_rows": 1, "mul_mat_id": 2}  # axis of the first input that the last one counts along
ADVICE = 'ids come from an input or persistent tensor with "below", from argsort, argmax, or the cast of a clamp'


def check(op: str, specs: list[Spec], known: list[Bounds]) -> None:
    """Raises DgemmaError where these inputs could end the process."""
    if op in ID_TABLES:
        n, ids = specs[0].ne[ID_TABLES[op]], known[-1]
        if ids is None or not 0 <= ids[0] <= ids[1] < n:
            raise DgemmaError(f"its ids are {_text(ids)}, expected 0 to {n - 1}; {ADVICE}")
    if op in SORTS and known[0] is None:
        raise DgemmaError("sorts what may be NaN; put a clamp before it")
    if op == "cpy" and known[1] is not None and not _within(known[0], known[1]):
        raise DgemmaError(f"writes {_text(known[0])}, expected {_text(known[1])}; {ADVICE}")


def of_result(op: str, params: dict, specs: list[Spec], known: list[Bounds]) -> Bounds:
    """The bounds of what an operation makes of inputs with these bounds."""
    if op in SAME:
        return known[0]
    if op == "cpy":
        return known[1]
    if op in (*SORTS, "top_k", "argmax"):
        return 0, specs[0].ne[0] - 1
    if op == "arange":
        return 0, params["stop"] - 1
    if op == "step":
        return 0, 1
    if op == "clamp":
        return float(np.float32(params["min"])), float(np.float32(params["max"]))
    if op == "scale":
        factor, bias = (float(np.float32(params.get(name, 0))) for name in ("factor", "bias"))
        return _sum(_product(known[0], (factor, factor)), (bias, bias))
    if op == "add":
        return _sum(*known)
    if op == "sub":
        return _sum(known[0], _product(known[1], (-1, -1)))
    if op == "cast":
        return _cast(known[0], params["type"])
    return None


def _within(inner, outer):
    return inner is not None and outer[0] <= inner[0] and inner[1] <= outer[1]


def _sum(a, b):
    return None if a is None or b is None else _float32(a[0] + b[0], a[1] + b[1])


def _product(a, b):
    if a is None:
        return None
    ends = [x * y for x in a for y in b]
    return _float32(min(ends), max(ends))


def _cast(a, type):
    if a is None or type == "f16":
        return None
    if type == "f32":
        return _float32(*a)
    return (int(a[0]), int(a[1])) if -(2**31) <= a[0] <= a[1] < 2**31 else None


def _float32(least, largest):
    """The nearest float32 outside; None where that is infinite."""
    with np.errstate(over="ignore"):
        low, high = np.float32(least), np.float32(largest)
        low = low if float(low) <= least else np.nextafter(low, np.float32(-np.inf))
        high = high if float(high) >= largest else np.nextafter(high, np.float32(np.inf))
    return (float(low), float(high)) if np.isfinite([low, high]).all() else None


def _text(bounds):
    return "anything" if bounds is None else f"{bounds[0]:.9g} to {bounds[1]:.9g}"
