"""A graph description in memory: read, written, and what a phase becomes when it is expanded.

Shapes   `ne` order; see ops.Spec
Source   docs/formats.md, "Graph description"
"""

from pathlib import Path
from typing import NamedTuple

from mlx_dgemma.config import read_json
from mlx_dgemma.errors import DgemmaError

from .description_form import GIVEN, NEXT, check_form
from .graph import KEYS_MULTIPLE
from .ops import WRITES, Spec
from .text import as_text, write_text


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

    @property
    def targets(self) -> tuple[str, ...]:
        """What a whole run of it computes: outputs, and what is written."""
        return tuple(dict.fromkeys((*self.outputs, *self.writes)))

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
    if twice := sorted({node.name for node in second.nodes} & first.specs.keys()):
        raise DgemmaError(f"description: {twice[0]} is in {first.phase} and in {second.phase}; {NEXT}")
    for name in first.leaves.keys() & second.leaves.keys():
        if first.leaves[name] != second.leaves[name]:
            raise DgemmaError(f"description: {first.phase} and {second.phase} differ in what {name} is; {NEXT}")
    for name in made & second.leaves.keys():
        if name not in GIVEN["sample"]:
            raise DgemmaError(
                f"description: {name} is a node of {first.phase}, which {second.phase} cannot read; {NEXT}"
            )
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
    """One node per line, so that people and diffs can read it. Raises DgemmaError."""
    write_text(path, as_text(description))
