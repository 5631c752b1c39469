"""What a GGUF will take on a device: from its header, or from a recipe's plan where there is no file yet.

Source   runner.py, which allocates by these shapes
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from mlx_dgemma.config import GenerationConfig, ModelConfig
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.fits import PREFILL_CHUNK
from mlx_dgemma.gguf import rope
from mlx_dgemma.gguf.metadata import metadata
from mlx_dgemma.gguf.model import GgufModel
from mlx_dgemma.gguf.reader import GgufFile, StoredTensor
from mlx_dgemma.gguf.types import TYPES, Type

from .choices import chosen_options
from .description import Graph, Leaf, Shape, chain, rounded
from .description_form import NEXT
from .expansion import expand
from .ggml import Ggml
from .graph import describe_model
from .graph_check import stored_specs
from .memory import Plan
from .reserve import computing

RUN = ("prefill", "denoise+sample")  # the graphs; commit is prefill


def slots_of_sliding(config: ModelConfig) -> int:
    """Slots that a sliding layer stores."""
    return rounded(config.sliding_window - 1 + max(config.canvas_length, PREFILL_CHUNK))


def shapes_of(config: ModelConfig, tokens: int, rows: int = 1) -> tuple[Shape, Shape]:
    """The last chunk of a prompt, and the last canvas, where prompt and answer are `tokens` long."""
    C, T = config.canvas_length, min(PREFILL_CHUNK, tokens)
    sliding, room = slots_of_sliding(config), rounded(max(tokens, C))
    return tuple(Shape(rows, n, max(0, tokens - n), sliding, room) for n in (T, C))


def stored_leaves(graphs: Iterable[Graph]) -> list[Leaf]:
    """What the graphs read and no host fills in: one leaf for each name. Raises DgemmaError where two differ."""
    found: dict[str, Leaf] = {}
    for graph in graphs:
        for name, leaf in graph.leaves.items():
            if leaf.kind != "input" and found.setdefault(name, leaf) != leaf:
                raise DgemmaError(f"description: {name} differs between phases, expected one tensor; {NEXT}")
    return list(found.values())


def plan_of(graph: Callable[[str, Shape], Graph], config: ModelConfig, tokens: int, library: Ggml | None) -> Plan:
    """graph: a phase of RUN, expanded. library: measures what they compute in; without it that is summed up."""
    graphs = tuple(graph(phase, shape) for phase, shape in zip(RUN, shapes_of(config, tokens), strict=True))
    weights = tuple(leaf for leaf in stored_leaves(graphs) if leaf.kind in ("weight", "derived"))
    computes = tuple(computing(library, g) for g in graphs)
    return Plan(weights, graphs, computes, config.num_hidden_layers)


def forecast(model: GgufModel, on_cpu: bool, library: Ggml | None, **options) -> Callable[[int], Plan]:
    """Tokens → what they take. options: as a Runner takes them."""
    description, stored = describe_model(model), stored_specs(model.file)
    chosen = chosen_options(description, model, on_cpu, **options)

    def graph(phase, shape):
        parts = [expand(description, name, shape, chosen, stored) for name in phase.split("+")]
        return parts[0] if len(parts) == 1 else chain(*parts)

    return lambda tokens: plan_of(graph, model.config, tokens, library)


def planned_model(config: ModelConfig, tensors: Iterable[tuple[str, Type, tuple[int, ...]]], name: str) -> GgufModel:
    """A model that no file holds yet: name, type and shape of each tensor."""
    factors = rope.frequency_factors(config)
    found = [*tensors, (rope.NAME, TYPES["F32"], factors.shape)]
    stored = {n: StoredTensor(n, type, shape, 0, _nbytes(type, shape)) for n, type, shape in found}
    file = GgufFile(Path(name), metadata(config, GenerationConfig(), name, 0), stored)
    return GgufModel(file, {}, {}, config, GenerationConfig(), {n: (n,) for n in stored if n != rope.NAME})


def _nbytes(type, shape):
    rows = 1
    for n in shape[:-1]:
        rows *= n
    return rows * type.row_bytes(shape[-1])
