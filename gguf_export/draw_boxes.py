"""From a graph description to panels of boxes: what a picture shows, before anything has a place.

Shapes   symbolic, `ne` order, as the description spells sizes
Differs  a view is no box but a step on the way from one to the other; what a graph only reads stands beside each reader

Nothing here trusts the file: names are cut to one printable line, what a node reads and nobody makes becomes "unknown".
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from mlx_dgemma.errors import DgemmaError

from .description_form import PHASES
from .expressions import evaluate
from .ops import OPS, VIEWS, WRITES

MAX_BOXES = 400  # in a panel


class Kind(NamedTuple):
    """A class of boxes or leaves: what the legend says, and (fill, stroke) on a light and on a dark page."""

    says: str
    light: tuple[str, str]
    dark: tuple[str, str]
    ops: tuple[str, ...] = ()


# fmt: off
BOXES = {
    "product": Kind("matrix product", ("#dde8ff", "#4571d6"), ("#1c2c50", "#7fa3f7"),
                    ("mul_mat", "mul_mat_id", "out_prod")),
    "attention": Kind("attention, RoPE", ("#ebe0fd", "#8353d8"), ("#33235a", "#b795fb"), ("flash_attn", "rope")),
    "norm": Kind("norm", ("#fdf0cf", "#c4930f"), ("#40320f", "#e3b94f"), ("rms_norm",)),
    "elementwise": Kind("element by element", ("#e2f4e0", "#4c9a4a"), ("#1a371a", "#83cc80"),
                        ("add", "sub", "mul", "div", "scale", "geglu", "geglu_split", "log", "tanh", "silu", "step",
                         "clamp")),
    "rows": Kind("row by row: look up, sum, sort, softmax", ("#d8f3f2", "#279291"), ("#103736", "#62c9c7"),
                 ("get_rows", "soft_max", "argsort", "argsort_top_k", "top_k", "argmax", "cumsum", "sum_rows")),
    "copy": Kind("copy or fill", ("#eef0f3", "#8590a0"), ("#282d36", "#98a3b3"),
                 ("cont", "cast", "repeat", "pad", "arange")),
    "write": Kind("write into a persistent tensor", ("#fee1dc", "#d2503f"), ("#481f1a", "#f08f80"), WRITES),
    "stack": Kind("the layers, drawn as templates", ("#fbe3f1", "#c2468f"), ("#431a34", "#ec8cc5")),
    "entry": Kind("what the layer before made", ("#ffffff", "#5a6472"), ("#12151a", "#aab4c2")),
}
LEAVES = {
    "weight": Kind("weight", ("#ffffff", "#8a7a3c"), ("#17181b", "#cdbb74")),
    "derived": Kind("made from weights", ("#ffffff", "#8a7a3c"), ("#17181b", "#cdbb74")),
    "persistent": Kind("persistent tensor", ("#ffffff", "#d2503f"), ("#17181b", "#f08f80")),
    "input": Kind("host input", ("#ffffff", "#4571d6"), ("#17181b", "#7fa3f7")),
    "output": Kind("result", ("#ffffff", "#5a6472"), ("#17181b", "#aab4c2")),
    "unknown": Kind("made by nobody", ("#ffffff", "#d40000"), ("#17181b", "#ff6b6b")),
}
# What a shape is made of: op → its rule over the inputs' shapes (four sizes each) and the parameters.
SHAPES: dict[str, Callable] = {
    "get_rows": lambda p, rows, ids: [rows[0], *ids[:3]],
    "mul_mat": lambda p, a, b: [a[1], *b[1:]],
    "mul_mat_id": lambda p, a, b, ids: [a[1], ids[0], b[2]],
    "out_prod": lambda p, a, b: [a[0], b[0], *a[2:]],
    "flash_attn": lambda p, q, k, v, mask: [v[0], q[2], q[1], q[3]],
    "geglu": lambda p, a: [a[0][2:] if re.fullmatch(r"2\*\w+", a[0]) else f"({a[0]}) // 2", *a[1:]],
    "permute": lambda p, a: [a[p["axes"].index(i)] for i in range(4)],
    "pad": lambda p, a: [f"{a[0]} + {p['right']}", *a[1:]],
    "argmax": lambda p, a: [a[1]],
    "sum_rows": lambda p, a: ["1", *a[1:]],
    "arange": lambda p: [p["stop"]],
    "cpy": lambda p, a, target: target,
    **dict.fromkeys(("reshape", "view", "repeat"), lambda p, *_: p["shape"]),
    **dict.fromkeys(("argsort_top_k", "top_k"), lambda p, a: [p["k"], *a[1:]]),
}
# fmt: on
KIND_OF = {op: name for name, kind in BOXES.items() for op in kind.ops}


class Leaf(NamedTuple):
    """What a graph reads and does not make, or what it returns."""

    kind: str  # of LEAVES
    name: str
    shape: list[str] | None
    title: str


@dataclass(eq=False)
class Slot:
    """A place in a layer: a box, or the bend of an edge that passes through."""

    index: int
    left: float = 4  # from the line that edges follow to either side
    right: float = 4
    h: float = 0
    layer: int = 0
    x: float = 0
    y: float = 0
    up: list = field(default_factory=list)  # (slot, weight)
    down: list = field(default_factory=list)


class Read(NamedTuple):
    """One input of a box that another box makes."""

    source: "Box"
    views: tuple[dict, ...]  # nodes in between
    shape: list[str] | None


@dataclass(eq=False, kw_only=True)
class Box(Slot):
    name: str
    kind: str  # of BOXES
    lines: list[str]  # below the name
    title: str
    rows: list[str] = field(default_factory=list)  # runs of layers
    reads: list[Read] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    results: list[Leaf] = field(default_factory=list)
    w: float = 0
    bends: dict[int, Slot] = field(default_factory=dict)  # layer → where the edges from here pass it


class Value(NamedTuple):
    """What a name stands for: a box's result or a leaf, seen through views."""

    of: Box | Leaf
    views: tuple[dict, ...]
    shape: list[str] | None


@dataclass
class Panel:
    """One picture: a template or a phase."""

    name: str
    says: list[str]
    sizes: dict  # name → number, or an expression
    boxes: list[Box] = field(default_factory=list)
    bands: list[tuple[float, float]] = field(default_factory=list)  # top and bottom of every layer
    x0: float = 0
    w: float = 0
    h: float = 0


def template_panel(d, name, options, brief):
    t = d["templates"][name]
    phase = _phase_of_pass(d, options["pass"])
    inputs = phase.get("inputs", {})

    def leaf(wanted):
        if wanted in t["inputs"]:
            found = _leaf(d, t["inputs"][wanted], options, {"input": inputs})
            return found._replace(name=wanted, title=f"{wanted} is {found.title}")
        sections = {"weight": {**d["weights"], **t["weights"]}, "persistent": {**d["persistent"], **t["persistent"]}}
        return _leaf(d, wanted, options, {**sections, "input": inputs})

    n = sum(kind == name for kind in d["layers"])
    letters = " · ".join(f"{clean(letter)} = {clean(value)}" for letter, value in t["dims"].items())
    says = [f"{n} of {len(d['layers'])} layers · pass {options['pass']}", clean(letters, 100)]
    panel = Panel(f"template {clean(name)}", says, {**d["dims"], **t["dims"]})
    x = Box(
        0,
        name="x",
        kind="entry",
        lines=[shape_text(["H", "M"])],
        title=f"x {shape_text(['H', 'M'])}\nthe layer's input",
    )
    panel.boxes.append(x)
    outputs = {"layer_out": "next layer"}
    _build(panel, t["nodes"], {"x": Value(x, (), ["H", "M"])}, leaf, options, outputs)
    return panel


def phase_panel(d, name, options, brief):
    phase = d["phases"][name]
    says = [clean(phase.get("says", ""), 120)]
    if "options" in phase:
        says.append(" · ".join(f"{clean(k)} {clean(v)}" for k, v in phase["options"].items()))
    if "as" in phase:
        says.append(f"as {clean(phase['as'])}, where T is C")
        if brief:  # what it is like is in the same picture
            return Panel(f"phase {name}", says, d["dims"])
        phase = {**d["phases"][phase["as"]], **phase}
    options = options | phase["options"]

    def leaf(wanted):
        sections = {"weight": d["weights"], "persistent": d["persistent"], "input": phase["inputs"]}
        return _leaf(d, wanted, options, {**sections, "derived": d["derived"]})

    panel = Panel(f"phase {name}", says, {**d["dims"], **phase.get("sizes", {})})
    _build(panel, phase["nodes"], {}, leaf, options, {o: o for o in phase["outputs"]}, d)
    return panel


def _phase_of_pass(d, value):
    phases = [d["phases"][name] for name in PHASES if "nodes" in d["phases"][name]]
    with_layers = [p for p in phases if any("layers" in n for n in p["nodes"])] or [{}]
    return next((p for p in with_layers if p.get("options", {}).get("pass") == value), with_layers[0])


def _on(entry, options):
    return all(options.get(option) == value for option, value in entry.get("when", {}).items())


def _leaf(d, name, options, sections):
    for kind, section in sections.items():
        if name in section and _on(section[name], options):
            about = section[name]
            shape = _sizes(about["shape"])
            facts = [f"{clean(k)}: {clean(v, 200)}" for k, v in about.items()]
            return Leaf(kind, name, shape, "\n".join([f"{clean(name)} ({LEAVES[kind].says})", *facts]))
    return Leaf("unknown", name, None, f"{clean(name)}\nno node, weight, persistent tensor or input has this name")


def _build(panel, nodes, values, leaf, options, outputs, d=None):
    """Fill the panel. d: the whole description where a node may stand for the layers."""
    for node in (n for n in nodes if _on(n, options)):
        if len(panel.boxes) >= MAX_BOXES:
            raise DgemmaError(f"{panel.name} has more than {MAX_BOXES} nodes, which no picture shows; read the JSON")
        name = node["name"]
        reads, is_stack = [], d is not None and "layers" in node
        for wanted in [node["layers"]] if is_stack else node["inputs"]:
            if wanted not in values:
                found = leaf(wanted)
                values[wanted] = Value(found, (), found.shape)
            reads.append(values[wanted])
        shape = reads[0].shape if is_stack else _result_shape(node, [r.shape for r in reads])
        if not is_stack and node["op"] in VIEWS:
            values[name] = Value(reads[0].of, (*reads[0].views, node), shape)
            continue
        if is_stack:
            box = _stack(d, node, len(panel.boxes), options, leaf)
        else:
            box = _box(node, len(panel.boxes), reads, shape, panel.sizes)
        box.lines += [shape_text(shape)] if shape else []
        for value in reads:
            if isinstance(value.of, Box):
                box.reads.append(Read(value.of, value.views, value.shape))
            else:
                seen = "".join(f"\nread as {shape_text(v.shape)}: " + views_text(v.views) for v in [value] if v.views)
                box.leaves.append(value.of._replace(shape=value.shape, title=value.of.title + seen))
        panel.boxes.append(box)
        values[name] = Value(box, (), shape)
    for name, label in outputs.items():
        if name in values and isinstance(values[name].of, Box):
            of, views, shape = values[name]
            title = f"{clean(name)} {shape_text(shape)}" + (f"\n{views_text(views)}" if views else "")
            of.results.append(Leaf("output", label, shape if views else None, title))


def _box(node, index, reads, shape, sizes):
    op, params = OPS[node["op"]], node.get("params", {})
    kind = KIND_OF[node["op"]]
    first = reads[0].of if reads else None
    if node["op"] == "mul" and isinstance(first, Box) and first.kind == "norm" and isinstance(reads[1].of, Leaf):
        kind = "norm"  # by its weight
    roles = [role.removesuffix("?") for role in op.inputs]
    title = [f"{clean(node['name'])} = {node['op']}", op.says]
    for role, name, value in zip(roles, node["inputs"], reads, strict=False):  # the last ones may be left out
        title.append(f"{role}: {clean(name)} {shape_text(value.shape)}")
    title += [f"{clean(k)}: {clean(v, 200)}" for k, v in params.items()]
    title.append(f"result: {shape_text(shape)}{_numbers(shape, sizes)}")
    if node.get("when"):
        title.append("when " + ", ".join(f"{clean(k)} is {clean(v)}" for k, v in node["when"].items()))
    line = f"{node['op']} {_brief(node['op'], params)}".strip()
    return Box(index, name=node["name"], kind=kind, lines=[line], title="\n".join(title))


def _brief(op, params):
    """The parameters worth a look, in a few characters."""
    p = {k: f"{v:.6g}" if isinstance(v, float) else clean(v, 16) for k, v in params.items()}
    match op:
        case "scale":
            return f"× {p['factor']}" + (f" + {p['bias']}" if "bias" in p else "")
        case "clamp":
            return f"{p['min']} … {p['max']}"
        case "rope":
            return f"base {p['base']}"
        case "rms_norm":
            return f"ε {p['eps']}"
        case "cast":
            return f"to {p['type']}"
        case "pad":
            return f"+ {p['right']}"
        case "argsort_top_k" | "top_k":
            return f"k = {p['k']}"
        case "argsort":
            return p["order"]
        case "mul_mat" if "precision" in p:
            return p["precision"]
    return ""


def _stack(d, node, index, options, leaf):
    """The layers as one box, a row for each run of one kind; runs that repeat stand once."""
    runs = [(kind, sum(1 for _ in group)) for kind, group in groupby(d["layers"])]
    period = next((n for n in range(1, len(runs) // 2 + 1) if runs == runs[:n] * (len(runs) // n)), len(runs) or 1)
    if len(runs[:period]) > 12:  # in no order that a picture could show
        runs = [(kind, d["layers"].count(kind)) for kind in dict.fromkeys(d["layers"])]
        period = len(runs)
    rows = [f"{count} × {clean(kind, 20)}" for kind, count in runs[:period]]
    times = len(runs) // period
    title = [f"{clean(node['name'])}: {len(d['layers'])} layers", ", ".join(rows) + f", {times} times"]
    box = Box(index, name=node["name"], kind="stack", lines=[], title="\n".join(title), rows=rows)
    box.lines = [f"{len(d['layers'])} layers" + (f": {times} × these" if times > 1 else "")]
    for name in _read_by_layers(d, options):
        found = leaf(name)
        if found.kind != "unknown":
            box.leaves.append(found)
    per_layer = {name: a for k in dict.fromkeys(d["layers"]) for name, a in d["templates"][k]["persistent"].items()}
    for name, about in list(per_layer.items())[:8]:
        if _on(about, options):
            shape = _sizes(about["shape"])
            box.leaves.append(Leaf("persistent", name, shape, f"{clean(name)} {shape_text(shape)}\none for each layer"))
    return box


def _read_by_layers(d, options):
    """Names outside the templates that their nodes read, at most 12."""
    names = {}
    for kind in dict.fromkeys(d["layers"]):
        t = d["templates"][kind]
        own = {"x", *t["weights"], *t["persistent"], *(n["name"] for n in t["nodes"])}
        read = dict.fromkeys(i for n in t["nodes"] if _on(n, options) for i in n["inputs"] if i not in own)
        names |= dict.fromkeys(t["inputs"].get(name, name) for name in read)
    return list(names)[:12]


def views_text(views):
    return ", then ".join(
        f"{clean(v['name'])} = {v['op']} " + " ".join(f"{k} {clean(p, 80)}" for k, p in v.get("params", {}).items())
        for v in views
    )


def _sizes(shape):
    """A shape from the file as texts."""
    return [clean(size, 40) for size in shape[:4]]


def _result_shape(node, shapes):
    """What a node makes, or None where that cannot be told."""
    rule = SHAPES.get(node["op"], lambda p, a, *_: a)
    params = {k: _sizes(v) if isinstance(v, list) and k == "shape" else v for k, v in node.get("params", {}).items()}
    try:
        shape = rule(params, *([*s, "1", "1", "1", "1"][:4] for s in shapes))
    except (TypeError, ValueError, IndexError):  # an input of unknown shape, axes that are none
        return None
    shape = [clean(size, 80) for size in shape]
    return shape if all(len(size) <= 60 for size in shape) else None


def shape_text(shape):
    if shape is None:
        return "[?]"
    kept = max((i + 1 for i, size in enumerate(shape) if size != "1"), default=1)
    return f"[{', '.join(shape[:kept])}]"


def _numbers(shape, sizes):
    """The same shape as far as the model fixes it."""
    found = [_number(size, sizes) for size in shape or ()]
    return f" = {shape_text(found)}" if shape and found != shape else ""


def _number(size, sizes):
    try:
        known = {name: value for name, value in sizes.items() if type(value) is int}
        return str(evaluate(int(size) if size.isascii() and size.isdigit() else size, known))
    except DgemmaError:
        return size


def clean(text, limit=60):
    """One line that any XML may hold, no longer than `limit`."""
    text = text if isinstance(text, str) else str(text)
    text = "".join(c if c.isprintable() else "\ufffd" for c in text[: 4 * limit])
    return text if len(text) <= limit else text[: limit // 2] + "…" + text[-(limit // 2 - 1) :]
