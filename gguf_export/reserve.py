"""What ggml's own allocator would set aside for a graph: measured without weights, and without setting it aside.

Source   ggml-backend.cpp, ggml_backend_sched_reserve_size; llama.cpp measures a context so
Differs  always asked of the CPU's backend, which every ggml has: on another device alignment may differ by some bytes

Takes milliseconds for the 26B: a graph's nodes are made, nothing is computed.
"""

import contextlib
import ctypes
import mmap

from mlx_dgemma.errors import DgemmaError

from .description import Graph
from .devices import cpu, devices
from .ggml import Ggml
from .ggml_graph import build_nodes, new_context, new_tensor
from .memory import peak

FUNCTION = {
    "ggml_backend_sched_reserve_size": (None, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t))
}
PAGE = 4096


def reserved(g: Ggml, graph: Graph, targets: tuple | None = None) -> int:
    """Bytes for inputs and intermediate results. targets: what is computed, by default all outputs and writes."""
    if not hasattr(g, next(iter(FUNCTION))):
        g.bind(FUNCTION)
    targets = graph.targets if targets is None else targets
    nodes = graph.wanted(targets)
    read = {name for node in nodes for name in node.inputs}
    inside = [leaf for leaf in graph.leaves.values() if leaf.kind == "input" and leaf.name in read]
    outside = [leaf for leaf in graph.leaves.values() if leaf.kind != "input" and leaf.name in read]
    size = 2 * len(nodes) + len(graph.leaves)  # a top-k sort is two of ggml's nodes
    with contextlib.ExitStack() as clean:
        # Weights and what persists lie elsewhere: all of them in one place that nobody touches.
        host, room = cpu(devices(g)), max(leaf.spec.nbytes for leaf in outside) + 2 * PAGE
        place = mmap.mmap(-1, room)
        base = -(-ctypes.addressof(ctypes.c_char.from_buffer(place)) // PAGE) * PAGE
        buffer = _need(g.ggml_backend_dev_buffer_from_host_ptr(host.handle, base, room - PAGE, room - PAGE))
        clean.callback(g.ggml_backend_buffer_free, buffer)
        backend = _need(g.ggml_backend_dev_init(host.handle, None))
        clean.callback(g.ggml_backend_free, backend)
        stored, context = new_context(g, len(outside)), new_context(g, size, size)
        clean.callback(g.ggml_free, stored)
        clean.callback(g.ggml_free, context)
        handles = {}
        for leaf in outside:
            handles[leaf.name] = new_tensor(g, stored, leaf.name, leaf.spec)
            g.ggml_backend_tensor_alloc(buffer, handles[leaf.name], base)
        for leaf in inside:
            handles[leaf.name] = new_tensor(g, context, leaf.name, leaf.spec)
            g.ggml_set_input(handles[leaf.name])
            g.ggml_set_output(handles[leaf.name])  # as executor.Compiled keeps them
        handles = build_nodes(g, context, graph, nodes, handles)
        cgraph = g.ggml_new_graph_custom(context, size, False)
        for name in targets:
            if graph.specs[name].contiguous:
                g.ggml_set_output(handles[name])
        for name in targets:
            g.ggml_build_forward_expand(cgraph, handles[name])
        scheduler = g.ggml_backend_sched_new((ctypes.c_void_p * 1)(backend), None, 1, 2 * size, False, True)
        clean.callback(g.ggml_backend_sched_free, scheduler)
        sizes = (ctypes.c_size_t * 1)()
        g.ggml_backend_sched_reserve_size(scheduler, cgraph, sizes)
        return sizes[0]


def computing(g: Ggml | None, graph: Graph) -> int:
    """`reserved`; or the sum that `peak` makes, where no ggml is here or it is too old to be asked."""
    try:
        return peak(graph) if g is None else reserved(g, graph)
    except DgemmaError:
        return peak(graph)


def _need(handle):
    if not handle:
        raise DgemmaError("ggml's CPU takes no memory of another; measure elsewhere")
    return handle
