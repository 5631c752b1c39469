"""What the host fills in before a phase: positions, slots and masks, from the rules in the description.

Shapes   B rows, T tokens, S slots read; arrays are slowest axis first, so a mask is (B, 1, T, S)
Source   the description's "value" and "visible"; docs/formats.md says what their letters mean
"""

import numpy as np

from mlx_dgemma.errors import DgemmaError

from .description import Graph, Leaf
from .expressions import evaluate, size
from .graph_numpy import KINDS


def layer_inputs(graph: Graph, padding: np.ndarray) -> dict[str, np.ndarray]:
    """Every input of the graph that follows from sizes alone. padding (B,): pad tokens at the left of each row."""
    leaves = [leaf for leaf in graph.leaves.values() if leaf.kind == "input"]
    numbers = {leaf.name: _numbers(leaf, graph.names, padding) for leaf in leaves if "value" in leaf.about}
    masks = {leaf.name: _mask(leaf, graph.names, padding) for leaf in leaves if "visible" in leaf.about}
    return numbers | masks


def _numbers(leaf: Leaf, names, padding):
    """One number per token, below what the input says. (M,)"""
    B, T = names["B"], names["T"]
    letters = {**names, "t": np.arange(T)[None], "b": np.arange(B)[:, None], "pad": padding[:, None]}
    values = np.broadcast_to(_rule(leaf, leaf.about["value"], letters), (B, T)).reshape(-1)
    if "below" in leaf.about:
        # ggml ends the process on an id outside its table.
        below = evaluate(leaf.about["below"], names)
        if wrong := values[(values < 0) | (values >= below)].tolist():
            raise DgemmaError(f"description, input {leaf.name}: gives {wrong[0]}, expected 0 to {below - 1}")
    return values.astype(KINDS[leaf.spec.type])


def _mask(leaf: Leaf, names, padding):
    """0 where a query sees a key, −inf elsewhere. (B, 1, T, S) float16"""
    S, T, _, B = leaf.spec.ne
    R, P = size(leaf.about["slots"], names), names["P"]
    last = P + T - 1
    k = last - (last - np.arange(S)) % R  # the newest token that slot s can hold
    letters = {**names, "k": k[None, None], "q": (P + np.arange(T))[None, :, None], "pad": padding[:, None, None]}
    rules = leaf.about["visible"]
    seen = np.ones((B, T, S), bool)
    for rule in rules["all"]:
        seen &= _visible(leaf, rule, letters)
    for rule in rules["any"]:
        seen |= _visible(leaf, rule, letters)
    seen &= k >= 0
    return np.where(seen, np.float16(0), np.float16(-np.inf))[:, None]


def _visible(leaf, text, letters):
    value = _rule(leaf, text, letters)
    if np.asarray(value).dtype != bool:
        raise DgemmaError(f"description, input {leaf.name}: rule {text!r} is a number, expected a comparison")
    return value


def _rule(leaf, text, letters):
    try:
        return evaluate(text, letters)
    except DgemmaError as error:
        raise DgemmaError(f"description, input {leaf.name}: {error}") from None
