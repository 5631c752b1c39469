"""Check a description: against itself, against a GGUF, and against a device.

Source   docs/formats.md, "Graph description"
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.model import GgufModel
from mlx_dgemma.gguf.reader import GgufFile

from .description import Graph, Shape, chain, rounded
from .description_form import NEXT, PHASES, check_form
from .devices import Device
from .expansion import expand
from .ggml import Ggml
from .ggml_graph import dry_graph
from .graph import fingerprint, model_dims
from .host_inputs import layer_inputs
from .ops import VIEWS, Spec, tensor

# Rows, tokens and prefix: the first token, a batch, a long prefix whose ring of slots went round.
SHAPES = ((1, 1, 0), (3, 7, 300), (1, 512, 5_000))


class Report(NamedTuple):
    """What a check found, when it found nothing wrong."""

    nodes: dict[str, int]  # phase → nodes, under the options first listed
    templates: dict[str, int]  # template → nodes
    combinations: int  # of phase, options and shape that were expanded
    weights: int


def check(description: dict, model: GgufModel) -> Report:
    """Form, fingerprint, every phase under every option for several shapes, and that every weight is used.

    Raises DgemmaError that names the first thing wrong.
    """
    check_form(description)
    check_belongs(description, model)
    types = stored_specs(model.file)
    used, combinations = set(), 0
    for options in some_options(description):
        for shape in shapes(description):
            graphs = {phase: expand(description, phase, shape, options, types) for phase in PHASES}
            chain(graphs["denoise"], graphs["sample"])
            combinations += len(graphs)
            if options == _first(description):
                for graph in graphs.values():
                    layer_inputs(graph, np.zeros(shape.rows, np.int32))
            for graph in graphs.values():
                read = {name for node in graph.nodes for name in node.inputs}
                leaves = [leaf for name, leaf in graph.leaves.items() if name in read]
                used |= {leaf.about["from"] if leaf.kind == "derived" else leaf.name for leaf in leaves}
    if unused := sorted(set(model.file.tensors) - used):
        raise DgemmaError(
            f"{model.file.path}: {unused[0]} is read by no phase of the description, nor are {len(unused) - 1} others, "
            "expected every weight to be used; describe the model again"
        )
    first = {phase: expand(description, phase, shapes(description)[0], _first(description), types) for phase in PHASES}
    return Report(
        {phase: len(graph.nodes) for phase, graph in first.items()},
        {name: sum(n.template == name for n in first["prefill"].nodes) // description["layers"].count(name)
         for name in dict.fromkeys(description["layers"])},
        combinations,
        len(model.file.tensors),
    )  # fmt: skip


def check_belongs(description: dict, model: GgufModel) -> None:
    """Raises DgemmaError where description and file are of different models."""
    told, found = description["model"]["fingerprint"], fingerprint(model.file)
    if told != found:
        raise DgemmaError(
            f"{model.file.path}: its fingerprint is {found[:23]}…, the description's {told[:23]}…: they are of "
            "different models; describe this file with `python -m gguf_export describe`"
        )
    dims, X = description["dims"], description["dims"].get("X", 0)
    for name, n in model_dims(model.config, min(X, model.config.vocab_size)).items():
        if dims.get(name) != n:
            raise DgemmaError(f"description: dims has {name} = {dims.get(name)}, {model.file.path} has {n}; {NEXT}")
    if len(description["layers"]) != model.config.num_hidden_layers:
        raise DgemmaError(
            f"description: {len(description['layers'])} layers, {model.file.path} has "
            f"{model.config.num_hidden_layers}; {NEXT}"
        )


class Fallback(NamedTuple):
    """An operation a device leaves to the CPU."""

    op: str
    result: str  # type and shape
    node: str  # the first one
    nodes: int  # how many
    phase: str


def fallbacks(g: Ggml, device: Device, graph: Graph) -> list[Fallback]:
    """The operations of a graph that `device` does not support; empty where all of it runs there."""
    found, first = Counter(), {}
    with dry_graph(g, graph) as tensors:
        for node in graph.nodes:
            if node.op not in VIEWS and not g.ggml_backend_dev_supports_op(device.handle, tensors[node.name]):
                key = node.op, str(graph.specs[node.name])
                found[key] += 1
                first.setdefault(key, node.name)
    return [Fallback(*key, first[key], n, graph.phase) for key, n in found.items()]


def stored_specs(file: GgufFile) -> dict[str, Spec]:
    """GGUF name → type and shape as descriptions spell them."""
    return {name: tensor(t.type.name.lower(), *reversed(t.shape)) for name, t in file.tensors.items()}


def some_options(description: dict) -> list[dict[str, str]]:
    """Each option's values with the others as first listed, and all options as last listed."""
    options, first = description["options"], _first(description)
    changed = [first | {name: value} for name, values in options.items() for value in values[1:]]
    return [first, *changed, {name: values[-1] for name, values in options.items()}]


def shapes(description: dict) -> list[Shape]:
    C, W = description["dims"]["C"], description["dims"]["W"]
    return [
        Shape(rows, tokens, prefix, rounded(W - 1 + max(C, 512)), rounded(prefix + max(C, tokens)))
        for rows, tokens, prefix in SHAPES
    ]


def _first(description):
    return {name: values[0] for name, values in description["options"].items()}
