"""Where the boxes of a panel stand: every box gets a layer, a place in it, and an x.

Shapes   pixels, x to the right and y down
Source   Sugiyama, Tagawa, Toda 1981: layers by longest path, order by barycentres; x by isotonic regression
"""

from bisect import bisect, insort
from itertools import pairwise
from unicodedata import east_asian_width

from mlx_dgemma.errors import DgemmaError

from .draw_boxes import Box, Slot, clean, shape_text

MAX_BENDS = 10_000  # in a panel: it ends in seconds whatever the file says
NAME, LINE, SMALL = 12, 10.5, 9.5  # font sizes
PILL, LEAF, GAP = 15, 30, 26  # heights of a pill and a leaf; least room between neighbours in a layer


def text_width(text, size, mono=False, wide=0.57):
    wide = 0.61 if mono else wide
    return size * sum(1.05 if east_asian_width(c) in "WF" else wide for c in text)


def leaf_width(leaf):
    text = text_width(clean(leaf.name, 30), SMALL)
    return 20 + max(text, text_width(shape_text(leaf.shape), 9, mono=True) if leaf.shape else 0)


def pill_width(read):
    return 14 + text_width(clean(shape_text(read.shape), 30), 9, mono=True) if read.views else 16


def _measure(box):
    text = [text_width(clean(box.name, 34), NAME, mono=True)]  # bold
    text += [text_width(clean(line, 40), LINE, mono=True) for line in [*box.lines, *box.rows]]
    box.w = max(24 + max(text), sum(pill_width(r) + 6 for r in box.reads) + 8, 84)
    sides = [max(map(leaf_width, leaves), default=-12) + 12 for leaves in (box.leaves, box.results)]
    box.left, box.right = (box.w / 2 + side for side in sides)
    tallest = max(len(box.leaves), len(box.results))
    box.h = max(text_height(box), tallest * (LEAF + 4) - 4)


def text_height(box):
    return 25 + 14 * len(box.lines) + 22 * len(box.rows)


def lay_out(panel):
    for box in panel.boxes:
        _measure(box)
    _layer(panel.boxes)
    layers = _with_bends(panel)
    _order(layers)
    _place(layers)
    y = 0.0
    for slots in layers:
        pills = any(r.views for s in slots if isinstance(s, Box) for r in s.reads)
        sideways = max((abs(a.x - s.x) for s in slots for a, _ in s.up), default=0)
        y += (0 if not y else 34) + (12 if pills else 0) + min(sideways / 14, 40)
        bottom = y + max(s.h for s in slots)
        panel.bands.append((y, bottom))
        for slot in slots:
            slot.y = y
        y = bottom
    every = [slot for slots in layers for slot in slots]
    panel.x0 = min((s.x - s.left for s in every), default=0)
    panel.w = max((s.x + s.right for s in every), default=0) - panel.x0
    panel.h = y


def _layer(boxes):
    """Longest path; what needs no box before it goes down to its first reader."""
    readers = {box: [] for box in boxes}
    for box in boxes:
        for read in box.reads:
            readers[read.source].append(box)
        box.layer = max((read.source.layer + 1 for read in box.reads), default=0)
    floating = set()
    for box in boxes:
        if box.kind != "entry" and all(read.source in floating for read in box.reads):
            floating.add(box)
    for box in reversed(boxes):
        if box in floating and readers[box]:
            box.layer = min(reader.layer for reader in readers[box]) - 1


def _with_bends(panel):
    """Layers of slots: a box, or a bend where an edge passes; edges from one box share their bends."""
    layers = [[] for _ in range(1 + max((box.layer for box in panel.boxes), default=-1))]
    bends = 0
    for box in panel.boxes:
        layers[box.layer].append(box)
        for read in box.reads:
            last = read.source
            for layer in range(read.source.layer + 1, box.layer):
                bends += 1
                if bends > MAX_BENDS:
                    raise DgemmaError(
                        f"{panel.name} is too tangled for a picture: over {MAX_BENDS} bends; read the JSON"
                    )
                if layer not in read.source.bends:
                    bend = read.source.bends[layer] = Slot(read.source.index, layer=layer)
                    layers[layer].append(bend)
                    _join(last, bend)
                last = read.source.bends[layer]
            _join(last, box)
    return [slots for slots in layers if slots]


def _join(a, b):
    weight = {0: 8, 1: 3, 2: 1}[isinstance(a, Box) + isinstance(b, Box)]  # long edges want to be straight
    a.down.append((b, weight))
    b.up.append((a, weight))


def _order(layers, sweeps=24):
    """Sort each layer by the mean place of what it reads, then of what reads it, and so on; keep the best."""
    for slots in layers:
        slots.sort(key=lambda s: s.index)
        _number_places(slots)
    best, fewest = [list(slots) for slots in layers], _crossings(layers)
    for sweep in range(sweeps):
        for slots in reversed(layers) if sweep % 2 else layers:
            near = {s: [n.x for n, _ in (s.down if sweep % 2 else s.up)] or [s.x] for s in slots}
            slots.sort(key=lambda s, near=near: sum(near[s]) / len(near[s]))
            _number_places(slots)
        if (found := _crossings(layers)) < fewest:
            best, fewest = [list(slots) for slots in layers], found
    for slots, kept in zip(layers, best, strict=True):
        slots[:] = kept


def _number_places(slots):
    for i, slot in enumerate(slots):
        slot.x = (i + 0.5) / len(slots)


def _crossings(layers):
    total = 0
    for slots in layers:
        seen = []
        for slot in slots:
            ends = [a.x for a, _ in slot.up]
            total += sum(len(seen) - bisect(seen, x) for x in ends)
            for x in ends:
                insort(seen, x)
    return total


def _place(layers, sweeps=40):
    """Where each slot stands: as near to its neighbours as the order allows."""
    for slots in layers:
        at = 0.0
        for a, b in pairwise([None, *slots]):
            at += b.left if a is None else _room(a, b)
            b.x = at
        middle = (slots[0].x + slots[-1].x) / 2
        for slot in slots:
            slot.x -= middle
    for sweep in range(sweeps):
        # First one side at a time, so that all of a layer may move; then both, until it settles.
        sides = [("up",), ("down",)][sweep % 2] if sweep < sweeps // 4 else ("up", "down")
        for slots in reversed(layers) if sweep % 2 else layers:
            _near(slots, lambda s, sides=sides: [n for side in sides for n in getattr(s, side)], _weighted_mean)
    # At last medians, which leave no edge a little slanted; then a chain of boxes comes over its last one.
    for slots in layers:
        _near(slots, lambda s: s.up, _weighted_median)
    for slots in reversed(layers):
        _near(slots, lambda s: s.down if _is_link(s) else [(s, 8)], _weighted_median)


def _is_link(slot):
    return len(slot.down) == 1 and len(slot.down[0][0].up) == 1


def _room(a, b):
    return a.right + b.left + (GAP if isinstance(a, Box) or isinstance(b, Box) else 10)


def _near(slots, neighbours, middle):
    """Each x as near as may be to its neighbours', at least _room apart: pool adjacent violators."""
    groups, shifts = [], [0.0]  # a group moves as one: wishes (x, weight) without the room between its slots, and size
    for a, b in pairwise(slots):
        shifts.append(shifts[-1] + _room(a, b))
    for slot, shift in zip(slots, shifts, strict=True):
        near = neighbours(slot) or [(slot, 0.01)]
        wishes, n = [(other.x - shift, weight) for other, weight in near], 1
        x = middle(wishes, slot.x - shift)
        while groups and groups[-1][0] > x:
            _, more, m = groups.pop()
            wishes, n = more + wishes, m + n
            x = middle(wishes, slot.x - shift)
        groups.append((x, wishes, n))
    found = [x for x, _, n in groups for _ in range(n)]
    for slot, x, shift in zip(slots, found, shifts, strict=True):
        slot.x = x + shift


def _weighted_mean(wishes, _):
    return sum(x * w for x, w in wishes) / sum(w for _, w in wishes)


def _weighted_median(wishes, now):
    """Where half the weight is on either side; of several such places, the one nearest to `now`."""
    half, before, low = sum(w for _, w in wishes) / 2, 0.0, None
    for x, weight in sorted(wishes):
        before += weight
        if low is None and before >= half:
            low = x
        if before > half:
            return min(max(now, low), x)
    return low
