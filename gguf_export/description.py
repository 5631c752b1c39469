"""Read a graph description, check its form, and expand a phase into a flat graph with every size known.

Shapes   `ne` order; see ops.Spec
Source   docs/formats.md, "Graph description"

Nothing here trusts the file: a description is somebody's JSON, and what `expand` returns is safe to hand to ggml.
"""

import json
from pathlib import Path
from typing import NamedTuple

from mlx_dgemma.config import read_json
from mlx_dgemma.errors import DgemmaError

from .expressions import evaluate, size
from .graph import FORMAT, KEYS_MULTIPLE, MAJOR, OPTIONS
from .ops import OPS, PLAIN, WRITES, Spec, tensor, trimmed

MAX_LAYERS, MAX_NODES = 1_000, 100_000
PHASES = ("prefill", "denoise", "sample", "commit")
NEXT = "describe the model again with `python -m gguf_export describe`"


class Node(NamedTuple):
    name: str
    op: str
    inputs: tuple[str, ...]
    params: dict  # every expression evaluated
    template: str  # "sliding", "full", or "" outside the layers


class Leaf(NamedTuple):
    """What a graph reads: a weight, a derived table, a persistent tensor, or what the host fills in."""

    name: str
    kind: str  # "weight", "derived", "persistent", "input"
    spec: Spec
    about: dict  # its entry in the description


class Graph(NamedTuple):
    """One phase for one shape."""

    phase: str
    nodes: tuple[Node, ...]
    leaves: dict[str, Leaf]
    specs: dict[str, Spec]  # of nodes and leaves
    outputs: tuple[str, ...]
    names: dict[str, int]  # the sizes it was expanded for

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes if node.op in WRITES)

    def wanted(self, targets) -> tuple[Node, ...]:
        """The nodes that `targets` need, in order."""
        needed, kept = set(targets), []
        for node in reversed(self.nodes):
            if node.name in needed:
                kept.append(node)
                needed.update(node.inputs)
        return tuple(reversed(kept))


def chain(first: Graph, second: Graph) -> Graph:
    """Two phases as one graph: an input of the second that is a node of the first reads that node."""
    made = {node.name for node in first.nodes}
    if twice := sorted(made & {node.name for node in second.nodes}):
        raise DgemmaError(f"description: node {twice[0]} is in {first.phase} and in {second.phase}; {NEXT}")
    for name in made & set(second.leaves):
        if first.specs[name] != second.specs[name]:
            raise DgemmaError(
                f"description: {second.phase} reads {name} as {second.specs[name]}, "
                f"{first.phase} makes {first.specs[name]}; {NEXT}"
            )
    leaves = {name: leaf for name, leaf in second.leaves.items() if name not in made}
    return Graph(
        f"{first.phase}+{second.phase}", first.nodes + second.nodes, first.leaves | leaves,
        {**second.specs, **first.specs}, second.outputs, first.names,
    )  # fmt: skip


class Shape(NamedTuple):
    """Sizes that a host chooses: rows, tokens per row, tokens stored before, and the capacity of either kind."""

    rows: int = 1
    tokens: int = 1
    prefix: int = 0
    slots_sliding: int = KEYS_MULTIPLE
    slots_full: int = KEYS_MULTIPLE


def rounded(n: int) -> int:
    return -(-n // KEYS_MULTIPLE) * KEYS_MULTIPLE


def read_description(path: str | Path) -> dict:
    """A description file, checked for form. Raises DgemmaError."""
    return check_form(read_json(Path(path), "description"), str(path))


def write_description(description: dict, path: str | Path) -> None:
    """One node per line, so that people and diffs can read it."""
    Path(path).write_text(as_text(description), encoding="utf-8")


def as_text(value, indent: int = 0, flat_from: int = 4) -> str:
    """JSON with a line per entry; deeper than `flat_from` levels, or short enough, stays on its line."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value or len(flat) <= 100 - 2 * indent or indent >= flat_from:
        return flat + ("\n" if indent == 0 else "")
    pad, end = "  " * (indent + 1), "  " * indent
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {as_text(v, indent + 1, flat_from)}" for k, v in value.items()]
        opening, closing = "{", "}"
    else:
        items, (opening, closing) = [as_text(v, indent + 1, flat_from) for v in value], "[]"
    text = opening + "\n" + ",\n".join(pad + item for item in items) + "\n" + end + closing
    return text + ("\n" if indent == 0 else "")


def check_form(description: dict, where: str = "description") -> dict:
    """Format, version, sections and every node's op and parameters. Returns the description; raises DgemmaError."""
    form = description.get("format")
    if not isinstance(form, dict) or form.get("name") != FORMAT:
        raise DgemmaError(f'{where}: format is {str(form)[:80]}, expected {{"name": "{FORMAT}"}}; {NEXT}')
    if form.get("major") != MAJOR:
        raise DgemmaError(
            f"{where}: format version {form.get('major')}.{form.get('minor')}, this reader knows {MAJOR}.x; "
            "update dgemma, or " + NEXT
        )
    _Form(description, where).check()
    return description


class _Form:
    """Checks types of everything a reader touches, so that expanding can only fail on what it names."""

    def __init__(self, description, where):
        self.d, self.where = description, where

    def fail(self, problem):
        raise DgemmaError(f"{self.where}: {problem}; {NEXT}")

    def get(self, value, key, kind, what):
        found = value.get(key)
        if not isinstance(found, kind) or isinstance(found, bool):
            self.fail(f"{what} has {key} {str(found)[:60]!r}, expected {kind.__name__}")
        return found

    def check(self):
        d = self.d
        for section in ("model", "dims", "options", "weight_types", "weights", "derived", "persistent", "templates"):
            self.get(d, section, dict, "the description")
        self.get(d["model"], "fingerprint", str, "model")
        for name, value in d["dims"].items():
            if type(value) is not int or not 0 < value < 1 << 32:
                self.fail(f"dims has {name} = {str(value)[:60]}, expected a whole number from 1")
        if d["options"] != OPTIONS:
            self.fail(f"options are {str(d['options'])[:80]}, expected {OPTIONS}")
        for kind, types in d["weight_types"].items():
            if not isinstance(types, list) or not all(isinstance(t, str) for t in types):
                self.fail(f"weight_types has {kind} {str(types)[:60]!r}, expected a list of types")
        for section in ("weights", "derived", "persistent"):
            self.tensors(d[section], section)
        layers = self.get(d, "layers", list, "the description")
        if len(layers) > MAX_LAYERS:
            self.fail(f"{len(layers)} layers, expected at most {MAX_LAYERS}")
        for name, template in d["templates"].items():
            self.template(name, template)
        if unknown := [x for x in layers if not isinstance(x, str) or x not in d["templates"]]:
            self.fail(f"a layer uses template {str(unknown[0])[:60]!r}, expected one of {', '.join(d['templates'])}")
        phases = self.get(d, "phases", dict, "the description")
        for name in PHASES:
            self.phase(name, self.get(phases, name, dict, "phases"), phases)

    def tensors(self, section, what):
        for name, about in section.items():
            if not isinstance(about, dict):
                self.fail(f"{what} has {name} {str(about)[:60]!r}, expected an object")
            self.get(about, "shape", list, f"{what}.{name}")
            self.get(about, "types" if "types" in about else "type", str, f"{what}.{name}")
            self.when(about, f"{what}.{name}")

    def template(self, name, template):
        what = f"template {name}"
        if not isinstance(template, dict):
            self.fail(f"{what} is {str(template)[:60]!r}, expected an object")
        self.get(template, "weight_prefix", str, what)
        for section in ("dims", "inputs", "weights", "persistent"):
            self.get(template, section, dict, what)
        if bad := [v for v in template["inputs"].values() if not isinstance(v, str)]:
            self.fail(f"{what} has input {str(bad[0])[:60]!r}, expected a name")
        self.tensors(template["weights"], f"{what}'s weights")
        self.tensors(template["persistent"], f"{what}'s persistent")
        self.nodes(self.get(template, "nodes", list, what), what, layers=False)

    def phase(self, name, phase, phases):
        what = f"phase {name}"
        sizes = phase.get("sizes", {})
        if not isinstance(sizes, dict):
            self.fail(f"{what} has sizes {str(sizes)[:60]!r}, expected an object")
        if "as" in phase:
            if phase["as"] not in ("prefill",) or "nodes" not in phases.get("prefill", {}):
                self.fail(f"{what} is as {str(phase['as'])[:60]!r}, expected a phase with nodes")
            return
        self.tensors(self.get(phase, "inputs", dict, what), f"{what}'s inputs")
        for entry, about in phase["inputs"].items():
            visible = about.get("visible", {"all": [], "any": []})
            rules = [r for k in ("all", "any") for r in self.get(visible, k, list, f"{what}'s {entry}")] if isinstance(
                visible, dict) else [None]  # fmt: skip
            if not all(isinstance(r, str) for r in rules):
                self.fail(f"{what}'s {entry} has a rule {str(rules)[:60]}, expected texts")
        if not isinstance(phase.get("options"), dict):
            self.fail(f"{what} has options {str(phase.get('options'))[:60]!r}, expected an object")
        self.nodes(self.get(phase, "nodes", list, what), what, layers=True)
        if not all(isinstance(x, str) for x in self.get(phase, "outputs", list, what)):
            self.fail(f"{what} has an output that is no name")

    def when(self, entry, what):
        when = entry.get("when", {})
        if not isinstance(when, dict) or not all(isinstance(v, str) for v in when.values()):
            self.fail(f"{what} has when {str(when)[:60]!r}, expected options and their values")

    def nodes(self, nodes, what, layers):
        if len(nodes) > MAX_NODES:
            self.fail(f"{what} has {len(nodes)} nodes, expected at most {MAX_NODES}")
        for node in nodes:
            if not isinstance(node, dict):
                self.fail(f"{what} has node {str(node)[:60]!r}, expected an object")
            name = self.get(node, "name", str, f"a node of {what}")
            if not 0 < len(name) < 100 or not name.isprintable():
                self.fail(f"{what} has a node named {name[:60]!r}, expected up to 99 printable characters")
            where = f"{what}, node {name}"
            self.when(node, where)
            if layers and "layers" in node:
                self.get(node, "layers", str, where)
                continue
            op = self.get(node, "op", str, where)
            if op not in OPS:
                self.fail(f"{where} has op {op[:60]!r}, which is unknown; known are {', '.join(OPS)}")
            inputs = self.get(node, "inputs", list, where)
            least = sum(not i.endswith("?") for i in OPS[op].inputs)
            if not least <= len(inputs) <= len(OPS[op].inputs) or not all(isinstance(i, str) for i in inputs):
                self.fail(f"{where} has inputs {str(inputs)[:80]}, expected {op}({', '.join(OPS[op].inputs)})")
            self.params(node.get("params", {}), OPS[op].params, where)

    def params(self, params, kinds, where):
        if not isinstance(params, dict):
            self.fail(f"{where} has params {str(params)[:60]!r}, expected an object")
        known = {name.removesuffix("?") for name in kinds}
        missing = [name for name in kinds if not name.endswith("?") and name not in params]
        if missing or set(params) - known:
            self.fail(
                f"{where} has parameters {', '.join(map(str, params))[:80]}, expected {', '.join(kinds) or 'none'}"
            )
        for name, kind in kinds.items():
            name = name.removesuffix("?")
            if name in params and not _is_kind(params[name], kind):
                self.fail(f"{where} has {name} {str(params[name])[:60]!r}, expected {kind}")


def _is_kind(value, kind):
    is_count = type(value) is int or isinstance(value, str)
    match kind:
        case "number":
            return type(value) in (int, float) and abs(value) < 1e38
        case "count":
            return is_count
        case "type":
            return isinstance(value, str) and value in PLAIN
        case "sizes" | "strides":
            return isinstance(value, list) and 1 <= len(value) <= 4 and all(
                type(v) is int or isinstance(v, str) for v in value)  # fmt: skip
        case "axes":
            return isinstance(value, list) and len(value) == 4 and all(type(v) is int for v in value)
        case _:
            return value in kind


def expand(description: dict, phase: str, shape: Shape, options: dict, stored: dict[str, Spec]) -> Graph:
    """A phase as one flat graph.

    options: a value for each of OPTIONS. stored: the file's tensors, as graph_check.stored_specs has them.
    Raises DgemmaError that names the node: an unknown name, a cycle, shapes that do not fit.
    """
    return _Expansion(description, phase, shape, options, stored).graph()


class _Expansion:
    def __init__(self, description, phase, shape, options, stored):
        self.d, self.phase, self.stored = description, phase, stored
        entry = description["phases"][phase]
        self.entry = {**description["phases"][entry["as"]], **entry} if "as" in entry else entry
        self.options = {**options, **self.entry["options"]}
        self.names = self._names(shape)
        self.nodes, self.leaves, self.specs = [], {}, {}

    def graph(self):
        scope = _Scope(self, "", self.d["weights"], self.d["persistent"], self.entry["inputs"], {}, self.names)
        for raw in self._chosen(self.entry["nodes"]):
            if "layers" in raw:
                self.layers(raw, scope)
            else:
                self.node(raw, scope)
        for name in self.entry["outputs"]:
            if name not in self.specs or name in self.leaves:
                raise self.problem(f"output {name} is no node")
        return Graph(self.phase, tuple(self.nodes), self.leaves, self.specs, tuple(self.entry["outputs"]), self.names)

    def _names(self, shape):
        names = dict(self.d["dims"])
        T = size(self.entry["sizes"]["T"], names) if "T" in self.entry.get("sizes", {}) else shape.tokens
        reads = rounded(shape.prefix + T)
        names |= {
            "B": shape.rows, "T": T, "M": shape.rows * T, "P": shape.prefix,
            "S_sliding": min(reads, shape.slots_sliding), "S_full": min(reads, shape.slots_full),
            "R_sliding": shape.slots_sliding, "R_full": shape.slots_full,
        }  # fmt: skip
        return names

    def _chosen(self, nodes):
        """Those whose options are on."""
        return [n for n in nodes if self.on(n)]

    def on(self, entry):
        return all(self.options.get(option) == value for option, value in entry.get("when", {}).items())

    def layers(self, raw, outer):
        x = outer.resolve(raw["layers"], raw["name"])
        chosen = {kind: self._chosen(t["nodes"]) for kind, t in self.d["templates"].items()}
        for i, kind in enumerate(self.d["layers"]):
            t = self.d["templates"][kind]
            names = dict(self.names)
            for letter, value in t["dims"].items():
                names[letter] = self.guard(f"template {kind}, {letter}", lambda v=value: size(v, self.names))
            prefix = t["weight_prefix"].replace("{layer}", str(i))
            inputs = {name: outer.name_of(target) for name, target in t["inputs"].items()}
            scope = _Scope(self, prefix, t["weights"], t["persistent"], {}, {**inputs, "x": x}, names, outer, kind)
            for node in chosen[kind]:
                self.node(node, scope)
            x = prefix + "layer_out"
            if x not in self.specs:
                raise self.problem(f"template {kind} has no node layer_out")
        self.specs[raw["name"]] = self.specs[x]
        outer.known[raw["name"]] = x

    def node(self, raw, scope):
        name = scope.prefix + raw["name"]
        if name in self.specs:
            raise self.problem(f"node {name} comes twice, expected once")
        if len(self.nodes) >= MAX_NODES:
            raise self.problem(f"more than {MAX_NODES} nodes")
        inputs = tuple(scope.resolve(i, name) for i in raw["inputs"])
        op = OPS[raw["op"]]

        def infer():
            params = {k: _resolved(v, _kind(op, k), scope.names) for k, v in raw.get("params", {}).items()}
            return params, op.infer(*(self.specs[i] for i in inputs), **params)

        params, spec = self.guard(f"node {name} ({raw['op']})", infer)
        if raw["op"] in WRITES and not self._is_stored(inputs[0 if raw["op"] == "set_rows" else 1]):
            raise self.problem(f"node {name} writes into {inputs[-1]}, expected a persistent tensor")
        self.nodes.append(Node(name, raw["op"], inputs, params, scope.kind))
        self.specs[name] = spec
        scope.known[raw["name"]] = name

    def _is_stored(self, name):
        """Whether a name is a persistent tensor, or a reshape of one."""
        if name in self.leaves:
            return self.leaves[name].kind == "persistent"
        node = next(n for n in reversed(self.nodes) if n.name == name)
        return node.op in ("reshape", *WRITES) and self._is_stored(node.inputs[0 if node.op != "cpy" else 1])

    def leaf(self, name, kind, about, names):
        def make():
            shape = [size(n, names) for n in about["shape"]]
            type = about.get("type")
            if type in OPTIONS:
                type = self.options[type]
            if kind == "weight":
                return self.weight(name, about, shape)
            elif type not in PLAIN:
                raise DgemmaError(f"type is {str(type)[:40]!r}, expected one of {', '.join(PLAIN)}")
            return tensor(type, *shape)

        if kind == "derived" and (about.get("transform") != "transpose" or about.get("from") not in self.stored):
            raise self.problem(
                f"derived {name} is the {about.get('transform')} of {about.get('from')}, expected a transpose"
            )
        if not 1 <= len(about["shape"]) <= 4:
            raise self.problem(f"{kind} {name} has {len(about['shape'])} axes, expected 1 to 4")
        spec = self.guard(f"{kind} {name}", make)
        self.leaves[name] = Leaf(name, kind, spec, about)
        self.specs[name] = spec
        return name

    def weight(self, name, about, shape):
        """The file's own spec, where the description says the same."""
        if name not in self.stored:
            raise DgemmaError("the GGUF holds no such tensor")
        spec = self.stored[name]
        allowed = self.d["weight_types"].get(about.get("types"), [])
        if spec.type not in allowed:
            raise DgemmaError(f"is {spec.type} in the GGUF, expected one of {', '.join(allowed)}")
        if trimmed(spec.ne) != trimmed(tuple(shape)):
            raise DgemmaError(f"is {spec} in the GGUF, the description says {shape}")
        return spec

    def guard(self, what, function):
        try:
            return function()
        except DgemmaError as error:
            raise self.problem(f"{what}: {error}") from None

    def problem(self, text):
        return DgemmaError(f"description, phase {self.phase}: {text}; {NEXT}")


class _Scope:
    """Which names a template or a phase knows: its nodes so far, weights, persistent tensors, inputs."""

    def __init__(self, expansion, prefix, weights, persistent, inputs, known, names, outer=None, kind=""):
        self.e, self.prefix, self.names, self.outer, self.kind = expansion, prefix, names, outer, kind
        self.known = known
        self.sections = {"weight": weights, "persistent": persistent, "input": inputs}
        if outer is None:
            self.sections["derived"] = expansion.d["derived"]

    def resolve(self, name, reader):
        """The flat name of what a node calls `name`."""
        found = self.name_of(name)
        if found is None or found not in self.e.specs:
            raise self.e.problem(
                f"node {reader} reads {name[:60]!r}, which is no earlier node, weight, persistent tensor or input "
                "(nodes stand in the order they are computed; a cycle cannot)"
            )
        return found

    def name_of(self, name):
        if name in self.known:
            return self.known[name]
        for kind, section in self.sections.items():
            if name in section and self.e.on(section[name]):
                flat = self.prefix + name
                return flat if flat in self.e.leaves else self.e.leaf(flat, kind, section[name], self.names)
        return self.outer.name_of(name) if self.outer else None


def _kind(op, name):
    return op.params[name] if name in op.params else op.params[name + "?"]


def _resolved(value, kind, names):
    match kind:
        case "sizes" | "strides":
            return tuple(size(v, names) for v in value)
        case "count":
            found = evaluate(value, names)
            if type(found) is not int:
                raise DgemmaError(f"{value!r} is {found}, expected a whole number")
            return found
        case "axes":
            return tuple(value)
        case "number":
            return float(value)
        case _:
            return value
