"""From placed boxes to SVG text, for a light and a dark page; names are escaped.

Shapes   pixels, x to the right and y down
"""

import re
from html import escape

from .description_form import PHASES
from .draw_boxes import BOXES, LEAVES, clean, shape_text, views_text
from .draw_layout import LEAF, LINE, NAME, PILL, SMALL, leaf_width, pill_width, text_height, text_width
from .graph import DIMS, RUNTIME

SANS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
MARGIN, HEAD = 24, 46  # around a panel's drawing; its title


def svg(d, what, options, panels):
    columns = [[p] for p in panels if p.boxes] or [[]]
    columns[0] += [p for p in panels if not p.boxes]  # a few words, below the first
    width = max(760, MARGIN + sum(MARGIN + max(map(_panel_width, column)) for column in columns))
    title = f"{clean(d['model'].get('name', ''), 80)} · {clean(what)}".removeprefix(" · ")
    decides = {option for nodes in _node_lists(d) for node in nodes for option in node.get("when", {})} - {"pass"}
    says = " · ".join(f"{clean(k)} {clean(v)}" for k, v in options.items() if k in decides)
    legend, y = _legend(d, panels, width, 66)
    height = y + MARGIN + max(sum(_panel_height(p) + MARGIN for p in column) for column in columns)
    body, x = [], MARGIN
    for column in columns:
        w, top = max(map(_panel_width, column)), y
        for panel in column:
            body += _panel(panel, x, top, w)
            top += _panel_height(panel) + MARGIN
        x += w + MARGIN
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img">',
        f"<title>{escape(title)}</title>", f"<style>{_style()}</style>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6.5" markerHeight="6.5" '
        'orient="auto"><path class="arrow" d="M 0 0.8 L 8 4 L 0 7.2 Z"/></marker></defs>',
        f'<rect class="page" width="{width:.0f}" height="{height:.0f}"/>',
        _text(MARGIN, 34, title, "h1"), _text(MARGIN, 54, says, "soft"), *legend, *body, "</svg>", "",
    ])  # fmt: skip


def _node_lists(d):
    phases = [d["phases"][name] for name in PHASES]
    return [part["nodes"] for part in (*d["templates"].values(), *phases) if "nodes" in part]


def _style():
    light = [
        ".page { fill: #fbfbfc } .frame { fill: #ffffff; stroke: #e1e4e9 }",
        "text { fill: #1d232b } .soft, .shape, .pill text { fill: #5d6773 } .pill rect { fill: #eceef1 }",
        ".edge { stroke: #8d97a5 } .arrow { fill: #8d97a5 } .tie { stroke: #b4bcc7 }",
    ]
    dark = [
        ".page { fill: #0e1116 } .frame { fill: #14181e; stroke: #2a303a }",
        "text { fill: #e8ebf0 } .soft, .shape, .pill text { fill: #a3adba } .pill rect { fill: #2a3039 }",
        ".edge { stroke: #6b7684 } .arrow { fill: #6b7684 } .tie { stroke: #4d5763 }",
    ]
    for name, kind in (BOXES | LEAVES).items():
        for rules, (fill, stroke) in ((light, kind.light), (dark, kind.dark)):
            rules.append(f".{name} > .body {{ fill: {fill}; stroke: {stroke} }}")
    return "\n".join([
        f"text {{ font: {LINE}px {SANS} }} .h1 {{ font-size: 19px; font-weight: 600 }}",
        ".h2 { font-size: 15px; font-weight: 600 }",
        f".name {{ font-size: {NAME}px; font-weight: 600 }} .shape, .letter {{ font-family: {MONO} }}",
        ".mid { text-anchor: middle }",
        f".leaf text {{ font-size: {SMALL}px }} .leaf .shape, .pill text {{ font: 9px {MONO} }}",
        ".body { stroke-width: 1.2 } .edge { fill: none; stroke-width: 1.3 } .tie { fill: none; stroke-width: 1 }",
        ".edge:hover { stroke: #e8862e; stroke-width: 3 } .derived > .body, .unknown > .body { stroke-dasharray: 3 2 }",
        *light, "@media (prefers-color-scheme: dark) {", *dark, "}",
    ])  # fmt: skip


def _legend(d, panels, width, y):
    """What colours, forms and letters mean; only those that are here. Returns lines and where they end."""
    boxes = [box for panel in panels for box in panel.boxes]
    leaves = {leaf.kind for box in boxes for leaf in (*box.leaves, *box.results)}
    items = [(name, kind.says, False) for name, kind in BOXES.items() if any(b.kind == name for b in boxes)]
    items += [(name, kind.says, True) for name, kind in LEAVES.items() if name in leaves]
    out, x = [], MARGIN
    if any(r.views for b in boxes for r in b.reads):
        items.append(("pill", "reshape, view, permute: no work", False))
    for name, says, is_leaf in items:
        w = 46 + text_width(says, LINE, wide=0.53)
        if x + w > width - MARGIN:
            x, y = MARGIN, y + 22
        if name == "pill":
            body = f'<rect x="{x}" y="{y + 1}" width="22" height="12" rx="6"/>'
        else:
            form = _form(name, x, y, 22, 14) if is_leaf else _rect(x, y, 22, 14)
            body = f'<path class="body" d="{form}"/>'
        out += [f'<g class="{name}">{body}</g>', _text(x + 28, y + 11, says)]
        x += w
    x, y = MARGIN, y + 26
    shown = [
        s for b in boxes for s in [*b.lines[1:], *(shape_text(i.shape) for i in (*b.leaves, *b.results) if i.shape)]
    ]
    used = {name for text in shown for name in re.findall(r"[A-Za-z_]\w*", text)}
    for name, says in {**DIMS, **RUNTIME}.items():
        if name not in used:
            continue
        value = f" = {d['dims'][name]}" if name in d["dims"] else ""
        w = 26 + text_width(name + value, LINE, mono=True) + text_width(says, LINE, wide=0.53)
        if x + w > width - MARGIN and x > MARGIN:
            x, y = MARGIN, y + 17
        letter = f'<tspan class="letter">{name}{value}</tspan>'
        out.append(f'<text x="{x:.1f}" y="{y + 8}" class="soft">{letter} {escape(says)}</text>')
        x += w
    return out, y + 30


def _panel_width(panel):
    says = max([text_width(s, LINE) for s in panel.says] + [text_width(panel.name, 17)])
    return max(panel.w, says, 120) + 2 * MARGIN


def _panel_height(panel):
    return HEAD + 14 * len(panel.says) + (panel.h + 2 * MARGIN if panel.boxes else 0)


def _panel(panel, x, y, w):
    h = _panel_height(panel)
    out = [
        f'<g class="panel" data-name="{escape(panel.name)}">',
        f'<rect class="frame" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="10"/>',
        _text(x + MARGIN, y + 28, panel.name, "h2"),
        *(_text(x + MARGIN, y + 45 + 14 * i, says, "soft") for i, says in enumerate(panel.says)),
    ]
    dx = x + MARGIN - panel.x0 + (w - 2 * MARGIN - panel.w) / 2
    dy = y + HEAD + 14 * len(panel.says) + MARGIN / 2
    ports = {box: _ports(box, dx) for box in panel.boxes}
    bands = [(top + dy, bottom + dy) for top, bottom in panel.bands]
    for box in panel.boxes:
        out += [_edge(read, box, px, bands, dx) for read, px in ports[box]]
    for box in panel.boxes:
        out += _drawn_box(box, box.x + dx, box.y + dy)
        out += [_pill(read, px, box.y + dy - 9 - PILL) for read, px in ports[box] if read.views]
    return [*out, "</g>"]


def _ports(box, dx):
    """Where on the upper side of a box each read ends, left to right as they come."""
    reads = sorted(box.reads, key=lambda r: r.source.bends.get(box.layer - 1, r.source).x)
    widths = [pill_width(r) + 6 for r in reads]
    at, out = box.x + dx - sum(widths) / 2, []
    for read, w in zip(reads, widths, strict=True):
        out.append((read, at + w / 2))
        at += w
    return out


def _edge(read, box, px, bands, dx):
    source = read.source
    x, y = source.x + dx, bands[source.layer][0] + source.h
    path = [f"M {x:.1f} {y:.1f}"]
    if y < bands[source.layer][1]:
        y = bands[source.layer][1]
        path.append(f"L {x:.1f} {y:.1f}")
    for layer in range(source.layer + 1, box.layer + 1):
        last = layer == box.layer
        to = px if last else source.bends[layer].x + dx
        top, bottom = bands[layer]
        end = top - (9 + PILL if last and read.views else 8 if last else 0)
        half = (y + end) / 2
        path.append(f"C {x:.1f} {half:.1f} {to:.1f} {half:.1f} {to:.1f} {end:.1f}")
        x, y = to, top if last else bottom
        path.append(f"L {x:.1f} {y:.1f}")
    names = escape(clean(source.name)), escape(clean(box.name))
    return (
        f'<path class="edge" d="{" ".join(path)}" marker-end="url(#arrow)" data-from="{names[0]}" '
        f'data-to="{names[1]}"><title>{names[0]} → {names[1]}</title></path>'
    )


def _pill(read, x, y):
    w, text = pill_width(read), clean(shape_text(read.shape), 30)
    return (
        f'<g class="pill" data-name="{escape(" ".join(clean(v["name"]) for v in read.views))}">'
        f"<title>{escape(views_text(read.views))}</title>"
        f'<rect x="{x - w / 2:.1f}" y="{y:.1f}" width="{w:.1f}" height="{PILL}" rx="{PILL / 2}"/>'
        f"{_text(x, y + 10.6, text, 'mid')}</g>"
    )


def _drawn_box(box, x, y):
    w, h = box.w, box.h
    form = _round(x - w / 2, y, w, h) if box.kind == "entry" else _rect(x - w / 2, y, w, h)
    inner = y + (h - text_height(box)) / 2
    out = [
        f'<g class="node {box.kind}" data-name="{escape(clean(box.name))}"><title>{escape(box.title)}</title>',
        f'<path class="body" d="{form}"/>',
        _text(x, inner + 17, clean(box.name, 34), "name mid"),
    ]
    at = inner + 32
    for line in box.lines:
        out.append(_text(x, at, clean(line, 40), "shape mid" if line.startswith("[") else "mid"))
        at += 14
    for row in box.rows:
        form = _rect(x - w / 2 + 10, at - 8, w - 20, 18)
        out += [f'<path class="body" d="{form}"/>', _text(x, at + 4.5, row, "mid")]
        at += 22
    out.append("</g>")
    for leaves, side in ((box.leaves, -1), (box.results, 1)):
        ty = y + (h - len(leaves) * (LEAF + 4) + 4) / 2
        for leaf in leaves:
            out += _drawn_leaf(leaf, x + side * (w / 2 + 12), ty, side, x + side * w / 2)
            ty += LEAF + 4
    return out


def _drawn_leaf(leaf, x, y, side, edge):
    """A leaf whose inner side is at x; `edge` is the side of its box."""
    w = leaf_width(leaf)
    left, middle = (x - w, x - w / 2) if side < 0 else (x, x + w / 2)
    top = 1.5 if leaf.kind == "persistent" else 0  # below the drum's rim
    name = ("? " if leaf.kind == "unknown" else "") + clean(leaf.name, 30)
    lines = [_text(middle, y + top + (12.5 if leaf.shape else 18), name, "mid")]
    if leaf.shape:
        lines.append(_text(middle, y + top + 23.5, clean(shape_text(leaf.shape), 40), "shape mid"))
    return [
        f'<path class="tie" d="M {edge:.1f} {y + LEAF / 2:.1f} L {x:.1f} {y + LEAF / 2:.1f}"/>',
        f'<g class="leaf {leaf.kind}" data-name="{escape(clean(leaf.name))}"><title>{escape(leaf.title)}</title>',
        f'<path class="body" d="{_form(leaf.kind, left, y, w, LEAF)}"/>',
        *lines,
        "</g>",
    ]


def _form(kind, x, y, w, h):
    """The outline of a leaf."""
    match kind:
        case "weight" | "derived":  # corners cut
            return _polygon(x, y, [(5, 0), (w - 5, 0), (w, 5), (w, h - 5), (w - 5, h), (5, h), (0, h - 5), (0, 5)])
        case "persistent":  # a drum
            a, b = x + w, y + h
            return (
                f"M {x:.1f} {y + 2:.1f} C {x:.1f} {y:.1f} {a:.1f} {y:.1f} {a:.1f} {y + 2:.1f} "
                f"L {a:.1f} {b - 2:.1f} C {a:.1f} {b:.1f} {x:.1f} {b:.1f} {x:.1f} {b - 2:.1f} "
                f"L {x:.1f} {y + 2:.1f} C {x:.1f} {y + 4:.1f} {a:.1f} {y + 4:.1f} {a:.1f} {y + 2:.1f}"
            )
        case "input":  # leaning
            return _polygon(x, y, [(6, 0), (w, 0), (w - 6, h), (0, h)])
        case "output":  # pointing away
            return _polygon(x, y, [(0, 0), (w - 8, 0), (w, h / 2), (w - 8, h), (0, h)])
    return _round(x, y, w, h)


def _polygon(x, y, points):
    return "M " + " L ".join(f"{x + a:.1f} {y + b:.1f}" for a, b in points) + " Z"


def _rect(x, y, w, h, r=5.0):
    a, b = x + w, y + h
    return (
        f"M {x + r:.1f} {y:.1f} L {a - r:.1f} {y:.1f} C {a:.1f} {y:.1f} {a:.1f} {y:.1f} {a:.1f} {y + r:.1f} "
        f"L {a:.1f} {b - r:.1f} C {a:.1f} {b:.1f} {a:.1f} {b:.1f} {a - r:.1f} {b:.1f} L {x + r:.1f} {b:.1f} "
        f"C {x:.1f} {b:.1f} {x:.1f} {b:.1f} {x:.1f} {b - r:.1f} L {x:.1f} {y + r:.1f} "
        f"C {x:.1f} {y:.1f} {x:.1f} {y:.1f} {x + r:.1f} {y:.1f} Z"
    )


def _round(x, y, w, h):
    return _rect(x, y, w, h, min(w, h) / 2)


def _text(x, y, text, style=""):
    style = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(text)}</text>'
