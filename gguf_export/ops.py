"""The operations a graph description may use: ggml's, by name, with named parameters, and what each makes of shapes.

Shapes   `ne` order as in ggml: fastest axis first, always four axes; strides count elements
Source   ggml.c (ggml 0.25 and 0.26): the assertions of each function, and those of its CPU kernel. ggml ends the whole
         process where one fails, so every one of them is checked here before ggml sees the node
Differs  only what DiffusionGemma needs; a view's strides count elements, because bytes depend on the type

graph_numpy.py computes every operation of this table, ggml_graph.py builds it; a test holds the three together.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.types import TYPES

PLAIN = {"f32": 4, "f16": 2, "i32": 4, "i64": 8}  # bytes per element
WEIGHT_TYPES = tuple(name.lower() for name in TYPES)
MAX_ELEMENTS = 1 << 40  # of one tensor: 4 TiB in float32, more than any device has
MAX_AXIS = (1 << 31) - 1  # elements along one axis: ggml counts some in 32 bits


class Spec(NamedTuple):
    """Type and layout of a tensor."""

    type: str  # "f32", "q4_k", …
    ne: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]  # elements

    @property
    def elements(self) -> int:
        return math.prod(self.ne)

    @property
    def contiguous(self) -> bool:
        return all(n == 1 or s == c for n, s, c in zip(self.ne, self.strides, packed(self.ne), strict=True))

    @property
    def nbytes(self) -> int:
        """Of a contiguous tensor."""
        if self.type in PLAIN:
            return self.elements * PLAIN[self.type]
        return self.elements // self.ne[0] * TYPES[self.type.upper()].row_bytes(self.ne[0])

    def __str__(self):
        return f"{self.type}[{', '.join(map(str, trimmed(self.ne)))}]"


def tensor(type: str, *ne: int) -> Spec:
    """A contiguous tensor."""
    full = (*ne, 1, 1, 1)[:4]
    require(max(full) <= MAX_AXIS, lambda: f"an axis of {max(full)} elements, expected at most {MAX_AXIS}")
    require(math.prod(full) <= MAX_ELEMENTS, lambda: f"{math.prod(full)} elements, expected at most {MAX_ELEMENTS}")
    return Spec(type, full, packed(full))


def packed(ne):
    strides, step = [], 1
    for n in ne:
        strides.append(step)
        step *= n
    return tuple(strides)


def trimmed(ne):
    """Without trailing ones: [64, 2, 1, 1] is [64, 2]."""
    return ne[: max((i + 1 for i, n in enumerate(ne) if n != 1), default=1)]


def require(condition, found):
    """found() says what is wrong; only then, because texts were a quarter of the time that a phase took to expand."""
    if not condition:
        raise DgemmaError(found())


class Op(NamedTuple):
    """One operation.

    inputs: what each input is; a name that ends in "?" may be left out. params: name → kind. Kinds: "number", "count"
    (an expression), "sizes" and "strides" (up to four expressions), "axes", "type", or the texts allowed.
    """

    inputs: tuple[str, ...]
    params: dict
    infer: Callable[..., Spec]
    says: str


# Each function takes the inputs' specs and the parameters' values and returns the result's spec.


def _f32(*specs):
    for s in specs:
        require(s.type == "f32", lambda s=s: f"found {s}, expected f32")


def _packed(*specs):
    # Stricter than ggml's own test, which forgives any stride of an axis with one element: some kernels use it.
    for s in specs:
        require(
            s.strides == packed(s.ne),
            lambda s=s: f"{s} is a strided view, expected a contiguous tensor; put a cont before it",
        )


def _rows_packed(*specs):
    for s in specs:
        require(s.strides[0] == 1, lambda s=s: f"{s} has strided rows, expected each row to be contiguous")


def _same(a):
    """Element by element."""
    _f32(a)
    _packed(a)
    return tensor("f32", *a.ne)


def _binary(a, b):
    _f32(a, b)
    _rows_packed(a, b)
    require(all(n % m == 0 for n, m in zip(a.ne, b.ne, strict=True)), lambda: f"{b} does not repeat to {a}")
    return tensor("f32", *a.ne)


def _get_rows(a, ids):
    require(a.type != "i64" and ids.type == "i32", lambda: f"found rows {a} and ids {ids}, expected i32 ids")
    _rows_packed(a)
    require(
        a.ne[2] == ids.ne[1] and a.ne[3] == ids.ne[2] and ids.ne[3] == 1,
        lambda: f"ids {ids} do not fit the batches of {a}",
    )
    return tensor("i32" if a.type == "i32" else "f32", a.ne[0], *ids.ne[:3])


def _set_rows(target, rows, ids):
    require(target.type in ("f32", "f16"), lambda: f"found {target}, expected a target of f32 or f16")
    _f32(rows)
    require(ids.type in ("i64", "i32"), lambda: f"found {ids}, expected i64 ids")
    _packed(target, rows, ids)
    require(
        target.ne[0] == rows.ne[0] and target.ne[2:] == rows.ne[2:] == (1, 1), lambda: f"{rows} are no rows of {target}"
    )
    require(ids.ne == (rows.ne[1], 1, 1, 1), lambda: f"ids {ids}, expected one for each row of {rows}")
    require(rows.ne[1] <= target.ne[1], lambda: f"{rows} has more rows than {target}")
    return target


def _mul_mat(a, b, precision="default"):
    require(a.type not in ("i32", "i64"), lambda: f"found {a}, expected weights or floats")
    _f32(b)
    _rows_packed(a, b)
    require(a.strides[1] >= a.ne[0] or a.ne[1] == 1, lambda: f"{a} is transposed; put a cont before it")
    require(a.ne[0] == b.ne[0], lambda: f"rows of {a} and {b} differ in length")
    require(b.ne[2] % a.ne[2] == 0 and b.ne[3] % a.ne[3] == 0, lambda: f"{a} does not repeat over the batches of {b}")
    return tensor("f32", a.ne[1], *b.ne[1:])


def _mul_mat_id(experts, b, ids):
    require(
        experts.type not in ("i32", "i64") and ids.type == "i32", lambda: f"found {experts} and {ids}, expected i32 ids"
    )
    _f32(b)
    _packed(experts, b)
    _rows_packed(ids)
    require(experts.ne[3] == b.ne[3] == 1 and ids.ne[2:] == (1, 1), lambda: "expected three axes and two of ids")
    require(experts.ne[0] == b.ne[0], lambda: f"rows of {experts} and {b} differ in length")
    require(ids.ne[1] == b.ne[2] and ids.ne[0] % b.ne[1] == 0, lambda: f"ids {ids} do not fit {b}")
    require(ids.ne[0] <= experts.ne[2], lambda: f"ids {ids} choose more experts than {experts} has")
    return tensor("f32", experts.ne[1], ids.ne[0], b.ne[2])


def _out_prod(a, b):
    _f32(a, b)
    _packed(a, b)
    require(a.ne[1:] == b.ne[1:], lambda: f"{a} and {b} differ in rows")
    return tensor("f32", a.ne[0], b.ne[0], *a.ne[2:])


def _rms_norm(a, eps):
    _f32(a)
    _packed(a)
    require(eps >= 0, lambda: f"eps is {eps}, expected 0 or more")
    return tensor("f32", *a.ne)


def _rope(a, positions, factors=None, *, dims, base, style):
    _f32(a)
    _packed(a)
    require(
        positions.type == "i32" and positions.ne == (a.ne[2], 1, 1, 1), lambda: f"positions {positions} do not fit {a}"
    )
    _packed(positions)
    require(a.ne[0] % 2 == 0, lambda: f"{a} has an odd row, expected pairs")
    require(
        2 <= dims <= a.ne[0] and dims % 2 == 0, lambda: f"rotates {dims} of {a.ne[0]}, expected an even number within"
    )
    require(base > 0, lambda: f"base is {base}, expected a positive number")
    if factors is not None:
        _f32(factors)
        _packed(factors)
        require(factors.ne[0] >= a.ne[0] // 2, lambda: f"factors {factors}, expected one per pair of {a}")
    return tensor("f32", *a.ne)


def _mask_fits(mask, keys, queries, batches):
    require(mask.type == "f16", lambda: f"found a mask {mask}, expected f16")
    _packed(mask)
    require(
        mask.ne == (keys, queries, 1, batches),
        lambda: f"mask {mask}, expected {keys} keys, {queries} queries, {batches}",
    )


def _flash_attn(q, k, v, mask, *, scale):
    _f32(q)
    _rows_packed(q, k, v)
    require(
        k.type in ("f32", "f16") and v.type == k.type, lambda: f"found keys {k} and values {v}, expected f32 or f16"
    )
    require(k.ne == v.ne and q.ne[0] == k.ne[0] and q.ne[3] == k.ne[3], lambda: f"queries {q} do not fit keys {k}")
    require(q.ne[2] % k.ne[2] == 0, lambda: f"{q.ne[2]} query heads are no multiple of {k.ne[2]} key heads")
    _mask_fits(mask, k.ne[1], q.ne[1], q.ne[3])
    return tensor("f32", v.ne[0], q.ne[2], q.ne[1], q.ne[3])


def _soft_max(a, mask=None, *, scale=1.0):
    _f32(a)
    _packed(a)
    if mask is not None:
        _mask_fits(mask, a.ne[0], a.ne[1], a.ne[3])
    return tensor("f32", *a.ne)


def _geglu(a):
    _f32(a)
    _packed(a)
    require(a.ne[0] % 2 == 0, lambda: f"{a} has an odd row, expected gate and up")
    return tensor("f32", a.ne[0] // 2, *a.ne[1:])


def _geglu_split(gate, up):
    _f32(gate, up)
    _packed(gate, up)
    require(gate.ne == up.ne, lambda: f"gate {gate} and up {up} differ")
    return tensor("f32", *gate.ne)


def _plain(a):
    require(a.type in PLAIN, lambda: f"found {a}, expected f32, f16, i32 or i64")


def _reshape(a, shape):
    _plain(a)
    _packed(a)
    result = tensor(a.type, *shape)
    require(result.elements == a.elements, lambda: f"{a} has {a.elements} elements, the new shape {result.elements}")
    return result


def _view(a, shape, strides, offset):
    _plain(a)
    _packed(a)
    require(
        strides[0] == 1 and len(strides) == len(shape), lambda: f"strides are {strides}, expected one per axis, 1 first"
    )
    result = Spec(a.type, tensor(a.type, *shape).ne, (*strides, *(strides[-1:] * 4))[:4])
    last = offset + sum((n - 1) * s for n, s in zip(result.ne, result.strides, strict=True))
    require(offset >= 0 and last < a.elements, lambda: f"the view's last element is {last}, {a} has {a.elements}")
    # ggml counts the elements of a view from its offset on, however they overlap.
    require(
        offset + result.elements <= a.elements, lambda: f"the view has {result.elements} elements, {a} has {a.elements}"
    )
    return result


def _permute(a, axes):
    _plain(a)
    require(sorted(axes) == [0, 1, 2, 3], lambda: f"axes are {axes}, expected 0 to 3 in some order")
    ne, strides = [0] * 4, [0] * 4
    for i, axis in enumerate(axes):
        ne[axis], strides[axis] = a.ne[i], a.strides[i]
    return Spec(a.type, tuple(ne), tuple(strides))


def _cont(a):
    require(a.type in ("f32", "f16", "i32"), lambda: f"found {a}, expected f32, f16 or i32")
    return tensor(a.type, *a.ne)


def _cast(a, type):
    require(
        (a.type, type) in {("f32", "i32"), ("i32", "f32"), ("f32", "f16"), ("f16", "f32")}, lambda: f"{a} to {type}"
    )
    _packed(a)
    return tensor(type, *a.ne)


def _cpy(a, target):
    require(a.type == target.type and a.type in ("f32", "i32"), lambda: f"found {a} and {target}, expected one type")
    _packed(a, target)
    require(a.elements == target.elements, lambda: f"{a} and {target} differ in size")
    return target


def _repeat(a, shape):
    _f32(a)
    _packed(a)
    result = tensor("f32", *shape)
    require(all(n % m == 0 for n, m in zip(result.ne, a.ne, strict=True)), lambda: f"{a} does not repeat to {result}")
    return result


def _pad(a, right):
    _f32(a)
    _packed(a)
    require(right >= 0, lambda: f"pads by {right}, expected 0 or more")
    return tensor("f32", a.ne[0] + right, *a.ne[1:])


def _argsort(a, order):
    _f32(a)
    _packed(a)
    return tensor("i32", *a.ne)


def _argsort_top_k(a, k):
    full = _argsort(a, "descending")
    require(0 < k <= a.ne[0], lambda: f"k is {k}, expected 1 to {a.ne[0]}")
    return Spec("i32", (k, *a.ne[1:]), full.strides)


def _top_k(a, k):
    _argsort_top_k(a, k)
    return tensor("i32", k, *a.ne[1:])


def _argmax(a):
    _f32(a)
    _packed(a)
    require(a.ne[2:] == (1, 1), lambda: f"found {a}, expected a matrix")
    return tensor("i32", a.ne[1])


def _sum_rows(a):
    _f32(a)
    _packed(a)
    return tensor("f32", 1, *a.ne[1:])


def _clamp(a, min, max):
    require(min <= max, lambda: f"min is {min} and max {max}")
    return _same(a)


def _scale(a, factor, bias=0.0):
    return _same(a)


def _arange(stop):
    require(0 < stop < 1 << 24, lambda: f"counts to {stop}, expected 1 to {1 << 24}, where float32 is exact")
    return tensor("f32", stop)


# fmt: off
OPS = {
    "get_rows": Op(("rows", "ids"), {}, _get_rows, "the rows with these ids, in f32 (i32 stays i32)"),
    "set_rows": Op(("target", "rows", "ids"), {}, _set_rows, "writes rows into the target; the result is the target"),
    "mul_mat": Op(("a", "b"), {"precision?": ("default", "f32")}, _mul_mat,
                  "every row of b times every row of a; a repeats over b's batches"),
    "mul_mat_id": Op(("experts", "b", "ids"), {}, _mul_mat_id, "mul_mat with the matrices that ids choose, per token"),
    "out_prod": Op(("a", "b"), {}, _out_prod, "the sum over rows r of a's row r times each number of b's row r"),
    "rms_norm": Op(("a",), {"eps": "number"}, _rms_norm, "a / sqrt(mean(a²) + eps), per row"),
    "add": Op(("a", "b"), {}, _binary, "a + b; b repeats"),
    "sub": Op(("a", "b"), {}, _binary, "a − b; b repeats"),
    "mul": Op(("a", "b"), {}, _binary, "a × b; b repeats"),
    "div": Op(("a", "b"), {}, _binary, "a / b; b repeats"),
    "scale": Op(("a",), {"factor": "number", "bias?": "number"}, _scale, "a × factor + bias"),
    "rope": Op(("a", "positions", "factors?"), {"dims": "count", "base": "number", "style": ("neox",)}, _rope,
               "rotates pairs (i, i + dims/2) by position / (base^(2i/dims) × factor)"),
    "flash_attn": Op(("q", "k", "v", "mask"), {"scale": "number"}, _flash_attn,
                     "softmax(scale × kᵀq + mask) v; heads and tokens change places"),
    "soft_max": Op(("a", "mask?"), {"scale?": "number"}, _soft_max, "softmax(scale × a + mask), per row"),
    "geglu": Op(("a",), {}, _geglu, "gelu(first half of a row) × second half; tanh-approximated"),
    "geglu_split": Op(("gate", "up"), {}, _geglu_split, "gelu(gate) × up; tanh-approximated"),
    "reshape": Op(("a",), {"shape": "sizes"}, _reshape, "the same elements in another shape; no copy"),
    "view": Op(("a",), {"shape": "sizes", "strides": "strides", "offset": "count"}, _view, "a part of a; no copy"),
    "permute": Op(("a",), {"axes": "axes"}, _permute, "axis i of a becomes axis axes[i]; no copy"),
    "cont": Op(("a",), {}, _cont, "a contiguous copy"),
    "cast": Op(("a",), {"type": "type"}, _cast, "another type; floats lose their fraction towards zero as i32"),
    "cpy": Op(("a", "target"), {}, _cpy, "writes a into the target; the result is the target"),
    "repeat": Op(("a",), {"shape": "sizes"}, _repeat, "a repeated until it has this shape"),
    "pad": Op(("a",), {"right": "count"}, _pad, "zeros behind every row"),
    "argsort": Op(("a",), {"order": ("ascending", "descending")}, _argsort, "indices that sort each row"),
    "argsort_top_k": Op(("a",), {"k": "count"}, _argsort_top_k, "indices of the k largest, largest first; a view"),
    "top_k": Op(("a",), {"k": "count"}, _top_k, "indices of the k largest, in any order"),
    "argmax": Op(("a",), {}, _argmax, "index of each row's largest"),
    "cumsum": Op(("a",), {}, _same, "running sums of each row"),
    "sum_rows": Op(("a",), {}, _sum_rows, "the sum of each row"),
    "log": Op(("a",), {}, _same, "natural logarithm"),
    "tanh": Op(("a",), {}, _same, "hyperbolic tangent"),
    "silu": Op(("a",), {}, _same, "a / (1 + e^−a)"),
    "step": Op(("a",), {}, _same, "1 where a > 0, else 0"),
    "clamp": Op(("a",), {"min": "number", "max": "number"}, _clamp, "a within min and max; NaN becomes max"),
    "arange": Op((), {"stop": "count"}, _arange, "0, 1, … stop − 1"),
}
# fmt: on
VIEWS = ("reshape", "view", "permute")  # no work, no memory
WRITES = ("set_rows", "cpy")  # the result is the target, changed in place
