"""Expand a phase of a graph description into a flat graph with every size known.

Shapes   `ne` order; see ops.Spec
Source   docs/formats.md, "Graph description"

Nothing here trusts the file: what `expand` returns is safe to hand to ggml.
"""

from mlx_dgemma.errors import DgemmaError

from . import bounds
from .bounds import Bounds
from .description import Graph, Leaf, Node, Shape, rounded
from .description_form import BEGIN, GIVEN, MAX_NODES, NEXT, PER_PASS, RETURNED, WRITTEN
from .expressions import evaluate, size, used_names
from .graph import OPTIONS
from .ops import OPS, PLAIN, WRITES, Spec, tensor, trimmed


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
        # A graph is compiled for many prefixes, so sizes know all names but P.
        self.sizes = {name: value for name, value in self.names.items() if name != "P"}
        self.role = entry.get("as", phase)
        self.nodes, self.leaves, self.specs = [], {}, {}
        self.bounds: dict[str, Bounds] = {}
        self.stored_here = set()  # persistent tensors, their reshapes, and what wrote into them

    def graph(self):
        scope = _Scope(self, "", self.d["weights"], self.d["persistent"], self.entry["inputs"], {}, self.sizes)
        for raw in self._chosen(self.entry["nodes"]):
            if "layers" in raw:
                self.layers(raw, scope)
            else:
                self.node(raw, scope)
        for name in self.entry["outputs"]:
            if name not in self.specs or name in self.leaves:
                raise self.problem(f"output {name} is no node")
            self.guard(f"output {name}", lambda name=name: self.agrees(self.specs[name], *RETURNED[self.role][name]))
            if not self.specs[name].contiguous:
                raise self.problem(f"output {name} is a strided view, expected a contiguous tensor")
        if self.role == "denoise":
            for name in BEGIN[self.options["self_conditioning"]]:
                if name not in self.leaves:
                    raise self.problem(f"persistent {name} is read by no node, expected it to be")
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
            names = dict(self.sizes)
            for letter, value in t["dims"].items():
                names[letter] = self.guard(f"template {kind}, {letter}", lambda v=value: size(v, self.sizes))
            prefix = t["weight_prefix"].replace("{layer}", str(i))
            inputs = {name: outer.name_of(target) for name, target in t["inputs"].items()}
            per_pass = [letter for letter, value in t["dims"].items() if used_names(value) & {*PER_PASS}]
            known = {**inputs, "x": x}
            scope = _Scope(self, prefix, t["weights"], t["persistent"], {}, known, names, outer, kind, per_pass)
            for node in chosen[kind]:
                self.node(node, scope)
            x = prefix + "layer_out"
            if x not in self.specs:
                raise self.problem(f"template {kind} has no node layer_out")
        if raw["name"] in self.specs or raw["name"] in outer.known:
            raise self.problem(f"node {raw['name']} comes twice, expected once")
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
            specs, known = [self.specs[i] for i in inputs], [self.bounds[i] for i in inputs]
            spec = op.infer(*specs, **params)
            bounds.check(raw["op"], specs, known)
            return params, spec, bounds.of_result(raw["op"], params, specs, known)

        params, self.specs[name], self.bounds[name] = self.guard(f"node {name} ({raw['op']})", infer)
        if raw["op"] in ("reshape", *WRITES):
            target = inputs[1 if raw["op"] == "cpy" else 0]
            if target in self.stored_here:
                self.stored_here.add(name)
            elif raw["op"] in WRITES:
                raise self.problem(f"node {name} writes into {target}, expected a persistent tensor")
        self.nodes.append(Node(name, raw["op"], inputs, params, scope.kind))
        scope.known[raw["name"]] = name

    def leaf(self, name, kind, about, scope):
        what = f"{kind} {name}"
        if name in self.specs:
            raise self.problem(f"{what} has the name of a node, expected names that differ")
        if not 1 <= len(about["shape"]) <= 4:
            raise self.problem(f"{what} has {len(about['shape'])} axes, expected 1 to 4")
        spec = self.guard(what, lambda: self.leaf_spec(name, kind, about, scope))
        self.leaves[name], self.specs[name] = Leaf(name, kind, spec, about), spec
        self.bounds[name] = self.guard(what, lambda: self.leaf_bounds(name, kind, about, spec))
        if kind == "persistent":
            self.stored_here.add(name)
        return name

    def leaf_spec(self, name, kind, about, scope):
        if kind == "persistent" and (changing := set().union(*map(used_names, about["shape"])) & scope.per_pass):
            raise DgemmaError(f"its shape depends on {min(changing)}, which changes from pass to pass")
        shape = [size(n, scope.names) for n in about["shape"]]
        if kind == "weight":
            return self.weight(name, about, shape)
        type = about.get("type")
        type = self.options[type] if type in OPTIONS else type
        if type not in PLAIN:
            raise DgemmaError(f"type is {str(type)[:40]!r}, expected one of {', '.join(PLAIN)}")
        spec = tensor(type, *shape)
        if kind == "derived":
            self.check_derived(about, spec)
        elif kind == "input":
            self.check_input(name, about, spec)
        elif name in WRITTEN:
            self.agrees(spec, *WRITTEN[name])
        return spec

    def leaf_bounds(self, name, kind, about, spec):
        """What "below" promises. The host keeps to it, and so does what writes into a persistent tensor."""
        if "below" not in about or kind not in ("persistent", "input"):
            return None
        if spec.type not in ("i32", "i64"):
            raise DgemmaError(f"has below, but is {spec}; expected i32 or i64")
        below = size(about["below"], self.d["dims"] if kind == "persistent" else self.sizes)
        if (name in WRITTEN or name in GIVEN[self.role]) and below < self.d["dims"]["V"]:
            raise DgemmaError(f"is below {below}, expected every token below {self.d['dims']['V']}")
        return 0, below - 1

    def check_derived(self, about, spec):
        source = self.stored.get(str(about.get("from")))
        if about.get("transform") != "transpose" or source is None:
            raise DgemmaError(
                f"is the {about.get('transform')} of {about.get('from')}, expected the transpose of a weight"
            )
        if source.ne[2:] != (1, 1) or spec.ne[:2] != source.ne[1::-1] or spec.ne[2:] != (1, 1):
            raise DgemmaError(f"is {spec}, expected {about['from']} turned, which is {source}")
        if spec.type not in ("f32", "f16"):
            raise DgemmaError(f"is {spec}, expected f32 or f16")

    def check_input(self, name, about, spec):
        given, rules = GIVEN[self.role], [key for key in ("value", "visible") if key in about]
        if name in given and not rules:
            self.agrees(spec, *given[name])
        elif rules == ["value"]:
            self.agrees(spec, spec.type if spec.type != "f16" else "f32, i32 or i64", "M")
        elif rules == ["visible"]:
            T, B = self.names["T"], self.names["B"]
            if spec.type != "f16" or spec.ne[1:] != (T, 1, B):
                raise DgemmaError(f"is {spec}, expected f16[slots, {T}, 1, {B}]")
            size(about.get("slots"), self.names)
        else:
            raise DgemmaError(f"has {' and '.join(rules) or 'no rule'}, expected value or visible; the host gives "
                              f"{', '.join(given) or 'nothing else'}")  # fmt: skip

    def agrees(self, spec, type, count):
        count = size(count, self.sizes)
        if spec.type != type or spec.elements != count:
            raise DgemmaError(f"is {spec}, expected {count} of {type}")

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

    def __init__(self, expansion, prefix, weights, persistent, inputs, known, names, outer=None, kind="", per_pass=()):
        self.e, self.prefix, self.names, self.outer, self.kind = expansion, prefix, names, outer, kind
        self.known, self.per_pass = known, {*PER_PASS, *per_pass}
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
                if flat not in self.e.leaves:
                    return self.e.leaf(flat, kind, section[name], self)
                if self.e.leaves[flat].about is not section[name]:
                    raise self.e.problem(f"{flat} is two tensors, expected names that differ")
                return flat
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
