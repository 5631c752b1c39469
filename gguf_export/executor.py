"""Runs graphs on ggml: weights on their devices, what persists between graphs, and compiled graphs.

Shapes   arrays are slowest axis first, as many axes as the caller likes; `ne` order stays inside
Source   ggml-backend.h; llama.cpp's use of ggml's scheduler

On the CPU, and where a GPU shares its memory, weights are the file's own pages, not a copy.
"""

import contextlib
import ctypes
import weakref
from collections.abc import Callable

import numpy as np

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.model import GgufModel
from mlx_dgemma.gguf.values import to_float32
from mlx_dgemma.units import human_bytes

from .description import Graph, Leaf
from .devices import Device, cpu, devices, memory_of
from .ggml import EvalCallback, Ggml
from .ggml_graph import build_nodes, new_context, new_tensor
from .graph_numpy import KINDS
from .memory import Split, peak
from .ops import VIEWS, Spec

UPLOAD = 64 << 20  # bytes copied to a device at a time
USAGE_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS


class Executor:
    """One model's weights on one device, or split between it and the CPU. Close it, or let go of it."""

    def __init__(self, library: Ggml, model: GgufModel, device: Device, n_layers_on_device: int | None, threads: int):
        self.g, self.model, self.device = library, model, device
        found = devices(library)
        host = cpu(found)
        self.split = Split.of(model.config.num_hidden_layers, n_layers_on_device)
        self._devices = [device] if device.kind == "cpu" else [device, host]
        if n_layers_on_device == 0:
            self._devices = [host]
        self._clean = contextlib.ExitStack()
        weakref.finalize(self, self._clean.close)
        self.backends = [self._start(d) for d in self._devices]
        self._set_threads(host, threads)
        self.tensors: dict[str, int] = {}  # weights by name, ggml's handles
        self.weight_bytes = {d.name: 0 for d in self._devices}

    def close(self) -> None:
        self._clean.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _start(self, device):
        backend = self.g.ggml_backend_dev_init(device.handle, None)
        if not backend:
            raise DgemmaError(f"device {device.name} does not start{self.last_words()}; try --device CPU")
        self._clean.callback(self.g.ggml_backend_free, backend)
        return backend

    def _set_threads(self, host, threads):
        registry = self.g.ggml_backend_dev_backend_reg(host.handle)
        address = self.g.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        if address and host in self._devices:
            call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)
            call(self.backends[self._devices.index(host)], threads)

    def last_words(self) -> str:
        return f" ({self.g.messages[-1]})" if self.g.messages else ""

    def place(self, name: str) -> int:
        """Index of the device that holds a weight or a layer's prefix."""
        return 0 if self.split.on_device(name) else len(self._devices) - 1

    # Weights

    def load(self, leaves: list[Leaf]) -> None:
        """Put every weight and derived table where it belongs. Raises DgemmaError where it does not fit."""
        for i, device in enumerate(self._devices):
            here = [leaf for leaf in leaves if self.place(leaf.name) == i and leaf.name not in self.tensors]
            stored = [leaf for leaf in here if leaf.kind == "weight"]
            derived = [leaf for leaf in here if leaf.kind == "derived"]
            if not (device.maps and self._map(device, stored)):
                self._upload(device, stored, lambda leaf: _stored_bytes(self.model, leaf.name))
            self._upload(device, derived, lambda leaf: _transposed(self.model, leaf))

    def _map(self, device, leaves):
        """The file's own pages as weights; False where the device does not take them."""
        if not leaves:
            return True
        self._mapped = np.memmap(self.model.file.path, np.uint8, "r")
        base, largest = self._mapped.ctypes.data, max(leaf.spec.nbytes for leaf in leaves)
        buffer = self.g.ggml_backend_dev_buffer_from_host_ptr(device.handle, base, self._mapped.nbytes, largest)
        if not buffer:
            return False
        self._clean.callback(self.g.ggml_backend_buffer_free, buffer)
        context = self._context(len(leaves))
        for leaf in leaves:
            handle = new_tensor(self.g, context, leaf.name, leaf.spec)
            start = self.model.file.tensors[leaf.name].start
            self.g.ggml_backend_tensor_alloc(buffer, handle, base + start)
            self.tensors[leaf.name] = handle
        self.g.ggml_backend_buffer_set_usage(buffer, USAGE_WEIGHTS)
        self.weight_bytes[device.name] += sum(leaf.spec.nbytes for leaf in leaves)
        return True

    def _upload(self, device, leaves, pieces: Callable):
        if not leaves:
            return
        context = self._context(len(leaves))
        handles = {leaf.name: new_tensor(self.g, context, leaf.name, leaf.spec) for leaf in leaves}
        buffer = self.allocate(device, context, "weights", sum(leaf.spec.nbytes for leaf in leaves))
        self._clean.callback(self.g.ggml_backend_buffer_free, buffer)
        self.g.ggml_backend_buffer_set_usage(buffer, USAGE_WEIGHTS)
        for leaf in leaves:
            at = 0
            for piece in pieces(leaf):
                self.set(handles[leaf.name], piece, at)
                at += piece.nbytes
            assert at == leaf.spec.nbytes, (leaf.name, at, leaf.spec.nbytes)
        self.tensors |= handles
        self.weight_bytes[device.name] += sum(leaf.spec.nbytes for leaf in leaves)

    # What both weights and states need

    def _context(self, n):
        context = new_context(self.g, n)
        self._clean.callback(self.g.ggml_free, context)
        return context

    def allocate(self, device: Device, context, what: str, nbytes: int) -> int:
        """A buffer on `device` for every tensor of `context`. Raises DgemmaError that says how much was wanted."""
        self.check_room(device, what, nbytes)
        buffer = self.g.ggml_backend_alloc_ctx_tensors_from_buft(
            context, self.g.ggml_backend_dev_buffer_type(device.handle)
        )
        if not buffer:
            raise self.too_little(device, what, nbytes)
        return buffer

    def check_room(self, device, what, nbytes):
        """A CPU promises more memory than there is, and the process ends when it is used; a GPU refuses by itself."""
        if device.kind == "cpu" and 0 < device.total < nbytes:
            raise self.too_little(device, what, nbytes)

    def needs(self, graphs: list[Graph]) -> list[int]:
        """Bytes that prefix and graphs of this shape take on each device, beside the weights."""
        sizes = []
        for i in range(len(self._devices)):
            stored = [[x.spec.nbytes for x in g.leaves.values() if x.kind == "persistent" and self.place(x.name) == i]
                      for g in graphs]  # fmt: skip
            sizes.append(max(sum(n) + (peak(g) if i == 0 else 0) for n, g in zip(stored, graphs, strict=True)))
        return sizes

    def check_fits(self, needs: list[int], what: str) -> None:
        """Raises DgemmaError where a device has not this much free."""
        for device, needed in zip(self._devices, needs, strict=True):
            free, total = memory_of(self.g, device.handle)
            if total > 0 and free < needed:
                raise self.too_little(device, what, needed)

    def too_little(self, device, what, nbytes):
        free, _ = memory_of(self.g, device.handle)
        advice = "shorten the prompt, denoise fewer rows at once"
        advice += " or free some" if device.kind == "cpu" else ", choose a smaller recipe, or fewer --n-gpu-layers"
        return DgemmaError(
            f"{device.name} has {human_bytes(free)} free, expected {human_bytes(nbytes)} more for {what}; {advice}"
        )

    def set(self, handle, array: np.ndarray, offset: int = 0) -> None:
        array = np.ascontiguousarray(array)
        self.g.ggml_backend_tensor_set(handle, array.ctypes.data, offset, array.nbytes)

    def get(self, handle, spec: Spec) -> np.ndarray:
        array = np.empty(spec.ne[::-1], KINDS[spec.type])
        self.g.ggml_backend_tensor_get(handle, array.ctypes.data, 0, array.nbytes)
        return array

    def new_state(self, leaves: list[Leaf]) -> "State":
        return State(self, leaves)

    def compute(self, state: "State", graph: Graph, inputs: dict, targets: tuple, every=False) -> dict:
        """Run what `targets` need; their values by name. every: the values of all nodes that are no views."""
        return state.compiled(graph, targets, every).run(inputs)


class State:
    """What one batch keeps between graphs: the prefix of every layer, the canvas, and the previous step's beliefs.

    Holds the graphs compiled for it too, since those point into its memory.
    """

    def __init__(self, executor: Executor, leaves: list[Leaf]):
        self.executor, self.leaves = executor, {leaf.name: leaf for leaf in leaves}
        self.tensors: dict[str, int] = {}
        self._graphs: dict[str, tuple] = {}
        self._clean = contextlib.ExitStack()
        weakref.finalize(self, self._clean.close)
        g = executor.g
        for i, device in enumerate(executor._devices):
            here = [leaf for leaf in leaves if executor.place(leaf.name) == i]
            if not here:
                continue
            context = new_context(g, len(here))
            self._clean.callback(g.ggml_free, context)
            for leaf in here:
                self.tensors[leaf.name] = new_tensor(g, context, leaf.name, leaf.spec)
            buffer = executor.allocate(device, context, "the prefix", sum(leaf.spec.nbytes for leaf in here))
            self._clean.callback(g.ggml_backend_buffer_free, buffer)
            g.ggml_backend_buffer_clear(buffer, 0)  # slots nobody wrote are read, then masked; they must be numbers

    def close(self):
        for _, compiled in self._graphs.values():
            compiled.close()
        self._clean.close()

    @property
    def nbytes(self) -> int:
        return sum(leaf.spec.nbytes for leaf in self.leaves.values())

    @property
    def compute_bytes(self) -> int:
        """Of the compiled graphs, on all devices."""
        return sum(compiled.nbytes for _, compiled in self._graphs.values())

    def write(self, name: str, array: np.ndarray) -> None:
        spec = self.leaves[name].spec
        self.executor.set(self.tensors[name], np.asarray(array, KINDS[spec.type]).reshape(spec.ne[::-1]))

    def read(self, name: str) -> np.ndarray:
        return self.executor.get(self.tensors[name], self.leaves[name].spec)

    def copy(self) -> "State":
        """The same contents in memory of its own."""
        twin = State(self.executor, list(self.leaves.values()))
        for name, handle in self.tensors.items():
            self.executor.g.ggml_backend_tensor_copy(handle, twin.tensors[name])
        return twin

    def compiled(self, graph: Graph, targets, every) -> "Compiled":
        """The graph, ready to run; one of each phase is kept, and goes when another shape is asked for."""
        key = (graph.names["T"], graph.names["S_sliding"], graph.names["S_full"], targets, every)
        if graph.phase in self._graphs:
            old_key, compiled = self._graphs[graph.phase]
            if old_key == key:
                return compiled
            compiled.close()
            del self._graphs[graph.phase]
        compiled = Compiled(self, graph, targets, every)
        self._graphs[graph.phase] = key, compiled
        return compiled


class Compiled:
    """A graph with memory of its own, scheduled over the devices."""

    def __init__(self, state: State, graph: Graph, targets: tuple, every: bool):
        self.executor, self.graph = state.executor, graph
        g = self.g = state.executor.g
        nodes = graph.wanted(targets)
        self._clean = contextlib.ExitStack()
        weakref.finalize(self, self._clean.close)
        read = {name for node in nodes for name in node.inputs}
        inputs = [leaf for leaf in graph.leaves.values() if leaf.kind == "input" and leaf.name in read]
        size = 2 * len(nodes) + len(graph.leaves)  # a top-k sort is two of ggml's nodes
        context = new_context(g, size, size)
        self._clean.callback(g.ggml_free, context)
        self.inputs = {leaf.name: (self._input(context, leaf), leaf) for leaf in inputs}
        self._last: dict[str, np.ndarray] = {}
        handles = {**self.executor.tensors, **state.tensors, **{name: h for name, (h, _) in self.inputs.items()}}
        handles = build_nodes(g, context, graph, nodes, handles)
        shown = [n.name for n in nodes if n.op not in VIEWS] if every else targets
        self.outputs = {name: handles[name] for name in shown if graph.specs[name].contiguous}
        cgraph = g.ggml_new_graph_custom(context, size, False)
        for handle in self.outputs.values():
            g.ggml_set_output(handle)
        for name in targets:
            g.ggml_build_forward_expand(cgraph, handles[name])
        self._schedule(cgraph, size)
        # Writes are targets for their effect; what they wrote stays on the device.
        self.returned = [name for name in self.outputs if every or name in graph.outputs]

    def _input(self, context, leaf):
        handle = new_tensor(self.g, context, leaf.name, leaf.spec)
        self.g.ggml_set_input(handle)
        # An output keeps its memory to the end, so that what did not change need not be sent again.
        self.g.ggml_set_output(handle)
        return handle

    def _schedule(self, cgraph, size):
        g, backends = self.g, self.executor.backends
        array = (ctypes.c_void_p * len(backends))(*backends)
        self.scheduler = g.ggml_backend_sched_new(array, None, len(backends), 2 * size, False, True)
        self._clean.callback(g.ggml_backend_sched_free, self.scheduler)
        if not g.ggml_backend_sched_alloc_graph(self.scheduler, cgraph):
            raise self.executor.too_little(self.executor.device, f"computing {self.graph.phase}", peak(self.graph))
        self.cgraph = cgraph

    @property
    def nbytes(self) -> int:
        return sum(self.g.ggml_backend_sched_get_buffer_size(self.scheduler, b) for b in self.executor.backends)

    @property
    def splits(self) -> int:
        """Parts that run on one device each; 1 where nothing falls back."""
        return self.g.ggml_backend_sched_get_n_splits(self.scheduler)

    def run(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """values: every input by name. An array that is the very one of the last run is not sent again."""
        for name, (handle, leaf) in self.inputs.items():
            value = values[name]
            if self._last.get(name) is not value:
                self.executor.set(handle, np.asarray(value, KINDS[leaf.spec.type]).reshape(leaf.spec.ne[::-1]))
                self._last[name] = value
        if self.g.ggml_backend_sched_graph_compute(self.scheduler, self.cgraph) != 0:
            raise DgemmaError(f"{self.executor.device.name} failed{self.executor.last_words()}; try --device CPU")
        return {name: self.executor.get(self.outputs[name], self.graph.specs[name]) for name in self.returned}

    def on_node(self, callback: Callable[[int, bool], bool] | None) -> None:
        """Call back before and after every node, as ggml's scheduler does. For timing; nodes then run one by one."""
        self._callback = EvalCallback(lambda tensor, ask, _: callback(tensor, ask)) if callback else EvalCallback()
        self.g.ggml_backend_sched_set_eval_callback(self.scheduler, self._callback, None)

    def close(self) -> None:
        self._clean.close()


def _stored_bytes(model, name):
    rows = model.file.rows(name)
    step = max(1, UPLOAD // rows.shape[1])
    return (rows[i : i + step] for i in range(0, len(rows), step))


def _transposed(model: GgufModel, leaf: Leaf):
    """A matrix turned: its columns become rows, a band of rows at a time."""
    source = leaf.about["from"]
    rows, type = model.file.rows(source), model.file.tensors[source].type
    width = model.file.tensors[source].shape[-1]
    whole = np.empty((width, len(rows)), KINDS[leaf.spec.type])
    step = max(1, UPLOAD // (4 * width))
    for i in range(0, len(rows), step):
        whole[:, i : i + step] = to_float32(rows[i : i + step], type).T
    yield whole
