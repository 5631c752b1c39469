"""Descriptions that somebody got wrong: each is refused with an error that names the fault, or computed; none crashes.

Hypothesis changes a good description; a worker process (graph_worker.py) checks and runs what comes out. Any exception
but DgemmaError, a death of the worker, or no answer within a minute is a failure.
MUTATIONS=5000 python -m pytest tests/test_graph_mutations.py looks for longer.
"""

import copy
import json
import os
import select
import subprocess
import sys
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_export import describe
from gguf_export.description import read_description
from gguf_export.graph_check import check
from gguf_export.ops import OPS
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.model import open_gguf
from tests.tiny_gguf import make_tiny_gguf

PATIENCE = 60  # seconds
N = int(os.environ.get("MUTATIONS", 200))
MODEL = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "num_experts": 4}
ANYTHING = [
    None, True, False, -1, 0, 1, 2, 3, 7, 16, 17, 255, 2**31, 2**32 - 1, 2**62, 2**63, 10**40, -0.5, 0.5, 1e30, 1e400,
    float("nan"), "", "x", "N*D", "M", "C", "C*B", "V", "P", "T", "M*M*M*M", "k <= q", "pad", "-1", "0", "t // 0",
    "1e9", "f32", "f16", "i32", "i64", "q4_0", "cache_type", "\ud800", "\0", "a" * 10_000, "(" * 150, [], {}, [[]],
    [1], ["M"], ["H", "M"], [1, 1, 1, 1, 1], [0], [-1, 2], {"a": {}}, {"name": "x"},
]  # fmt: skip


class Mutated(dict):
    """A description that prints as what was changed in it."""

    good: dict

    def __repr__(self):
        return "\n" + difference(self.good, self)


class Worker:
    """The process, started anew after a crash."""

    def __init__(self, path):
        self.path, self.process = path, None

    def ask(self, **request) -> dict[str, str]:
        if self.process is None:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115, read when the process has ended
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.graph_worker", self.path],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            )  # fmt: skip
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.close()
            return {"worker": f"no answer within {PATIENCE} seconds"}
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        code = self.process.wait()
        self.errors.seek(0)
        self.process = None
        return {"worker": f"ended with {code}: {self.errors.read()[-3000:].decode(errors='replace')}"}

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(make_tiny_gguf(tmp_path_factory.mktemp("mutations") / "tiny.gguf", **MODEL))


@pytest.fixture(scope="module")
def good(path):
    return describe(path, top_k=8)


@pytest.fixture(scope="module")
def worker(path):
    worker = Worker(path)
    yield worker
    worker.close()


def places(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def pick(draw, among):
    among = list(among)
    return among[draw(st.integers(0, len(among) - 1))] if among else None


def node_lists(d):
    owners = [*d["templates"].values(), *d["phases"].values()]
    return [x["nodes"] for x in owners if isinstance(x, dict) and isinstance(x.get("nodes"), list) and x["nodes"]]


def nodes_of(d, with_key=None):
    found = [n for nodes in node_lists(d) for n in nodes if isinstance(n, dict)]
    return [n for n in found if with_key is None or n.get(with_key)]


def tensors_of(d):
    """Entries of every section that describes tensors."""
    owners = [d, *d["templates"].values(), *d["phases"].values()]
    sections = [x.get(k) for x in owners if isinstance(x, dict) for k in ("weights", "derived", "persistent", "inputs")]
    found = [about for s in sections if isinstance(s, dict) for about in s.values()]
    return [about for about in found if isinstance(about, dict)]


# Each changes the description in place.


def replace_anything(draw, d):
    section = pick(draw, d)
    paths = [(section,), *((section, *p) for p in places(d[section]))] if isinstance(d[section], dict | list) else []
    if path := pick(draw, paths):
        at(d, path[:-1])[path[-1]] = copy.deepcopy(pick(draw, ANYTHING))


def swap_values(draw, d):
    """One value takes the place of another, so that types often fit."""
    paths = list(places(d))
    a, b = pick(draw, paths), pick(draw, paths)
    at(d, a[:-1])[a[-1]] = copy.deepcopy(at(d, b))


def swap_like_values(draw, d):
    """A value under the same key somewhere else: another op, another shape, other inputs."""
    paths = list(places(d))
    a = pick(draw, paths)
    b = pick(draw, [p for p in paths if p[-1] == a[-1]])
    at(d, a[:-1])[a[-1]] = copy.deepcopy(at(d, b))


def delete(draw, d):
    path = pick(draw, places(d))
    del at(d, path[:-1])[path[-1]]


def rename_key(draw, d):
    path = pick(draw, [p for p in places(d) if isinstance(p[-1], str)])
    owner = at(d, path[:-1])
    name = draw(
        st.sampled_from(["canvas", "tokens", "logits", "blk", "P", "k", "x", "", "\ud800", "a\0b", "shape", "C"])
    )
    owner[name] = owner.pop(path[-1])


def move_node(draw, d):
    nodes = pick(draw, node_lists(d))
    if nodes:
        i, j = (draw(st.integers(0, len(nodes) - 1)) for _ in range(2))
        match draw(st.sampled_from(["swap", "copy", "delete", "move"])):
            case "swap":
                nodes[i], nodes[j] = nodes[j], nodes[i]
            case "copy":
                nodes.insert(j, copy.deepcopy(nodes[i]))
            case "delete":
                del nodes[i]
            case "move":
                nodes.insert(j, nodes.pop(i))


def change_op(draw, d):
    if node := pick(draw, nodes_of(d, "op")):
        node["op"] = draw(st.sampled_from(sorted(OPS)))
        if draw(st.booleans()):  # with parameters that fit the operation
            params = [n.get("params") for n in nodes_of(d) if n.get("op") == node["op"]]
            node["params"] = copy.deepcopy(pick(draw, params)) or {}


def change_inputs(draw, d):
    """Another order, another node's name, one more or one less; also a cycle."""
    node = pick(draw, nodes_of(d, "inputs"))
    if node and isinstance(node["inputs"], list) and node["inputs"]:
        inputs = node["inputs"]
        i = draw(st.integers(0, len(inputs) - 1))
        match draw(st.sampled_from(["turn", "other", "more", "less", "self"])):
            case "turn":
                inputs.reverse()
            case "other" | "more" as what:
                name = pick(draw, [n.get("name") for n in nodes_of(d)] + ["canvas", "tokens", "positions", "slots"])
                inputs[i : i + (what == "other")] = [name]
            case "less":
                del inputs[i]
            case "self":
                inputs[i] = node.get("name")


def insert_node(draw, d):
    """A new node between a node and what reads it, of the same name."""
    if nodes := pick(draw, node_lists(d)):
        i = draw(st.integers(0, len(nodes) - 1))
        target = nodes[i]
        if isinstance(target, dict) and isinstance(target.get("name"), str):
            op, params = draw(st.sampled_from([
                ("cast", {"type": "i32"}), ("cast", {"type": "f32"}), ("scale", {"factor": -3.0}), ("cont", {}),
                ("scale", {"factor": 1e30, "bias": -1e30}), ("clamp", {"min": -5.0, "max": 1e9}), ("log", {}),
                ("permute", {"axes": [1, 0, 2, 3]}), ("permute", {"axes": [3, 2, 1, 0]}), ("argmax", {}),
                ("pad", {"right": 1}), ("pad", {"right": 2**31}), ("argsort", {"order": "ascending"}),
                ("repeat", {"shape": ["M", "M"]}), ("sum_rows", {}), ("argsort_top_k", {"k": 1}),
                ("view", {"shape": [1], "strides": [1], "offset": 0}),
                ("view", {"shape": [2, "M"], "strides": [1, 1], "offset": 0}),
            ]))  # fmt: skip
            inner = {**target, "name": target["name"] + "_before"}
            outer = {"name": target["name"], "op": op, "inputs": [inner["name"]], "params": params}
            if "when" in target:
                outer["when"] = target["when"]
            nodes[i : i + 1] = [inner, outer]


def change_number(draw, d):
    paths = [p for p in places(d) if type(at(d, p)) in (int, float)]
    if path := pick(draw, paths):
        at(d, path[:-1])[path[-1]] = draw(
            st.one_of(st.integers(-4, 600), st.sampled_from([2**31, 2**40, 2**62, 1e-30, 1e30, -1.0]))
        )


def change_expression(draw, d):
    """Shapes, strides, values, rules, dims: a text becomes another."""
    texts = [(about["shape"], i) for about in tensors_of(d) if isinstance(about.get("shape"), list)
             for i in range(len(about["shape"]))]  # fmt: skip
    for about in tensors_of(d):
        texts += [(about, key) for key in ("value", "slots", "below", "type") if key in about]
        rules = about.get("visible")
        texts += [(r, i) for r in rules.values() if isinstance(r, list) for i in range(len(r))] if isinstance(
            rules, dict) else []  # fmt: skip
    for node in nodes_of(d):
        params = node.get("params")
        if isinstance(params, dict):
            texts += [(params, key) for key in params]
            texts += [(v, i) for v in params.values() if isinstance(v, list) for i in range(len(v))]
    if place := pick(draw, texts):
        owner, key = place
        if isinstance(owner[key], str) and draw(st.booleans()):
            edits = ["{}*2", "{}+1", "{}-1", "{}*0", "({})//2", "-({})", "{}*B", "{} + P", "{} % 3", "{}*100000000"]
            owner[key] = draw(st.sampled_from(edits)).format(owner[key])
        else:
            owner[key] = copy.deepcopy(pick(draw, ANYTHING))


def change_dims(draw, d):
    dims = pick(draw, [d["dims"], *(t["dims"] for t in d["templates"].values())])
    dims[pick(draw, dims)] = draw(
        st.one_of(st.integers(1, 40), st.sampled_from([2**20, 2**32 - 1, "M", "T", "S_full"]))
    )


def change_host(draw, d):
    """What the host fills in or keeps: types, shapes, rules, bounds."""
    owners = [d["persistent"], *(p["inputs"] for p in d["phases"].values() if "inputs" in p)]
    owners += [t["persistent"] for t in d["templates"].values()]
    entry = pick(draw, pick(draw, owners).values())
    key = draw(st.sampled_from(["type", "shape", "value", "below", "visible", "slots", "when"]))
    match key:
        case "type":
            entry[key] = draw(st.sampled_from(["f32", "f16", "i32", "i64", "cache_type"]))
        case "shape":
            sizes = st.sampled_from(["M", "C*B", "V", "X", "T", "B", 1, 2, "S_full", "R_full", "R_full*B", 2**33])
            entry[key] = draw(st.lists(sizes, min_size=1, max_size=4))
        case "value":
            names = st.sampled_from(["P", "t", "b", "pad", "V", "R_full", "T", "B", "1", "-7", "2", "99999999999"])
            entry[key] = f" {draw(st.sampled_from('+-*/%'))} ".join(draw(st.lists(names, min_size=1, max_size=4)))
            entry[key] = entry[key].replace("/", "//")
        case "below":
            entry[key] = draw(st.sampled_from(["V", "2*V", "R_full*B*2", 1, 2**40, "P", "M"]))
        case "visible":
            rule = st.sampled_from(
                ["k <= q", "k < 0", "k", "q % k > 1", "pad", "b > k", "t > 1", "1 > 2", "k == q + P"]
            )
            entry[key] = {"all": draw(st.lists(rule, max_size=3)), "any": draw(st.lists(rule, max_size=3))}
        case "slots":
            entry[key] = draw(st.sampled_from(["R_sliding", "R_full", "P", 0, 1, -1, "B - 5"]))
        case "when":
            entry[key] = draw(
                st.sampled_from([{"attention": "flash"}, {"pass": "encoder"}, {"self_conditioning": "exact"}])
            )
    if not draw(st.integers(0, 3)):
        entry.pop(key)


def change_ids(draw, d):
    """Other numbers arrive where rows are chosen or values sorted."""
    owner = pick(draw, node_lists(d))
    read = [
        n for n in owner if n.get("op") in ("get_rows", "set_rows", "mul_mat_id", "argsort", "argsort_top_k", "cpy")
    ]
    if node := pick(draw, read):
        i, source = owner.index(node), node["inputs"][0 if node["op"] == "cpy" else -1]
        steps = draw(st.lists(st.sampled_from([
            ("cast", {"type": "f32"}), ("cast", {"type": "i32"}), ("scale", {"factor": 2.0}), ("log", {}),
            ("scale", {"factor": 1.0, "bias": -1.0}), ("clamp", {"min": -1.0, "max": 1e6}), ("silu", {}),
            ("clamp", {"min": 0.0, "max": 1.0}), ("mul", {}), ("add", {}), ("cont", {}),
        ]), min_size=1, max_size=4))  # fmt: skip
        if node["op"] not in ("argsort", "argsort_top_k"):
            steps = [("cast", {"type": "f32"}), *steps, ("cast", {"type": "i32"})]
        for j, (op, params) in enumerate(steps):
            inputs = [source] * len(OPS[op].inputs)
            source = f"ids_{j}_{i}"
            owner.insert(i + j, {"name": source, "op": op, "inputs": inputs, "params": params})
        node["inputs"][0 if node["op"] == "cpy" else -1] = source


def rename_everywhere(draw, d):
    """One name takes another, wherever it stands."""
    names = [n["name"] for n in nodes_of(d)] + [k for s in (d["persistent"], d["weights"]) for k in s]
    names += [k for p in d["phases"].values() for k in p.get("inputs", {})]
    old = pick(draw, names)
    new = draw(st.sampled_from([*names, "blk", "blk.0.keys", "blk.²", "x", "P"]))

    def renamed(value):
        if isinstance(value, dict):
            return {new if k == old else k: renamed(v) for k, v in value.items()}
        if isinstance(value, list):
            return [renamed(v) for v in value]
        return new if value == old else value

    for key in ("persistent", "templates", "phases"):
        d[key] = renamed(d[key])


def change_layers(draw, d):
    match draw(st.sampled_from(["drop", "double", "turn", "many", "prefix"])):
        case "drop":
            d["layers"] = d["layers"][:1]
        case "double":
            d["layers"] = d["layers"] * 2
        case "turn":
            d["layers"] = d["layers"][::-1]
        case "many":
            d["layers"] = list(d["layers"][:1]) * draw(st.sampled_from([0, 999, 5_000]))
        case "prefix":
            template = pick(draw, d["templates"].values())
            if isinstance(template, dict):
                template["weight_prefix"] = draw(
                    st.sampled_from(["", "blk.0.", "blk.{layer}", "{layer}{layer}.", "blk"])
                )


MUTATIONS = [
    replace_anything, swap_values, swap_like_values, delete, rename_key, move_node, change_op, change_inputs,
    insert_node, change_number, change_expression, change_layers, change_dims, change_host, change_host, change_host,
    change_ids, change_ids, rename_everywhere,
]  # fmt: skip


@st.composite
def mutated(draw, good):
    d = Mutated(copy.deepcopy(good))
    d.good = good
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        change = draw(st.sampled_from(MUTATIONS))
        try:
            change(draw, d)
        except (
            AttributeError,
            KeyError,
            TypeError,
            IndexError,
            ValueError,
        ):  # an earlier change took away what this one needs
            continue
    if draw(st.integers(0, 20)):
        d["format"], d["options"] = copy.deepcopy(good["format"]), copy.deepcopy(good["options"])
        d["model"] = copy.deepcopy(good["model"])
    return d


def fault(answer):
    """What is wrong with an answer; None where every outcome is "ok" or an error of ours."""
    return next(
        (f"{what}: {text}" for what, text in answer.items() if text != "ok" and not text.startswith("error: ")), None
    )


QUIETLY = settings(
    max_examples=N, deadline=None, database=None, print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)  # fmt: skip


def test_the_good_description_runs(worker, good):
    for attention in ("flash", "exact"):
        for conditioning in ("top-k", "exact"):
            options = {"attention": attention, "self_conditioning": conditioning}
            assert worker.ask(description=good, options=options) == {"check": "ok", "run": "ok"}


def node(d, phase, name):
    return next(n for n in d["phases"][phase]["nodes"] if n["name"] == name)


# What changes the description so that ggml would die, or numpy would raise, if nobody looked; part of the message.
KNOWN = [
    (lambda d: d["dims"].pop("C"), "dims has C = None"),
    (lambda d: d["dims"].update(H=1), "dims has H = 1"),
    (lambda d: d["layers"].append("full"), "3 layers"),
    (lambda d: d["weights"]["rope_freqs.weight"].update(shape=[17]), "the description says [17]"),
    (lambda d: d["templates"]["full"]["inputs"].update(slots="positions"), "its ids are anything"),
    (lambda d: d["phases"]["prefill"]["inputs"]["slots_full"].update(below="2*R_full*B"), "expected 0 to 255"),
    (lambda d: d["phases"]["prefill"]["inputs"]["slots_full"].update(value="P + t - pad - 3"), "gives -3, expected 0"),
    (lambda d: d["phases"]["prefill"]["inputs"]["slots_full"].update(value="t * 2 // (t - t)"), "divide by zero"),
    (lambda d: d["phases"]["prefill"]["inputs"]["mask_full"].update(slots="P - P"), "expected 1 to"),
    (lambda d: d["phases"]["prefill"]["inputs"]["mask_full"]["visible"].update(all=["k"]), "expected a comparison"),
    (lambda d: d["phases"]["prefill"]["inputs"]["positions"].pop("value"), "no rule, expected value or visible"),
    (lambda d: d["phases"]["prefill"].update(outputs=[]), "expected output_norm"),
    (lambda d: d["phases"]["sample"].update(sizes={"T": "2*C"}), "expected {'T': 'C'}"),
    (lambda d: d["phases"]["commit"].update(nodes=[]), "and no more"),
    (lambda d: d["phases"]["prefill"]["nodes"][2].update(name="token_rows"), "comes twice"),
    (lambda d: d["persistent"]["canvas"].pop("below"), "its ids are anything"),
    (lambda d: d["persistent"]["canvas"].update(shape=["M"]), "depends on M"),
    (lambda d: d["persistent"]["canvas"].update(shape=["C", 1, "B", 2]), "expected 16 of i32"),
    (lambda d: d["templates"]["full"]["persistent"]["keys"].update(shape=["D*G", "S", "B"]), "depends on S"),
    (lambda d: node(d, "sample", "next_bounded")["params"].update(max=384.0), "writes 0 to 384, expected 0 to 383"),
    (lambda d: node(d, "sample", "order").update(inputs=["entropy_raw"]), "may be NaN"),
    (lambda d: node(d, "sample", "next_canvas").update(inputs=["next_row", "tokens"]), "reads 'tokens'"),
    (lambda d: d["model"].update(name=[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]), "nests deeper"),
    (lambda d: d["persistent"].update({"\ud800": {}}), "printable"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), KNOWN)
def test_what_would_end_the_process_is_named(path, good, change, message):
    description = copy.deepcopy(good)
    change(description)
    with pytest.raises(DgemmaError) as found:
        check(description, open_gguf(path))
    assert message in str(found.value)


def test_no_mutation_ends_the_process(worker, good):
    counts = {"ok": 0, "error": 0}

    @QUIETLY
    @given(mutated(good), st.sampled_from(["flash", "exact"]), st.sampled_from(["top-k", "exact"]))
    def every(description, attention, conditioning):
        answer = worker.ask(
            description=description, options={"attention": attention, "self_conditioning": conditioning}
        )
        assert not fault(answer), fault(answer)
        counts["ok" if answer["run"] == "ok" else "error"] += 1

    every()
    assert min(counts.values()) > N // 100, counts


def difference(good, bad):
    """The places at which two JSON values differ."""
    if isinstance(good, dict) and isinstance(bad, dict):
        lines = [f".{k}: gone" for k in good if k not in bad] + [f".{k}: {bad[k]}" for k in bad if k not in good]
        inner = [(f".{k}", difference(good[k], bad[k])) for k in good if k in bad]
        return "\n".join(lines + [key + text for key, text in inner if text])
    if type(good) is type(bad) is list and len(good) == len(bad):
        inner = [(f"[{i}]", difference(a, b)) for i, (a, b) in enumerate(zip(good, bad, strict=True))]
        return "\n".join(key + text for key, text in inner if text)
    return "" if repr(good) == repr(bad) else f": {str(good)[:300]} → {str(bad)[:300]}"


@settings(max_examples=N, deadline=None)
@given(data=st.data())
def test_text_that_is_no_description(tmp_path_factory, good, data):
    text = json.dumps(good)
    cut = data.draw(st.integers(0, len(text) - 1))
    middle = data.draw(st.sampled_from(["", "[" * 100_000, "9" * 5_000, "1e999", "\x00", '"', "}", "é", "NaN"]))
    file = tmp_path_factory.getbasetemp() / "description.json"
    file.write_bytes((text[:cut] + middle + text[cut + data.draw(st.integers(0, 50)) :]).encode())
    try:
        read_description(file)
    except DgemmaError as error:
        assert str(file) in str(error)
