"""Every operation on ggml's CPU against the oracle, on small random tensors; and what must not reach ggml."""

from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gguf_export import bounds
from gguf_export.description import Graph, Leaf, Node
from gguf_export.devices import cpu, devices, open_ggml
from gguf_export.executor import Executor
from gguf_export.ggml import OPERATIONS
from gguf_export.ggml_graph import BUILD
from gguf_export.graph_numpy import COMPUTE, KINDS, compute
from gguf_export.ops import OPS, Spec, tensor
from mlx_dgemma.errors import DgemmaError

BLOCKS = {"q8_0": 32, "q5_1": 32, "q5_0": 32, "q4_1": 32, "q4_0": 32, "mxfp4": 32}  # what gguf-py can quantize
FLOATS = ("f32", "f16", "bf16")
EXAMPLES = 40


# The tables


def test_three_tables_have_the_same_operations():
    assert OPS.keys() == COMPUTE.keys() == BUILD.keys()


def test_ggml_types_every_function_that_is_built():
    called = set()

    class Recorder:
        def __getattr__(self, name):
            return lambda *arguments: called.add(name) or 1

    values = {"number": 1.0, "count": 1, "sizes": (1,), "strides": (1,), "axes": (0, 1, 2, 3), "type": "i32"}
    for name, op in OPS.items():
        for pick in (0, -1):  # the first and the last of the texts allowed
            params = {p.removesuffix("?"): k[pick] if isinstance(k, tuple) else values[k] for p, k in op.params.items()}
            BUILD[name](Recorder(), None, tensor("f32", 1), *[1] * len(op.inputs), **params)
    assert called == OPERATIONS.keys()


# One operation, drawn


class Operand(NamedTuple):
    """An input: a leaf, and the views that make it what the operation reads."""

    spec: Spec  # the leaf's
    values: np.ndarray  # slowest axis first; quantized ones as the weights they stand for
    views: tuple = ()  # (op, params)
    stored: np.ndarray | None = None  # bytes of a quantized leaf


class Case(NamedTuple):
    operands: list[Operand]
    params: dict
    tolerance: float | np.ndarray = 1e-5  # of the sum of 1 and the value's size; or one for each number of the result


class Draw:
    """Shapes from hypothesis, values from a seed."""

    def __init__(self, data):
        self._data = data
        self.random = np.random.RandomState(self.number(0, 2**16))

    def number(self, low, high):
        return self._data.draw(st.integers(low, high))

    def one_of(self, *among):
        return self._data.draw(st.sampled_from(among))

    def chance(self, one_in):
        return self.number(1, one_in) == one_in

    def ne(self, row=None):
        """Four axes, the later ones often 1."""
        row = row or self.one_of(1, 2, 3, 4, 8, 17, 32, 65)
        return (row, self.number(1, 5), *(self.one_of(1, 1, 2, 3) for _ in range(2)))

    def floats(self, ne, type="f32"):
        return self.random.standard_normal(ne[::-1]).astype(KINDS[type])

    def distinct(self, ne):
        """No two alike, so that sorting has one answer."""
        return self.random.permutation(int(np.prod(ne))).reshape(ne[::-1]).astype(np.float32)

    def operand(self, ne, type="f32", values=None, one_in=3, rows=True) -> Operand:
        """A tensor of this shape: packed, or one time in `one_in` a part of a larger one or a permuted one.

        rows: each row stays contiguous.
        """
        ne = (*ne, 1, 1, 1)[:4]
        values = self.floats(ne, type) if values is None else np.asarray(values, KINDS[type]).reshape(ne[::-1])
        how = self.one_of("view", "permute") if self.chance(one_in) else "packed"
        if how == "permute":
            axes = self.one_of(*([(0, 2, 1, 3), (0, 1, 3, 2), (0, 3, 2, 1)] if rows else [(1, 0, 2, 3), (2, 3, 0, 1)]))
            order = [3 - axes[3 - i] for i in range(4)]  # axis i of the leaf is axis axes[i] of the view
            return Operand(
                tensor(type, *(ne[axis] for axis in axes)),
                np.ascontiguousarray(values.transpose(order)),
                (("permute", {"axes": axes}),),
            )
        if how == "view":
            wide = [n + self.number(0, 2) for n in ne]
            whole = self.floats(wide, type) if values.dtype.kind == "f" else np.zeros(wide[::-1], KINDS[type])
            whole[tuple(slice(n) for n in ne[::-1])] = values
            spec = tensor(type, *wide)
            view = {"shape": ne, "strides": spec.strides, "offset": 0}
            return Operand(spec, whole, (("view", view),))
        return Operand(tensor(type, *ne), values)

    def target(self, ne, type):
        """What is written into: a persistent tensor itself."""
        spec = tensor(type, *ne)
        return Operand(spec, self.floats(spec.ne, type))

    def weights(self, ne, types=(*FLOATS, *BLOCKS)) -> Operand:
        """A matrix of a type that files have; its row is a multiple of the block."""
        type = self.one_of(*types)
        if type in ("f32", "f16"):
            return self.operand(ne, type)
        ne = (ne[0] * BLOCKS.get(type, 1), *ne[1:], 1, 1)[:4]
        number = gguf.GGMLQuantizationType[type.upper()]
        stored = gguf.quantize(self.floats(ne), number)
        return Operand(tensor(type, *ne), gguf.dequantize(stored, number).reshape(ne[::-1]), stored=stored)

    def ids(self, ne, n, one_in=4):
        return self.operand(ne, "i32", self.random.randint(0, n, ne[::-1]), one_in)


def elementwise(low=None, high=None, one_in=6, tolerance=1e-5, **params):
    """An operation of one tensor; most take packed ones only, so few are not."""

    def make(d):
        ne = d.ne()
        values = d.floats(ne) if low is None else d.random.uniform(low, high, ne[::-1])
        return Case([d.operand(ne, values=values, one_in=one_in)], params, tolerance)

    return make


def binary(positive=False):
    def make(d):
        ne = d.ne()
        small = tuple(n if d.chance(2) else 1 for n in ne)
        second = np.abs(d.floats(small)) + 0.1 if positive else d.floats(small)
        return Case([d.operand(ne), d.operand(small, values=second)], {})

    return make


def get_rows(d):
    rows = d.one_of(1, 2, 7)
    batches = d.number(1, 3), d.number(1, 2)
    ne = (d.number(1, 3), rows, *batches)
    table = d.operand(ne, "i32", d.random.randint(-9, 9, ne[::-1])) if d.chance(8) else d.weights(ne)
    return Case([table, d.ids((d.number(1, 5), *batches), rows)], {})


def set_rows(d):
    n, rows, row = d.number(1, 4), d.number(4, 8), d.one_of(1, 4, 9)
    ids, type = d.random.permutation(rows)[:n], d.one_of("i64", "i32")
    return Case(
        [
            d.target((row, rows), d.one_of("f32", "f16")),
            d.operand((row, n), one_in=9),
            Operand(tensor(type, n), ids.astype(KINDS[type])),
        ],
        {},
    )


def product_error(a: Operand, weights, b):
    """How far ggml may be from weights (…, out, in) · b (…, n, in): it rounds b to what suits the weights."""
    size, largest = np.abs(weights), np.abs(b).max(axis=-1, keepdims=True)
    exact = np.abs(b) @ np.swapaxes(size, -1, -2)
    if a.spec.type in FLOATS:
        return {"f32": 1e-5, "f16": 2e-3, "bf16": 1e-2}[a.spec.type] * exact + 1e-5
    return largest / 254 * 1.2 * size.sum(axis=-1)[..., None, :] + 1e-4 * exact + 1e-5


def seen(operand):
    """An operand's values as the operation reads them."""
    a = operand.values
    for op, params in operand.views:
        a = COMPUTE[op](a, **params)
    return a


def mul_mat(d):
    batches = d.number(1, 2), d.number(1, 2)
    a = d.weights((d.number(1, 3), d.number(1, 9), *batches))
    repeats = d.number(1, 3), d.number(1, 2)
    b = d.operand((seen(a).shape[-1], d.one_of(1, 2, 9), batches[0] * repeats[0], batches[1] * repeats[1]))
    weights = np.repeat(np.repeat(seen(a).astype(np.float32), repeats[0], 1), repeats[1], 0)
    return Case([a, b], {"precision": d.one_of("default", "f32")}, product_error(a, weights, seen(b)))


def mul_mat_id(d):
    E, M = d.number(1, 4), d.one_of(1, 2, 9)
    K = d.number(1, E)
    experts = d.weights((d.number(1, 2), d.number(1, 5), E))
    row = seen(experts).shape[-1]
    b = d.operand((row, d.one_of(1, K), M), one_in=9)
    ids = d.ids((K, M), E)
    chosen = seen(experts)[0][seen(ids)[0, 0]]  # (M, K, out, in)
    x = np.broadcast_to(seen(b)[0], (M, K, row))
    error = product_error(experts, chosen.astype(np.float32), x[:, :, None])
    return Case([experts, b, ids], {}, error.reshape(1, M, K, -1))


def out_prod(d):
    a = d.ne()
    return Case([d.operand(a, one_in=9), d.operand((d.number(1, 5), *a[1:]), one_in=9)], {}, 1e-4)


def rope(d):
    row, n = 2 * d.number(1, 9), d.number(1, 5)
    positions = Operand(tensor("i32", n), d.random.randint(-3, 99, (1, 1, 1, n)).astype(np.int32))
    factors = [d.operand((row // 2,), values=d.random.uniform(0.5, 4, row // 2), one_in=9)] if d.chance(2) else []
    params = {"dims": 2 * d.number(1, row // 2), "base": d.one_of(10.0, 1e4, 1e6), "style": "neox"}
    return Case([d.operand((row, d.number(1, 3), n, d.one_of(1, 2)), one_in=9), positions, *factors], params, 2e-4)


def mask(d, keys, queries, batches):
    """0 or −inf, and every query sees a key."""
    visible = d.random.uniform(size=(batches, 1, queries, keys)) < 0.5
    visible[..., 0] = True
    return Operand(tensor("f16", keys, queries, 1, batches), np.where(visible, 0, -np.inf).astype(np.float16))


def flash_attn(d):
    D, T, S, B = d.one_of(1, 8, 33, 64), d.one_of(1, 2, 20, 65), d.one_of(1, 5, 70, 600), d.one_of(1, 1, 2)
    G, type = d.number(1, 2), d.one_of("f32", "f16")
    N = G * d.number(1, 2)
    k, v = (d.operand((D, S, G, B), type) for _ in range(2))
    return Case([d.operand((D, T, N, B)), k, v, mask(d, S, T, B)], {"scale": D**-0.5}, 1e-5 if type == "f32" else 5e-3)


def soft_max(d):
    ne = d.ne()
    masks = [mask(d, ne[0], ne[1], ne[3])] if d.chance(2) else []
    return Case([d.operand(ne, one_in=9), *masks], {"scale": d.one_of(1.0, 0.25, 8.0)})


def geglu(d):
    a = d.operand(d.ne(2 * d.number(1, 20)), one_in=9)
    gate, up = np.split(seen(a), 2, axis=-1)
    return Case([a], {}, 2e-3 * (np.abs(gate) + 1) * (np.abs(up) + 1))  # a float16 table


def geglu_split(d):
    ne = d.ne()
    gate, up = d.operand(ne, one_in=9), d.operand(ne, one_in=9)
    return Case([gate, up], {}, 2e-3 * (np.abs(seen(gate)) + 1) * (np.abs(seen(up)) + 1))


def reshape(d):
    ne = d.ne()
    shape = d.one_of((ne[0] * ne[1], *ne[2:]), ne[::-1], (1, int(np.prod(ne))), (int(np.prod(ne)),))
    return Case([d.operand(ne, d.one_of("f32", "f16", "i32"), one_in=9)], {"shape": shape})


def view(d):
    wide = d.ne()
    ne = tuple(d.number(1, n) for n in wide)
    strides = d.one_of(tensor("f32", *wide).strides, (1, wide[0], wide[0] * wide[1], wide[0]), (1, 1, 1, 1))
    offset = d.number(0, max(0, int(np.prod(wide) - np.prod(ne))))
    axes = d.number(1, 4)
    return Case([d.operand(wide, one_in=9)], {"shape": ne[:axes], "strides": strides[:axes], "offset": offset})


def permute(d):
    return Case([d.operand(d.ne(), d.one_of("f32", "f16", "i32"), rows=d.chance(2))],
                {"axes": d.one_of((0, 2, 1, 3), (1, 0, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1))})  # fmt: skip


def cont(d):
    return Case([d.operand(d.ne(), d.one_of("f32", "f16", "i32"), one_in=1, rows=d.chance(2))], {})


def cast(d):
    ne, (a, b) = d.ne(), d.one_of(("f32", "i32"), ("i32", "f32"), ("f32", "f16"), ("f16", "f32"))
    return Case([d.operand(ne, a, d.random.uniform(-999, 999, ne[::-1]), one_in=9)], {"type": b}, 1e-3)


def cpy(d):
    ne, type = d.ne(), d.one_of("f32", "i32")
    target = (int(np.prod(ne)),) if d.chance(2) else ne
    return Case([d.operand(ne, type, 9 * d.floats(ne), one_in=9), d.target(target, type)], {})


def repeat(d):
    ne = d.ne()
    return Case([d.operand(ne, one_in=9)], {"shape": tuple(n * d.number(1, 3) for n in ne)})


def sort(**params):
    def make(d):
        ne = d.ne()
        return Case([d.operand(ne, values=d.distinct(ne), one_in=9)], {k: v(d, ne) for k, v in params.items()})

    return make


def argmax(d):
    ne = d.ne()[:2]
    return Case([d.operand(ne, values=d.distinct(ne), one_in=9)], {})


CASES = {
    "get_rows": get_rows,
    "set_rows": set_rows,
    "mul_mat": mul_mat,
    "mul_mat_id": mul_mat_id,
    "out_prod": out_prod,
    "rms_norm": elementwise(eps=1e-6),
    "add": binary(),
    "sub": binary(),
    "mul": binary(),
    "div": binary(positive=True),
    "scale": lambda d: elementwise(factor=d.one_of(-1.5, 0.0, 3.0), bias=d.one_of(0.0, 2.0))(d),
    "rope": rope,
    "flash_attn": flash_attn,
    "soft_max": soft_max,
    "geglu": geglu,
    "geglu_split": geglu_split,
    "reshape": reshape,
    "view": view,
    "permute": permute,
    "cont": cont,
    "cast": cast,
    "cpy": cpy,
    "repeat": repeat,
    "pad": lambda d: elementwise(right=d.number(0, 5))(d),
    "argsort": sort(order=lambda d, ne: d.one_of("ascending", "descending")),
    "argsort_top_k": sort(k=lambda d, ne: d.number(1, ne[0])),
    "top_k": sort(k=lambda d, ne: d.number(1, ne[0])),
    "argmax": argmax,
    "cumsum": elementwise(tolerance=1e-4),
    "sum_rows": elementwise(tolerance=1e-4),
    "log": elementwise(0.01, 9),
    "tanh": elementwise(),
    "silu": elementwise(-20, 20),
    "step": elementwise(),
    "clamp": lambda d: elementwise(min=-0.5, max=d.one_of(-0.5, 0.7))(d),
    "arange": lambda d: Case([], {"stop": d.number(1, 99)}),
}


def one_node(op, case) -> Graph:
    """The operands, their views, the operation, and a cont where its result is strided. Raises DgemmaError."""
    leaves, specs, nodes, inputs = {}, {}, [], []

    def add(op, params, *inputs):
        name = f"{op}_{len(nodes)}"
        specs[name] = OPS[op].infer(*(specs[i] for i in inputs), **params)
        nodes.append(Node(name, op, inputs, params, ""))
        return name

    for i, operand in enumerate(case.operands):
        name = f"leaf_{i}"
        leaves[name], specs[name] = Leaf(name, "persistent", operand.spec, {}), operand.spec
        for view, params in operand.views:
            name = add(view, params, name)
        inputs.append(name)
    last = add(op, case.params, *inputs)
    if not specs[last].contiguous:
        last = add("cont", {}, last)
    return Graph("test", tuple(nodes), leaves, specs, (last,), {"T": 1, "S_sliding": 1, "S_full": 1})


@pytest.fixture(scope="module")
def executor():
    library = open_ggml()
    model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=1))
    with Executor(library, model, cpu(devices(library)), None, 2) as executor:
        yield executor


def on_ggml(executor, graph, operands):
    state = executor.new_state(list(graph.leaves.values()))
    for i, operand in enumerate(operands):
        if operand.stored is None:
            state.write(f"leaf_{i}", operand.values)
        else:
            executor.set(state.tensors[f"leaf_{i}"], operand.stored)
    found = executor.compute(state, graph, {}, graph.outputs)[graph.outputs[0]]
    state.close()
    return found


@pytest.mark.parametrize("op", OPS)
def test_ggml_computes_what_the_oracle_does(op, executor):
    count = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def agree(data):
        count["drawn"] += 1
        case = CASES[op](Draw(data))
        try:
            graph = one_node(op, case)
        except DgemmaError:
            assume(False)  # ggml must not see it
        found = on_ggml(executor, graph, case.operands)
        given = {f"leaf_{i}": operand.values.copy() for i, operand in enumerate(case.operands)}
        expected = compute(graph, given)[graph.outputs[0]]
        if op == "top_k":  # in any order
            found, expected = np.sort(found), np.sort(expected)
        error, expected = np.abs(found.astype(np.float64) - expected), expected.astype(np.float64)
        tolerance = case.tolerance
        if not isinstance(tolerance, np.ndarray):
            tolerance = tolerance * (1 + np.abs(expected))
        assert (error <= tolerance).all(), f"differs by {error.max():.3g}: {graph.specs}, {case.params}"
        within_bounds(op, graph, case, found)
        count["computed"] += 1

    agree()
    assert count["computed"] > count["drawn"] / 3, count


def within_bounds(op, graph, case, found):
    """What bounds.py tells of the result, knowing the inputs' least and largest values, is true."""
    known = [(float(x.min()), float(x.max())) if np.isfinite(x).all() else None for x in map(seen, case.operands)]
    node = next(n for n in graph.nodes if n.op == op and (op != "view" or n.params == case.params))
    told = bounds.of_result(op, node.params, [graph.specs[i] for i in node.inputs], known)
    if told is not None and op != "cpy":  # a target's bounds are a promise, not what it holds
        assert told[0] <= found.min() and found.max() <= told[1], (told, found.min(), found.max())


# What must not reach ggml

F, I = (lambda *ne: tensor("f32", *ne)), (lambda *ne: tensor("i32", *ne))  # noqa: E741
H = lambda *ne: tensor("f16", *ne)  # noqa: E731
TURNED = Spec("f32", (3, 4, 1, 1), (4, 1, 12, 12))
ONE = Spec("f32", (1, 4, 1, 1), (4, 1, 4, 4))  # contiguous to ggml_is_contiguous, not to kernels that test nb[0]
FLAT = Spec("f32", (4, 1, 3, 1), (1, 99, 4, 12))  # the same, for kernels that step over all rows by nb[1]
ROPE = {"dims": 4, "base": 1e4, "style": "neox"}
PART = {"shape": (2,), "strides": (1,), "offset": 0}
REFUSED = [
    ("get_rows", [F(4, 5), F(3)], {}, "i32 ids"),
    ("get_rows", [tensor("i64", 4, 5), I(3)], {}, "i32 ids"),
    ("get_rows", [F(4, 5, 2), I(3)], {}, "do not fit the batches"),
    ("get_rows", [TURNED, I(3)], {}, "strided rows"),
    ("set_rows", [I(4, 5), F(4, 2), I(2)], {}, "f32 or f16"),
    ("set_rows", [F(4, 5), F(3, 2), I(2)], {}, "no rows of"),
    ("set_rows", [F(4, 5), F(4, 2), I(3)], {}, "one for each row"),
    ("set_rows", [F(4, 5), F(4, 2), F(2)], {}, "i64 ids"),
    ("set_rows", [F(4, 1), F(4, 2), I(2)], {}, "more rows than"),
    ("mul_mat", [I(4, 5), F(4, 2)], {}, "weights or floats"),
    ("mul_mat", [F(4, 5), H(4, 2)], {}, "expected f32"),
    ("mul_mat", [F(4, 5), F(3, 2)], {}, "differ in length"),
    ("mul_mat", [F(4, 5, 2), F(4, 2, 3)], {}, "does not repeat"),
    ("mul_mat", [TURNED, F(3, 2)], {}, "strided rows"),
    ("mul_mat", [Spec("f32", (4, 5, 1, 1), (1, 2, 20, 20)), F(4, 2)], {}, "transposed"),
    ("mul_mat_id", [F(4, 5, 3), F(4, 1, 2), F(2, 2)], {}, "i32 ids"),
    ("mul_mat_id", [F(4, 5, 3), F(4, 1, 2), I(4, 2)], {}, "more experts"),
    ("mul_mat_id", [F(4, 5, 3), F(4, 2, 2), I(3, 2)], {}, "do not fit"),
    ("mul_mat_id", [F(4, 5, 3, 2), F(4, 1, 2), I(2, 2)], {}, "three axes"),
    ("out_prod", [F(4, 5), F(3, 6)], {}, "differ in rows"),
    ("rms_norm", [F(4)], {"eps": -1.0}, "0 or more"),
    ("rms_norm", [ONE], {"eps": 0.0}, "strided view"),
    ("clamp", [FLAT], {"min": 0.0, "max": 1.0}, "strided view"),
    ("argsort", [FLAT], {"order": "ascending"}, "strided view"),
    ("clamp", [F(4)], {"min": 2.0, "max": 1.0}, "min is 2.0"),
    ("add", [F(4), F(3)], {}, "does not repeat"),
    ("add", [F(4), I(4)], {}, "expected f32"),
    ("mul", [ONE, F(1)], {}, "strided rows"),
    ("rope", [F(8, 2, 3), I(2)], ROPE, "do not fit"),
    ("rope", [F(8, 2, 3), I(3)], {**ROPE, "dims": 0}, "even number within"),
    ("rope", [F(8, 2, 3), I(3)], {**ROPE, "dims": -2}, "even number within"),
    ("rope", [F(8, 2, 3), I(3)], {**ROPE, "dims": 10}, "even number within"),
    ("rope", [F(7, 2, 3), I(3)], ROPE, "odd row"),
    ("rope", [F(8, 2, 3), I(3), F(2)], ROPE, "one per pair"),
    ("rope", [F(8, 2, 3), I(3)], {**ROPE, "base": 0.0}, "positive"),
    ("flash_attn", [F(8, 2, 4), F(8, 6, 2), H(8, 6, 2), H(6, 2)], {"scale": 1.0}, "f32 or f16"),
    ("flash_attn", [F(8, 2, 3), F(8, 6, 2), F(8, 6, 2), H(6, 2)], {"scale": 1.0}, "no multiple"),
    ("flash_attn", [F(8, 2, 4), F(8, 6, 2), F(8, 6, 2), H(5, 2)], {"scale": 1.0}, "mask"),
    ("flash_attn", [F(8, 2, 4), F(8, 6, 2), F(8, 6, 2), F(6, 2)], {"scale": 1.0}, "f16"),
    ("soft_max", [F(6, 2), H(6, 3)], {}, "mask"),
    ("geglu", [F(5, 2)], {}, "odd row"),
    ("geglu_split", [F(5, 2), F(5)], {}, "differ"),
    ("reshape", [F(5, 2)], {"shape": (5, 3)}, "15"),
    ("reshape", [TURNED], {"shape": (12,)}, "strided view"),
    ("view", [F(4, 2)], {**PART, "offset": 7}, "last element is 8"),
    ("view", [F(4, 2)], {**PART, "offset": -1}, "last element"),
    ("view", [F(4, 2)], {**PART, "strides": (2,)}, "1 first"),
    ("view", [F(103)], {"shape": (4, 100), "strides": (1, 1), "offset": 0}, "has 400 elements"),
    ("view", [tensor("q8_0", 32, 2)], PART, "expected f32"),
    ("permute", [F(4, 2)], {"axes": (0, 0, 1, 2)}, "some order"),
    ("permute", [F(4, 2)], {"axes": (0, 1, 2, 4)}, "some order"),
    ("cont", [tensor("i64", 4)], {}, "expected f32, f16 or i32"),
    ("cast", [F(4)], {"type": "i64"}, "to i64"),
    ("cpy", [F(4), I(4)], {}, "one type"),
    ("cpy", [F(4), F(5)], {}, "differ in size"),
    ("repeat", [F(4)], {"shape": (6,)}, "does not repeat"),
    ("pad", [F(4)], {"right": -1}, "0 or more"),
    ("pad", [F(4)], {"right": 2**31}, "an axis of"),
    ("repeat", [F(1)], {"shape": (2**30, 2**30)}, "elements, expected at most"),
    ("argsort_top_k", [F(4)], {"k": 5}, "expected 1 to 4"),
    ("top_k", [F(4)], {"k": 0}, "expected 1 to 4"),
    ("argmax", [F(4, 2, 3)], {}, "matrix"),
    ("arange", [], {"stop": 0}, "counts to 0"),
    ("arange", [], {"stop": 2**24}, "exact"),
]


@pytest.mark.parametrize(("op", "inputs", "params", "message"), REFUSED)
def test_what_ggml_would_die_of_is_refused(op, inputs, params, message):
    with pytest.raises(DgemmaError, match=message):
        OPS[op].infer(*inputs, **params)


def test_a_refusal_is_listed_for_all_that_can_be():
    free = {"sub", "div", "scale", "sum_rows", "cumsum", "log", "tanh", "silu", "step"}  # the same checks as others
    assert {op for op, *_ in REFUSED} | free == OPS.keys()


# Values that ggml would die of

IDS = [
    # op, specs, bounds of the inputs, part of the message; None where it is allowed
    ("get_rows", [F(4, 5), I(2)], [None, (0, 4)], None),
    ("get_rows", [F(4, 5), I(2)], [None, (0, 5)], "0 to 5, expected 0 to 4"),
    ("get_rows", [F(4, 5), I(2)], [None, (-1, 4)], "-1 to 4"),
    ("get_rows", [F(4, 5), I(2)], [None, None], "anything"),
    ("set_rows", [F(4, 5), F(4, 2), I(2)], [None, None, (0, 4)], None),
    ("set_rows", [F(4, 5), F(4, 2), I(2)], [None, None, None], "anything"),
    ("mul_mat_id", [F(4, 5, 3), F(4, 1, 2), I(2, 2)], [None, None, (0, 2)], None),
    ("mul_mat_id", [F(4, 5, 3), F(4, 1, 2), I(2, 2)], [None, None, (0, 3)], "0 to 3, expected 0 to 2"),
    ("argsort", [F(4)], [None], "NaN"),
    ("argsort_top_k", [F(4)], [None], "NaN"),
    ("top_k", [F(4)], [None], None),
    ("cpy", [I(4), I(4)], [(0, 9), (0, 9)], None),
    ("cpy", [I(4), I(4)], [None, (0, 9)], "writes anything, expected 0 to 9"),
    ("cpy", [F(4), F(4)], [None, None], None),
]


@pytest.mark.parametrize(("op", "specs", "known", "message"), IDS)
def test_ids_and_sorts_are_known_to_be_safe(op, specs, known, message):
    if message is None:
        return bounds.check(op, specs, known)
    with pytest.raises(DgemmaError, match=message):
        bounds.check(op, specs, known)


def test_bounds_by_eye():
    of, x = bounds.of_result, F(7, 3)
    assert of("argmax", {}, [x], [None]) == (0, 6)
    assert of("clamp", {"min": 0.0, "max": 383.0}, [x], [None]) == (0, 383)
    assert of("scale", {"factor": -2.0, "bias": 1.0}, [x], [(0, 3)]) == (-5, 1)
    assert of("add", {}, [x, x], [(0, 3), (-1, 1)]) == (-1, 4)
    assert of("sub", {}, [x, x], [(0, 3), (-1, 1)]) == (-1, 4)
    assert of("cast", {"type": "i32"}, [x], [(-1.5, 3.9)]) == (-1, 3)
    assert of("cast", {"type": "i32"}, [x], [(0, 3e9)]) is None
    assert of("add", {}, [x, x], [(0, 2**24), (0, 1)])[1] > 2**24  # float32 may round up
    assert of("scale", {"factor": 1e30}, [x], [(0, 1e30)]) is None
    assert of("tanh", {}, [x], [(0, 1)]) is None
