"""The picture of a description: what is in it, what an edge connects, that nothing lies on anything else."""

import copy
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from xml.etree import ElementTree

import pytest

from gguf_export import describe
from gguf_export.description import Shape
from gguf_export.draw import draw
from gguf_export.draw_boxes import BOXES, KIND_OF, LEAVES, MAX_BOXES, SHAPES
from gguf_export.expansion import expand
from gguf_export.expressions import evaluate
from gguf_export.graph_check import stored_specs
from gguf_export.ops import OPS, VIEWS
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.reader import read_gguf
from tests.tiny_gguf import make_tiny_gguf

SVG = "{http://www.w3.org/2000/svg}"
FIRST = {"attention": "flash", "self_conditioning": "top-k", "form": "gpu", "cache_type": "f16", "table_type": "f16"}
LAST = {"attention": "exact", "self_conditioning": "exact", "form": "cpu"}
PICTURES = ("sliding", "full", "prefill", "denoise", "sample", "commit")
HOSTILE = "<script>&\"'</text>"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_tiny_gguf(tmp_path_factory.mktemp("draw") / "t.gguf")


@pytest.fixture
def description(path):
    return json.loads(json.dumps(describe(path)))


def groups(root, style):
    """The <g> of a class, in the panels; the legend has no names."""
    return [g for g in root.iter(f"{SVG}g") if style in g.get("class", "").split() and g.get("data-name")]


def names(root, style):
    return [g.get("data-name") for g in groups(root, style)]


def edges(root):
    return Counter((e.get("data-from"), e.get("data-to")) for e in root.iter(f"{SVG}path") if e.get("data-from"))


def numbers(text):
    return list(map(float, re.findall(r"-?\d+\.?\d*", text)))


def bounds(group):
    """Left, top, right, bottom of a box, a leaf or a pill."""
    shape = next(e for e in group if e.tag in (f"{SVG}path", f"{SVG}rect"))
    if shape.tag == f"{SVG}rect":
        x, y, w, h = (float(shape.get(k)) for k in ("x", "y", "width", "height"))
        return x, y, x + w, y + h
    values = numbers(shape.get("d"))  # M, L and C only: pairs of x and y
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])


def wanted(description, what, options):
    """Names of the boxes and Counter of the edges that the description asks for, views left out."""
    if what in description["templates"]:
        nodes, made = description["templates"][what]["nodes"], {"x": "x"}
        options = {"pass": "decoder", **options}
    else:
        phase = description["phases"]["prefill" if what == "commit" else what]
        nodes, made, options = phase["nodes"], {}, {**options, **phase["options"]}
    found = Counter()
    for node in nodes:
        if any(options[k] != v for k, v in node.get("when", {}).items()):
            continue
        inputs = [node["layers"]] if "layers" in node else node["inputs"]
        if node.get("op") in VIEWS:
            made[node["name"]] = made.get(inputs[0])
            continue
        found.update((made[i], node["name"]) for i in inputs if made.get(i))
        made[node["name"]] = node["name"]
    return {box for box in made.values() if box}, found


def test_a_layer_begins_as_its_nodes_say(description):
    root = ElementTree.fromstring(draw(description, "sliding"))
    assert edges(root)["x", "attn_norm_rms"] == edges(root)["attn_norm", "attn_q"] == 1
    assert edges(root)["attn_q", "attn_q_norm_rms"] == 1  # through the reshape q_heads
    assert "q_heads" in names(root, "pill") and "q_heads" not in names(root, "node")
    assert {"attn_q.weight", "attn_norm.weight"} < set(names(root, "weight"))
    assert sorted(names(root, "persistent")) == ["keys", "values"] and names(root, "output") == ["next layer"]
    assert names(root, "input").count("positions") == 2  # one beside each reader
    assert not names(root, "unknown")


@pytest.mark.parametrize("options", [FIRST, FIRST | LAST], ids=["first", "last"])
@pytest.mark.parametrize("what", PICTURES)
def test_every_node_is_there_once_and_edges_connect_what_they_should(description, what, options):
    root = ElementTree.fromstring(draw(description, what, options))
    nodes, connections = wanted(description, what, options)
    assert Counter(names(root, "node")) == Counter(nodes)
    assert edges(root) == connections
    assert not names(root, "unknown")


def test_the_whole_has_a_panel_for_each_phase_and_template(description):
    root = ElementTree.fromstring(draw(description))
    panels = {g.get("data-name"): g for g in groups(root, "panel")}
    assert list(panels) == [*(f"phase {p}" for p in ("prefill", "commit", "denoise", "sample")),
                            "template sliding", "template full"]  # fmt: skip
    for name, panel in panels.items():
        what = name.split()[1]
        assert set(names(panel, "node")) == (wanted(description, what, FIRST)[0] if what != "commit" else set())
    text = "".join(root.itertext())
    assert "H = 64" in text and "matrix product" in text and "as prefill, where T is C" in text


def test_nothing_lies_on_anything_else(description):
    for what, options in itertools.product(("all", *PICTURES), (FIRST, FIRST | LAST)):
        root = ElementTree.fromstring(draw(description, what, options))
        width, height = float(root.get("width")), float(root.get("height"))
        for panel in groups(root, "panel"):
            things = [(g.get("data-name"), bounds(g)) for s in ("node", "leaf", "pill") for g in groups(panel, s)]
            for name, (left, top, right, bottom) in things:
                assert 0 < left < right < width and 0 < top < bottom < height, f"{what}: {name} is outside"
            for (a, box), (b, other) in itertools.combinations(things, 2):
                apart = box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] + 0.2 or other[3] <= box[1] + 0.2
                assert apart, f"{what}: {a} {box} and {b} {other} overlap"


def test_edges_run_from_lower_to_upper_side_and_round_other_boxes(description):
    for what in PICTURES:
        root = ElementTree.fromstring(draw(description, what))
        boxes = {g.get("data-name"): bounds(g) for g in groups(root, "node")}
        solid = boxes | {f"leaf {i}": bounds(g) for i, g in enumerate(groups(root, "leaf"))}
        for edge in (e for e in root.iter(f"{SVG}path") if e.get("data-from")):
            start, end = edge.get("data-from"), edge.get("data-to")
            points = list(zip(*[iter(numbers(edge.get("d")))] * 2, strict=True))
            assert inside_or_on(points[0], boxes[start]) and points[0][1] == pytest.approx(boxes[start][3], abs=0.2)
            assert inside_or_on(points[-1], boxes[end]) and points[-1][1] == pytest.approx(boxes[end][1], abs=0.2)
            for name, box in solid.items():
                for point in flat(edge.get("d")):
                    assert not inside(point, box), f"{what}: {start} → {end} runs through {name} at {point}"


def inside_or_on(point, box):
    return box[0] - 0.2 <= point[0] <= box[2] + 0.2 and box[1] - 0.2 <= point[1] <= box[3] + 0.2


def inside(point, box):
    return box[0] + 0.5 < point[0] < box[2] - 0.5 and box[1] + 0.5 < point[1] < box[3] - 0.5


def flat(path):
    """Points along a path."""
    at = None
    for command, rest in re.findall(r"([MLC])([^MLC]*)", path):
        p = list(zip(*[iter(numbers(rest))] * 2, strict=True))
        for t in (i / 12 for i in range(1, 13)):
            if command == "L":
                yield tuple(a + (b - a) * t for a, b in zip(at, p[0], strict=True))
            if command == "C":
                weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
                yield tuple(sum(w * q[i] for w, q in zip(weights, (at, *p), strict=True)) for i in (0, 1))
        at = p[-1]


@pytest.mark.parametrize("options", [FIRST, FIRST | LAST], ids=["first", "last"])
def test_the_shapes_are_those_of_the_expanded_graph(path, description, options):
    stored = stored_specs(read_gguf(path))
    C = description["dims"]["C"]
    for what in PICTURES:
        phase = "denoise" if what in description["templates"] else what
        graph = expand(description, phase, Shape(2, C + 3 if phase == "prefill" else C, 5, 512, 768), options, stored)
        prefix, sizes = "", dict(graph.names)
        if what in description["templates"]:
            i = description["layers"].index(what)
            prefix = description["templates"][what]["weight_prefix"].replace("{layer}", str(i))
            sizes |= {k: evaluate(v, sizes) for k, v in description["templates"][what]["dims"].items()}
        for group in groups(ElementTree.fromstring(draw(description, what, options)), "node"):
            title, name = group.find(f"{SVG}title").text, group.get("data-name")
            if found := re.search(r"^result: \[(.*?)\]", title, re.M):
                got = [evaluate(size, sizes) for size in found[1].split(", ")]
                assert (*got, 1, 1, 1)[:4] == graph.specs[prefix + name].ne, f"{what}: {name} {title}"
            else:
                assert name in ("x", "layers_out")


def test_names_are_escaped(description):
    text = json.dumps(description)
    d = json.loads(text.replace('"attn_q"', json.dumps(HOSTILE)).replace('"q_heads"', json.dumps(HOSTILE + "2")))
    d["model"]["name"] = HOSTILE + "\ud800\0"
    d["templates"]["sliding"]["nodes"][5]["inputs"][0] = "\ud800\0]]>"
    d["phases"]["denoise"]["says"] = {"<b>": ["\ud801"] * 1000}
    for what in ("all", "sliding"):
        svg = draw(d, what)
        root = ElementTree.fromstring(svg.encode())
        assert HOSTILE in names(root, "node") and edges(root)["attn_norm", HOSTILE] >= 1
        assert "<script" not in svg and "</text>'" not in svg
    d["templates"][HOSTILE] = copy.deepcopy(d["templates"]["full"])
    assert HOSTILE in draw_text(d, HOSTILE)


def draw_text(description, what):
    return "".join(ElementTree.fromstring(draw(description, what).encode()).itertext())


def test_what_nobody_makes_is_a_question_mark(description):
    node = next(n for n in description["templates"]["full"]["nodes"] if n["name"] == "attn_norm")
    node["inputs"] = ["layer_out", "nothing.weight"]  # the first is made later: no cycle is drawn
    root = ElementTree.fromstring(draw(description, "full"))
    assert names(root, "unknown") == ["layer_out", "nothing.weight"]
    assert ("layer_out", "attn_norm") not in edges(root) and "? nothing.weight" in "".join(root.itertext())


def test_the_same_description_gives_the_same_picture(path, description):
    code = f"from gguf_export import describe; from gguf_export.draw import draw; print(draw(describe({str(path)!r})))"
    pictures = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert pictures == {draw(description).encode() + b"\n"}


@pytest.mark.parametrize(
    "layers, rows",
    [
        ((["sliding"] * 5 + ["full"]) * 5, ["30 layers: 5 × these", "5 × sliding", "1 × full"]),
        (["sliding", "full", "full"], ["3 layers", "1 × sliding", "2 × full"]),
        (["full"] * 2, ["2 layers", "2 × full"]),
        ([kind for i in range(1, 9) for kind in ["sliding"] * i + ["full"]], ["44 layers", "36 × sliding", "8 × full"]),
        ([], ["0 layers"]),
    ],
)
def test_layers_are_one_box_with_a_row_for_each_run(description, layers, rows):
    description["layers"] = layers
    root = ElementTree.fromstring(draw(description, "denoise"))
    (stack,) = (g for g in groups(root, "node") if g.get("data-name") == "layers_out")
    texts = [e.text for e in stack.iter(f"{SVG}text")]
    assert [t for t in texts if not t.startswith("[")] == ["layers_out", *rows]


@pytest.mark.parametrize(
    "what, options, says",
    [
        ("triangular", {}, "cannot draw 'triangular', expected sliding, full, prefill, denoise, sample, commit or all"),
        ("sliding", {"attention": "none"}, "option attention is 'none', expected one of attention: flash, exact"),
        ("sliding", {"color": "red"}, "option color is 'red', expected one of"),
    ],
)
def test_errors_say_what_was_expected(description, what, options, says):
    with pytest.raises(DgemmaError, match=re.escape(says)):
        draw(description, what, options)


def chain(n, *inputs):
    """Nodes that each read the one before, or `inputs`."""
    return [
        {"name": f"n{i}", "op": "add", "inputs": list(inputs) or [f"n{i - 1}" if i else "x", "n0"]} for i in range(n)
    ]


def test_somebodys_large_graph_ends_soon(description):
    t, start = description["templates"]["full"], time.monotonic()
    for nodes, says in ((chain(90_000), f"more than {MAX_BOXES} nodes"), (chain(MAX_BOXES - 1), "too tangled")):
        t["nodes"] = nodes
        with pytest.raises(DgemmaError, match=says):
            draw(description, "full")
    t["nodes"] = chain(MAX_BOXES - 1, "x", "x")
    assert (
        len(ElementTree.fromstring(draw(description, "full")).findall(f".//{SVG}g[@class='node elementwise']")) == 399
    )
    t["nodes"] = chain(100, "x", "x")
    t["nodes"][-1]["params"], t["nodes"][-1]["op"] = {"shape": ["M" * 10_000, "(" * 199]}, "repeat"
    t["nodes"][-1]["inputs"] = ["n0"]
    draw(description, "full")
    t["nodes"] = []
    assert names(ElementTree.fromstring(draw(description, "full")), "node") == ["x"]
    assert time.monotonic() - start < 30


def test_every_operation_has_a_colour_on_either_page():
    assert KIND_OF.keys() | set(VIEWS) == OPS.keys() and SHAPES.keys() < OPS.keys()
    for kind in (*BOXES.values(), *LEAVES.values()):
        for fill, stroke in (kind.light, kind.dark):
            assert abs(brightness(fill) - brightness(stroke)) > 0.15, kind.says
        assert brightness(kind.light[0]) > 0.8 and brightness(kind.dark[0]) < 0.2


def brightness(colour):
    return sum(w * int(colour[i : i + 2], 16) / 255 for w, i in ((0.3, 1), (0.6, 3), (0.1, 5)))


def test_dark_pages_have_rules_of_their_own(description):
    light, dark = draw(description).split("</style>")[0].split("@media (prefers-color-scheme: dark)")
    for name in (*BOXES, *LEAVES):
        rule = rf"\.{name} > \.body {{ fill: #\w+; stroke: #\w+ }}"
        assert re.search(rule, light)[0] != re.search(rule, dark)[0]
