"""Whether a graph description has the form that its reader relies on; nothing is expanded yet.

Source   docs/formats.md, "Graph description"

A description is somebody's JSON. Here are the types of all that a reader touches, and what every host gives and takes.
"""

import re

from mlx_dgemma.errors import DgemmaError

from .graph import ARCHITECTURE, FORMAT, MAJOR, OPTIONS
from .ops import OPS, PLAIN

MAX_LAYERS, MAX_NODES, MAX_DEPTH = 1_000, 100_000, 20
PHASES = ("prefill", "denoise", "sample", "commit")
PER_PASS = ("T", "M", "P", "S_sliding", "S_full")  # change while a prefix grows
# What the host gives and takes: phase → name → type and number of elements.
GIVEN = {
    "prefill": {"tokens": ("i32", "M")},
    "denoise": {},
    "sample": {
        "logits": ("f32", "V*M"), "temperature": ("f32", "B"), "entropy_bound": ("f32", 1),
        "uniforms": ("f32", "M"), "renoise": ("f32", "M"), "free": ("f32", "M"),
    },
}  # fmt: skip
RETURNED = {
    "prefill": {"output_norm": ("f32", "H*M")},
    "denoise": {"logits": ("f32", "V*M")},
    "sample": {"draft": ("i32", "M"), "accepted": ("f32", "M"), "entropy": ("f32", "M"), "next_canvas": ("i32", "M")},
}
# Persistent tensors that the host writes when a block begins.
WRITTEN = {
    "canvas": ("i32", "C*B"),
    "sc_shares": ("f32", "V*C*B"),
    "sc_tokens": ("i32", "X*C*B"),
    "sc_weights": ("f32", "X*C*B"),
}
BEGIN = {"exact": ("canvas", "sc_shares"), "top-k": ("canvas", "sc_tokens", "sc_weights")}
NEXT = "describe the model again with `python -m gguf_export describe`"


def check_form(description: dict, where: str = "description") -> dict:
    """Format, version, sections and every node's op and parameters. Returns the description; raises DgemmaError."""
    form = description.get("format") if isinstance(description, dict) else description
    if not isinstance(form, dict) or form.get("name") != FORMAT:
        raise DgemmaError(f'{where}: format is {str(form)[:80]}, expected {{"name": "{FORMAT}"}}; {NEXT}')
    if type(form.get("major")) is not int or form["major"] != MAJOR:
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
        if _depth(d) > MAX_DEPTH:
            self.fail(f"nests deeper than {MAX_DEPTH} levels")
        self.get(d["format"], "minor", int, "format")
        for section in ("model", "dims", "options", "weight_types", "weights", "derived", "persistent", "templates"):
            self.get(d, section, dict, "the description")
        self.get(d["model"], "fingerprint", str, "model")
        if d["model"].get("architecture") != ARCHITECTURE:
            self.fail(f"model has architecture {str(d['model'].get('architecture'))[:60]!r}, expected {ARCHITECTURE!r}")
        if not re.fullmatch(r"\d{1,9}(\.\d{1,9}){1,2}", self.get(d, "ggml_min", str, "the description")):
            self.fail(f"ggml_min is {d['ggml_min'][:60]!r}, expected a version such as 0.25")
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
            self.name(name, what)
            self.get(about, "shape", list, f"{what}.{name}")
            self.get(about, "types" if "types" in about else "type", str, f"{what}.{name}")
            self.when(about, f"{what}.{name}")

    def template(self, name, template):
        what = f"template {name}"
        if not isinstance(template, dict):
            self.fail(f"{what} is {str(template)[:60]!r}, expected an object")
        self.name(self.get(template, "weight_prefix", str, what) or "-", what)
        for section in ("dims", "inputs", "weights", "persistent"):
            self.get(template, section, dict, what)
        if bad := [v for v in template["inputs"].values() if not isinstance(v, str)]:
            self.fail(f"{what} has input {str(bad[0])[:60]!r}, expected a name")
        self.tensors(template["weights"], f"{what}'s weights")
        self.tensors(template["persistent"], f"{what}'s persistent")
        self.nodes(self.get(template, "nodes", list, what), what, layers=False)

    def phase(self, name, phase, phases):
        what = f"phase {name}"
        sizes = {} if name == "prefill" else {"T": "C"}
        if phase.get("sizes", {}) != sizes:
            self.fail(f"{what} has sizes {str(phase.get('sizes'))[:60]}, expected {sizes}")
        if "as" in phase:
            if name != "commit" or phase["as"] != "prefill" or not phase.keys() <= {"says", "as", "sizes"}:
                self.fail(f"{what} is as {str(phase['as'])[:60]!r}; expected that of commit, as prefill and no more")
            return
        self.tensors(self.get(phase, "inputs", dict, what), f"{what}'s inputs")
        for entry, about in phase["inputs"].items():
            if "visible" in about:
                self.rules(self.get(about, "visible", dict, f"{what}'s {entry}"), f"{what}'s {entry}")
        options = self.get(phase, "options", dict, what)
        if options.keys() & OPTIONS or not all(isinstance(v, str) for v in options.values()):
            self.fail(f"{what} has options {str(options)[:60]}, expected no choice of the host's")
        self.nodes(self.get(phase, "nodes", list, what), what, layers=True)
        outputs, returned = self.get(phase, "outputs", list, what), RETURNED["prefill" if name == "commit" else name]
        if not all(isinstance(x, str) for x in outputs) or sorted(outputs) != sorted(returned):
            self.fail(f"{what} has outputs {str(outputs)[:60]}, expected {', '.join(returned)}")

    def rules(self, visible, what):
        rules = [rule for key in ("all", "any") for rule in self.get(visible, key, list, what)]
        if not all(isinstance(rule, str) for rule in rules):
            self.fail(f"{what} has a rule {str(rules)[:60]}, expected texts")

    def name(self, name, what):
        if not 0 < len(name) < 100 or not name.isprintable():
            self.fail(f"{what} has {name[:60]!r}, expected a name of up to 99 printable characters")

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
            self.name(name, what)
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


def _depth(value):
    """How many levels lists and objects nest; no further than MAX_DEPTH."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        level = [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]
        depth += 1
    return depth


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
