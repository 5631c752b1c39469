"""Runs graphs in numpy: the oracle behind the same interface as executor.py.

Shapes   arrays are slowest axis first, always four axes

Slow: every weight is dequantized once and kept in float32. For tests, and for finding the first node that differs.
"""

import numpy as np

from mlx_dgemma.gguf.model import GgufModel
from mlx_dgemma.gguf.values import to_float32

from .description import Graph, Leaf
from .graph_numpy import compute, kind_of


class NumpyExecutor:
    """See executor.Executor."""

    def __init__(self, model: GgufModel):
        self.model, self.weights = model, {}

    def load(self, leaves: list[Leaf]) -> None:
        for leaf in leaves:
            stored = self.model.file.tensors[leaf.about.get("from", leaf.name)]
            values = to_float32(self.model.file.rows(stored.name), stored.type).reshape(stored.shape)
            if leaf.kind == "derived":
                values = values.T.astype(kind_of(leaf.spec))
            self.weights[leaf.name] = np.ascontiguousarray(values).reshape(leaf.spec.ne[::-1])

    def needs(self, graphs: list[Graph]) -> list[int]:
        """Nothing: an oracle's models are small."""
        return []

    def check_fits(self, needs: list[int], what: str) -> None:
        """They always fit."""

    def new_state(self, leaves: list[Leaf]) -> "NumpyState":
        return NumpyState({leaf.name: leaf for leaf in leaves})

    def compute(self, state: "NumpyState", graph: Graph, inputs: dict, targets: tuple, every=False) -> dict:
        given = {
            name: np.asarray(inputs[name], kind_of(leaf.spec)).reshape(leaf.spec.ne[::-1])
            for name, leaf in graph.leaves.items()
            if leaf.kind == "input" and name in inputs
        }
        values = compute(graph, {**self.weights, **state.values, **given}, targets)
        made = {node.name for node in graph.nodes}
        # Copies, since a write's result is the state itself, which the next graph changes.
        return {name: v.copy() for name, v in values.items() if name in made and (every or name in graph.outputs)}


class NumpyState:
    """See executor.State."""

    def __init__(self, leaves: dict[str, Leaf]):
        self.leaves = leaves
        self.values = {name: np.zeros(x.spec.ne[::-1], kind_of(x.spec)) for name, x in leaves.items()}

    def write(self, name, array):
        self.values[name][...] = np.asarray(array).reshape(self.values[name].shape)

    def read(self, name):
        return self.values[name].copy()

    def copy(self):
        twin = NumpyState(self.leaves)
        twin.values = {name: value.copy() for name, value in self.values.items()}
        return twin

    def close(self):
        pass
