"""What a run takes: weights, prefix, and what a graph needs while it is computed. Said before anything is allocated.

Source   ggml-alloc.c: memory is freed after its last reader, and some operations overwrite their input
Differs  `peak` knows no alignment and no fragments: for a step of the 26B it is 0.3 % below what reserve.py measures,
         for encoding up to 40 %
"""

from collections.abc import Callable
from typing import NamedTuple

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.fits import Need, most_tokens, refusal
from mlx_dgemma.units import count, human_bytes

from .description import Graph, Leaf
from .devices import Device
from .ops import VIEWS, WRITES

SPARE = 0.5  # of the compute memory once more: fragments, and what a device's library takes for itself
# Bits per weight of recipes, the 26B's; for the one that an error advises. convert/plan_gguf.py counts them.
BITS = {
    "Q8_0": 8.51, "Q6_K": 7.17, "Q5_K_M": 6.06, "Q4_K_M": 5.32, "Q4_K_S": 4.90, "IQ4_XS": 4.45, "Q3_K_M": 4.21,
    "Q2_K": 3.35,
}  # fmt: skip
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
    def need(self) -> Need:
        """What must be free."""
        return Need(self.weights, self.prefix, self.compute + round(SPARE * self.compute))


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


def plan(weights: list[Leaf], graph: Graph, split: Split, compute: int | None = None) -> Memory:
    """What the device must hold for these weights and a step of this shape. compute: of the graph; default: `peak`."""
    stored = [leaf for leaf in graph.leaves.values() if leaf.kind == "persistent" and split.on_device(leaf.name)]
    prefix = sum(leaf.spec.nbytes for leaf in stored if leaf.name.startswith("blk."))
    beliefs = sum(leaf.spec.nbytes for leaf in stored) - prefix
    held = sum(leaf.spec.nbytes for leaf in weights if split.on_device(leaf.name))
    return Memory(held, prefix, beliefs + (peak(graph) if compute is None else compute))


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


class Plan(NamedTuple):
    """All that says what a model takes on a device, at one length of the prefix."""

    weights: tuple[Leaf, ...]
    graphs: tuple[Graph, ...]
    computes: tuple[int, ...]  # bytes of each graph
    n_layers: int

    def need(self, on_device: int | None = None) -> Need:
        """With so many layers on the device, all by default."""
        split = Split.of(self.n_layers, on_device)
        rows = [plan(self.weights, *pair[:1], split, pair[1]) for pair in zip(self.graphs, self.computes, strict=True)]
        return max((row.need for row in rows), key=lambda need: need.total)

    def host_need(self, on_device: int | None) -> Need:
        """What the CPU holds of a split: the other layers, and their keys and values.

        Not what it computes in: ggml's scheduler decides which of a graph's results lie where.
        """
        split = Split.of(self.n_layers, on_device)
        stored = ([x for x in graph.leaves.values() if x.kind == "persistent"] for graph in self.graphs)
        weights, *prefixes = (
            sum(leaf.spec.nbytes for leaf in leaves if not split.on_device(leaf.name))
            for leaves in (self.weights, *stored)
        )
        return Need(weights, max(prefixes), 0)

    def most_layers(self, room: int) -> int:
        """The most layers that fit beside what is no layer's; 0 where not even one does."""
        return next((n for n in range(self.n_layers, 0, -1) if self.need(n).total <= room), 0)


def refusal_of(
    plan_for: Callable[[int], Plan],
    tokens: int,
    device: Device,
    host: Device,
    on_device: int | None,
    parameters: int,
    least: int,
) -> str | None:
    """Why so many tokens do not fit, and what would; None where they do, or nobody says how much memory there is.

    A device that maps the file must hold its pages all the same: a step reads every weight, and what memory has no
    room for comes from the disk each time. host: the CPU, which has the layers that are not on the device, and all that
    is no layer's where it has every layer. parameters: of the model. least: tokens, a canvas.
    """
    if on_device == 0:
        device = host
    if device.kind == "cpu":
        on_device = None  # a CPU is not split with itself
    plan = plan_for(tokens)
    need, advice = plan.need(on_device), []
    if device.total == 0 or need.total <= device.free:
        return _host_refusal(plan_for, tokens, device, host, on_device, least)
    layers = plan.most_layers(device.free)
    if layers and device.kind != "cpu":
        advice.append(f"--n-gpu-layers {layers} would fit")
    for name, bits in BITS.items():
        smaller = round(bits * parameters / 8)
        if smaller < need.weights and need.total - need.weights + smaller <= device.free and on_device is None:
            advice.append(f"choose a smaller recipe ({name} would fit, with about {human_bytes(smaller)} of weights)")
            break
    if most := most_tokens(lambda n: plan_for(n).need(on_device), device.free, tokens - 1, least):
        advice.append(f"ask for fewer tokens ({most} would fit, prompt and answer)")
    if not advice:
        advice.append("--device CPU" if device.kind != "cpu" else "no recipe would; see `python -m convert fit`")
    n = count(plan.n_layers if on_device is None else min(on_device, plan.n_layers), "layer")
    what = f"{tokens} tokens and {n}"
    return refusal(need, device.free, f"{device.name} has {human_bytes(device.free)} free", what, advice)


def _host_refusal(plan_for, tokens, device, host, on_device, least):
    """The same of the CPU's side of a split."""
    plan = plan_for(tokens)
    if on_device is None or host.total == 0 or plan.host_need(on_device).total <= host.free:
        return None
    need, advice = plan.host_need(on_device), []
    both = (n for n in range(on_device + 1, plan.n_layers + 1) if plan.host_need(n).total <= host.free)
    if (layers := next(both, None)) and (device.total == 0 or plan.need(layers).total <= device.free):
        advice.append(f"--n-gpu-layers {layers} would fit")
    if most := most_tokens(lambda n: plan_for(n).host_need(on_device), host.free, tokens - 1, least):
        advice.append(f"ask for fewer tokens ({most} would fit, prompt and answer)")
    if not advice:
        advice.append("choose a smaller recipe, see `python -m convert fit`")
    what = f"{tokens} tokens and the {count(plan.n_layers - on_device, 'layer')} that {device.name} does not take"
    return refusal(need, host.free, f"{host.name} has {human_bytes(host.free)} free", what, advice)
