"""KL against the size of the weights, one point per model, as PNG or SVG.

Source   matplotlib, which the extra `plot` brings
Differs  a model that equals the reference has a KL of 0, which a logarithmic axis has no place for: it is named below
"""

import importlib.util
import itertools
from math import cos, exp, pi, sin
from pathlib import Path

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.files import check_writable
from mlx_dgemma.units import human_bytes

from .quality_report import HEADLINE, TYPICAL, kl_of

COLOURS = {"MLX": "#0072B2", "GGUF": "#D55E00", "Hugging Face": "#009E73"}  # told apart by all eyes
SUFFIXES = (".png", ".svg")
WORDS = {
    "first": "first pass", "self_conditioned": "self-conditioned pass", TYPICAL: "of the typical instance",
}  # fmt: skip


def check_plot(path: str | Path) -> None:
    """Whether `plot` will be able to write it, before hours of work. Raises DgemmaError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DgemmaError("matplotlib is not installed, which --plot needs; pip install '.[plot]' brings it")
    if Path(path).suffix not in SUFFIXES:
        raise DgemmaError(f"{path}: found {Path(path).suffix or 'no ending'}, expected .png or .svg; name it so")
    check_writable(path)


def plot(report: dict, path: str | Path, pass_: str = HEADLINE) -> list[str]:
    """Write the picture; returns the models that have no place in it. Raises DgemmaError where none has one."""
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = [row for row in report["candidates"] if (kl_of(row, pass_) or {}).get("mean", 0) > 0]
    left_out = [row["model"] for row in report["candidates"] if row not in rows]
    if not rows:
        raise DgemmaError(f"{path}: no model has a KL above 0, expected one at least; add a candidate")
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    biggest = max(row["weights_bytes"] for row in rows)
    unit, name = (1e9, "GB") if biggest >= 1e9 else (1e6, "MB")
    for form, colour in COLOURS.items():
        some = [row for row in rows if row["form"] == form]
        if not some:
            continue
        x, means = [row["weights_bytes"] / unit for row in some], [kl_of(row, pass_)["mean"] for row in some]
        # 95 % intervals of the logarithm: as wide above as below on this axis, and never below 0.
        factors = [exp(1.96 * (kl_of(row, pass_)["se"] or 0) / mean) for row, mean in zip(some, means, strict=True)]
        below = [mean - mean / factor for mean, factor in zip(means, factors, strict=True)]
        above = [mean * factor - mean for mean, factor in zip(means, factors, strict=True)]
        style = {"fmt": "o", "ms": 5, "color": colour, "elinewidth": 0.8, "capsize": 2, "label": form}
        axes.errorbar(x, means, yerr=[below, above], **style)
    axes.margins(x=0.1)
    reference = report["reference"]
    axes.set_xlabel(f"weights, {name}")
    axes.set_ylabel(f"KL(reference || model), nats per corrupted slot, {WORDS[pass_]}")
    axes.set_title(
        f"{_short(reference['model'])}, {human_bytes(reference['weights_bytes'])}: KL of {len(rows)} quantizations, "
        f"95 % intervals", fontsize=11,
    )  # fmt: skip
    axes.grid(True, which="major", color="0.9")
    axes.legend(frameon=False)
    if left_out:
        figure.supxlabel(f"not shown (KL 0, or not measured): {', '.join(map(_short, left_out))}", fontsize=8)
    _label(FigureCanvasAgg(figure), axes, rows, unit, pass_)
    canvas = {".png": FigureCanvasAgg, ".svg": FigureCanvasSVG}[Path(path).suffix](figure)
    try:
        # Without a date and with fixed ids, so that the same figures make the same file.
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": "dgemma", "svg.fonttype": "none"}):
            canvas.figure.savefig(path, dpi=150, metadata={"Date": None} if Path(path).suffix == ".svg" else None)
    except OSError as error:
        raise DgemmaError(f"{path}: cannot be written ({error.strerror}); give a path that can") from None
    return left_out


# Where a name may stand, in points from its point: beside it, then further away with a line between them.
ANGLES = (0.5, -0.5, pi - 0.5, pi + 0.5, 1.2, -1.2, 2, -2)
PLACES = [(r * cos(a), r * sin(a)) for r in (7, 16, 28, 42, 58, 76) for a in ANGLES]
FONT = 8  # points


def _label(canvas, axes, rows, unit, pass_):
    """Names in the colours of their points, each in the first of PLACES where it covers no other name or point."""
    canvas.draw()  # settles where the axes are
    scale = 72 / axes.figure.dpi
    names = _names([row["model"] for row in rows])
    spots = [axes.transData.transform((row["weights_bytes"] / unit, kl_of(row, pass_)["mean"])) * scale for row in rows]
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in spots]
    area = axes.get_window_extent().bounds
    left, bottom, width, height = (number * scale for number in area)
    for row, name, (x, y) in sorted(zip(rows, names, spots, strict=True), key=lambda item: tuple(item[2])):
        wide = 0.58 * FONT * len(name)

        def box(place, x=x, y=y, wide=wide):
            dx, dy = place
            first = x + dx - (wide if dx < 0 else 0)
            return first, y + dy - FONT / 2, first + wide, y + dy + FONT / 2

        def cost(place, box=box):
            a, b, c, d = box(place)
            out = a < left or b < bottom or c > left + width or d > bottom + height
            return out + sum(a < g and e < c and b < h and f < d for e, f, g, h in taken)

        place = min(PLACES, key=cost)  # the first of the best
        taken.append(box(place))
        far = place[0] ** 2 + place[1] ** 2 > 100
        axes.annotate(
            name, (row["weights_bytes"] / unit, kl_of(row, pass_)["mean"]), place, textcoords="offset points",
            fontsize=FONT, color=COLOURS[row["form"]], ha="right" if place[0] < 0 else "left", va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "0.5", "shrinkA": 0, "shrinkB": 2} if far else None,
        ).set_in_layout(False)  # fmt: skip


def _names(models):
    """Without what all of them begin with: build/demo-q4, build/demo-q8 → q4, q8."""
    short = [_short(model) for model in models]
    same = itertools.takewhile(lambda signs: len(set(signs)) == 1, zip(*short, strict=False))
    start = "".join(signs[0] for signs in same) if len(short) > 1 else ""
    start = start[: max(start.rfind(sign) for sign in "-_. ") + 1]
    return [name.removeprefix(start) or name for name in short]


def _short(model: str) -> str:
    """build/demo-q4 → demo-q4; mlx:demo.gguf → demo (mlx)"""
    engine, colon, path = model.rpartition(":")
    return (Path(path).name.removesuffix(".gguf") or path) + (f" ({engine})" if colon else "")
