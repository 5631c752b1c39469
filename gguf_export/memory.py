"""What a run takes: weights, prefix, and what a graph needs while it is computed. Said before anything is allocated.

Source   ggml-alloc.c: memory is freed after its last reader, and some operations overwrite their input
Differs  `peak` knows no alignment and no fragments, so the real buffer is some per cent larger
"""

from typing import NamedTuple

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.units import count, human_bytes

from .description import Graph, Leaf
from .devices import Device
from .ops import VIEWS, WRITES

SPARE = 0.5  # of the compute memory once more: fragments, and what a device's library takes for itself
# Operations that write over an input that nobody reads afterwards.
IN_PLACE = (
    "scale", "add", "sub", "mul", "div", "log", "tanh", "silu", "step", "rope", "rms_norm", "soft_max"
)  # fmt: skip


class Memory(NamedTuple):
    """Bytes, on all devices."""

    weights: int  # mapped or copied, and tables made from them
    prefix: int  # keys and values, room included
    compute: int  # canvas, beliefs and what compiled graphs need

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def wanted(self) -> int:
        """What must be free."""
        return self.total + round(SPARE * self.compute)


class Split(NamedTuple):
    """Which layers' weights and prefix are on the device, with all that is no layer's; the CPU has the other layers."""

    first_layer: int  # from this one on

    @classmethod
    def of(cls, n_layers: int, on_device: int | None) -> "Split":
        """The last `on_device` layers; all by default. Raises DgemmaError for a negative number."""
        if on_device is not None and on_device < 0:
            raise DgemmaError(f"--n-gpu-layers is {on_device}, expected 0 or more")
        return cls(0 if on_device is None else max(0, n_layers - on_device))

    def on_device(self, name: str) -> bool:
        parts = name.split(".")
        return not (len(parts) > 1 and parts[0] == "blk" and parts[1].isdecimal() and int(parts[1]) < self.first_layer)


def plan(weights: list[Leaf], graph: Graph, split: Split) -> Memory:
    """What the device must hold for these weights and a step of this shape."""
    stored = [leaf for leaf in graph.leaves.values() if leaf.kind == "persistent" and split.on_device(leaf.name)]
    prefix = sum(leaf.spec.nbytes for leaf in stored if leaf.name.startswith("blk."))
    beliefs = sum(leaf.spec.nbytes for leaf in stored) - prefix
    held = sum(leaf.spec.nbytes for leaf in weights if split.on_device(leaf.name))
    return Memory(held, prefix, beliefs + peak(graph))


def peak(graph: Graph) -> int:
    """Most bytes that inputs and intermediate results take at once, each freed after its last reader."""
    owner = {}  # a view keeps what it looks at
    for node in graph.nodes:
        if node.op in VIEWS:
            owner[node.name] = owner.get(node.inputs[0], node.inputs[0])
        elif node.op in WRITES:
            owner[node.name] = ""
    last = {}
    for i, node in enumerate(graph.nodes):
        for name in (*node.inputs, node.name):
            last[owner.get(name, name)] = i
    ends: dict[int, list[str]] = {}
    for name, i in last.items():
        ends.setdefault(i, []).append(name)
    inputs = sum(leaf.spec.nbytes for leaf in graph.leaves.values() if leaf.kind == "input")
    held = most = 0
    alive: dict[str, int] = {}  # bytes of each intermediate result
    for i, node in enumerate(graph.nodes):
        if node.op not in (*VIEWS, *WRITES):
            nbytes = graph.specs[node.name].nbytes
            spent = [name for name in node.inputs if last.get(name) == i and alive.get(name) == nbytes]
            if node.op in IN_PLACE and spent:
                held -= alive.pop(spent[0])
            alive[node.name] = nbytes
            held += nbytes
            most = max(most, held)
        held -= sum(alive.pop(name) for name in ends.get(i, ()) if name in alive and name not in graph.outputs)
    return inputs + most


def check_fits(weights: list[Leaf], graphs: list[Graph], device: Device, n_layers: int, on_device: int | None) -> None:
    """Raises DgemmaError that says what the largest graph needs, what there is, and how many layers would fit.

    Where a device maps them, weights are the file's own pages, which the system reads and drops as it likes; only the
    rest must fit.
    """
    if device.total == 0 or on_device == 0:  # nobody says how much there is
        return

    def needed(layers):
        return max((plan(weights, graph, Split.of(n_layers, layers)) for graph in graphs), key=lambda m: m.wanted)

    needs = needed(on_device)
    if device.maps:
        derived = sum(leaf.spec.nbytes for leaf in weights if leaf.kind == "derived")
        needs = needs._replace(weights=derived)
    if needs.wanted <= device.free:
        return
    fits = next((n for n in range(n_layers - 1, 0, -1) if needed(n).wanted <= device.free), 0)
    advice = "choose a smaller recipe, or --device CPU"
    if fits and device.kind != "cpu":
        advice = f"--n-gpu-layers {fits} would fit; or {advice}"
    elif device.kind == "cpu":
        advice = "choose a smaller recipe" if needs.weights > needs.compute else "free some"
    raise DgemmaError(
        f"{device.name} has {human_bytes(device.free)} free, expected {human_bytes(needs.wanted)} for "
        f"{count(n_layers if on_device is None else min(on_device, n_layers), 'layer')} "
        f"(weights {human_bytes(needs.weights)}, prefix {human_bytes(needs.prefix)}, "
        f"computing {human_bytes(needs.compute)}); {advice}"
    )
