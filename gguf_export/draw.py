"""A picture of a graph description: `python -m gguf_export draw`. One SVG text, for people who would rather look.

A description becomes panels of boxes (draw_boxes), these get places (draw_layout), and places become SVG (draw_svg).
"""

from mlx_dgemma.errors import DgemmaError

from .description_form import PHASES, check_form
from .draw_boxes import clean, phase_panel, template_panel
from .draw_layout import lay_out
from .draw_svg import svg

MAX_PANELS = 12
PASSES = ("decoder", "encoder")


def draw(description: dict, what: str = "all", options: dict | None = None) -> str:
    """The SVG of a template ("sliding", "full"), a phase, or everything ("all"). Raises DgemmaError.

    options: values for the description's options and "pass"; others are the first of their list, and "decoder".
    """
    d = check_form(description)
    chosen = _chosen(d, options or {})
    known = {**{name: template_panel for name in d["templates"]}, **{name: phase_panel for name in PHASES}}
    if what != "all" and what not in known:
        raise DgemmaError(f"cannot draw {str(what)[:60]!r}, expected {', '.join(map(clean, known))} or all")
    names = list(dict.fromkeys([*PHASES, *d["templates"]])) if what == "all" else [what]
    if len(names) > MAX_PANELS:
        raise DgemmaError(
            f"{len(d['templates'])} templates, expected at most {MAX_PANELS - len(PHASES)}; draw one of them"
        )
    panels = [known[name](d, name, chosen, brief=what == "all") for name in names]
    for panel in panels:
        lay_out(panel)
    return svg(d, what, chosen, panels)


def _chosen(d, options):
    known = {**d["options"], "pass": PASSES}
    for name, value in options.items():
        if value not in known.get(name, ()):
            allowed = "; ".join(f"{k}: {', '.join(v)}" for k, v in known.items())
            raise DgemmaError(f"option {name} is {value!r}, expected one of {allowed}")
    return {name: values[0] for name, values in known.items()} | options
