"""Time of a ggml graph: whole, and node by node.

Source   ggml's scheduler calls back before and after every node
Differs  node after node, each with a start of its own: a table of operations takes the fastest run of every node, less
         what starting one takes
"""

import math
import statistics
import time
from typing import NamedTuple

from gguf_export.description import Graph, Leaf, Node
from gguf_export.executor import State
from gguf_export.ops import OPS, tensor
from gguf_export.runner import Runner

# prefill: the prompt into the prefix; denoise: canvas to logits, which stay on the device; sample: logits to the next
# canvas; step: both, as the loop runs them; commit: the canvas into the prefix
PHASES = ("prefill", "denoise", "sample", "step", "commit")


class Spent(NamedTuple):
    """Milliseconds of one phase."""

    median: float
    fastest: float


def timed(work, repeat: int) -> Spent:
    times = []
    for _ in range(repeat + 1):  # one to build the graph and touch the weights
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1e3)
    return Spent(statistics.median(times[1:]), min(times[1:]))


def single(runner: Runner, op: str, inputs: tuple, specs: dict, work, fill=()):
    """`work` on a graph of one operation, on the runner's device. fill: array by name, for what must not be zero."""
    leaves = [Leaf(name, "persistent", spec, {}) for name, spec in specs.items()]
    state = State(runner.executor, leaves)
    try:
        for name, array in dict(fill).items():
            runner.executor.set(state.tensors[name], array)
        node = Node("result", op, inputs, {}, "")
        result = OPS[op].infer(*[specs[name] for name in inputs])
        names = dict.fromkeys(("T", "S_sliding", "S_full"), 0)
        graph = Graph(op, (node,), {leaf.name: leaf for leaf in leaves}, {**specs, "result": result}, (), names)
        return work(state.compiled(graph, ("result",), False))
    finally:
        state.close()


class NodeTimes:
    """What ggml's scheduler calls before and after every node; keeps the fastest run of each, in seconds."""

    def __init__(self, g):
        self.g, self.nodes, self.fastest = g, [], []

    def run(self, compiled, work, repeat: int):
        """The nodes as (name, ggml's word for the operation), and their times."""
        compiled.on_node(self._called)
        try:
            for _ in range(repeat):
                self.at = 0
                work()
        finally:
            compiled.on_node(None)
        return list(zip(self.nodes, self.fastest, strict=True))

    def _called(self, tensor, before):
        if before:
            if self.at == len(self.nodes):
                self.nodes.append((self.g.ggml_get_name(tensor).decode(), self.g.ggml_op_desc(tensor).decode()))
                self.fastest.append(math.inf)
            self.began = time.perf_counter()
        else:
            seconds = time.perf_counter() - self.began
            self.fastest[self.at] = min(self.fastest[self.at], seconds)
            self.at += 1
        return True


def node_start(runner: Runner, repeat: int) -> float:
    """Seconds that ggml takes to start one node which does nothing to speak of."""
    small = {"a": tensor("f32", 64)}
    times = single(runner, "add", ("a", "a"), small, lambda compiled: NodeTimes(runner.executor.g).run(
        compiled, lambda: compiled.run({}), 10 * repeat))  # fmt: skip
    return times[0][1]
