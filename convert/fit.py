"""Which recipes fit a device: weights, keys and values, what a step computes in, for both targets.

Source   mlx_dgemma/fits.py counts for MLX, gguf_export/forecast.py for ggml: what `generate` and `run` refuse by
Differs  reads no weights: a plan, or a file's header, is enough

released.json is config.json of google/diffusiongemma-26B-A4B-it, for who has no model yet.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from gguf_export.description import rounded
from gguf_export.devices import choose, open_ggml
from gguf_export.forecast import forecast, planned_model
from gguf_export.ggml import find_ggml
from gguf_export.ops import tensor as spec_of
from mlx_dgemma.config import ModelConfig, parse_config, read_json
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.fits import Activations, Need, mlx_machine, mlx_need, ram, stored_bytes
from mlx_dgemma.gguf.model import open_gguf
from mlx_dgemma.hub import model_path
from mlx_dgemma.shards import FLOATS, stored_tensors
from mlx_dgemma.tensors import is_ignored, is_vision

from .plan import plan_from_config
from .plan_gguf import make_gguf_plan
from .recipes import TARGETS, find_recipe

RELEASED = Path(__file__).with_name("released.json")
HALF, FLOAT = 2, 4  # bytes of an activation: bfloat16 on a GPU, float32 on a CPU
CONTEXT = 4096  # tokens, where nobody says


class Room(NamedTuple):
    """What one target may use."""

    bytes: int
    on_cpu: bool
    told: str  # where that is from


class Line(NamedTuple):
    """One recipe on one device."""

    target: str  # "mlx" or "gguf"
    recipe: str
    need: Need
    room: int
    verdict: str  # "fits", "fewer tokens", "fewer layers" or "too large"
    tokens: int  # most known to fit: of doublings, the model's context and the one asked for; 0: not even a canvas
    layers: int | None  # GGUF: layers that fit on the device

    @property
    def over(self) -> int:
        """Bytes that are missing, at the context that was asked for."""
        return max(0, self.need.total - self.room)


class Source(NamedTuple):
    """A model, or the configuration of one."""

    name: str
    config: ModelConfig
    raw: dict  # config.json
    path: Path


def open_source(model: str | Path | None) -> Source:
    """A folder, a GGUF file, a config.json, a hub id (its config.json is fetched), or the released model. Raises
    DgemmaError."""
    if model is None:
        raw = read_json(RELEASED)
        return Source("DiffusionGemma-26B-A4B-it", parse_config(raw), raw, RELEASED)
    if str(model).endswith(".gguf") and not Path(model).expanduser().exists():
        raise DgemmaError(f"{model}: no such file; expected a GGUF that is here, since its header counts")
    path = model_path(model, ["config.json"])
    if path.is_file() and path.suffix != ".json":
        found = open_gguf(path)
        return Source(path.name, found.config, found.raw_config, path)
    file = path if path.is_file() else path / "config.json"
    raw = read_json(file)
    return Source(str(model), parse_config(raw, file), raw, path)


def rooms(memory: int | None) -> tuple[dict[str, Room], list[str]]:
    """What MLX and ggml may use: `memory` bytes of a GPU, or what is found here; and what to say of it."""
    if memory is not None:
        return dict.fromkeys(TARGETS, Room(memory, False, "as given")), []
    found, notes, whole = {}, [], ram()
    machine = mlx_machine()
    if machine is not None and machine.memory:
        found["mlx"] = Room(machine.memory, machine.on_cpu, f"MLX: {machine.name}{' (CPU)' * machine.on_cpu}")
    elif whole:
        found["mlx"] = Room(whole, True, "MLX: not installed here; this machine's memory")
    library = _library()
    device = choose(library) if library is not None else None
    if device is not None and device.total:
        found["gguf"] = Room(device.free, device.kind == "cpu", f"ggml: {device.name}, {device.description}")
    elif whole:
        found["gguf"] = Room(whole, True, "ggml: not installed here; this machine's memory")
    if len(found) < len(TARGETS):
        raise DgemmaError("nobody says how much memory this machine has, expected a size; give --memory, as 18GB")
    if not found["mlx"].on_cpu:
        notes.append("a Mac's GPU may use a part of its memory; `sudo sysctl iogpu.wired_limit_mb=N` changes how much")
    return found, notes


def fit(
    source: Source, found: dict[str, Room], context: int | None = None, recipes: tuple[str | Path, ...] = ()
) -> Iterator[Line]:
    """A line for the model as it is, where its weights are here, and one for every recipe. Raises DgemmaError.

    recipes: JSON recipes besides the named ones. context: tokens of prompt and answer, by default `usual_context`;
    at least a canvas is counted.
    """
    config = source.config
    limit, context = config.max_position_embeddings, usual_context(config) if context is None else context
    if not 1 <= context <= limit:
        raise DgemmaError(f"--context is {context}, expected 1 to {limit} tokens: the model's context")
    context = max(context, config.canvas_length)
    lengths = [n for n in (config.canvas_length << i for i in range(32)) if n < limit] + [limit]
    forecasts = functools.cache(lambda is_float: _forecast(config, is_float, found["gguf"].on_cpu))
    for target, counted in (
        ("mlx", lambda recipe: _of_mlx(source, recipe, found["mlx"])),
        ("gguf", lambda recipe: _of_gguf(config, recipe, forecasts)),
    ):
        chosen = [find_recipe(recipe, target) for recipe in (*TARGETS[target], *recipes)]
        rows = [(recipe.name, counted(recipe)) for recipe in chosen]
        rows.sort(key=lambda row: -row[1](context)[0].weights)
        if own := _as_it_is(source, target, found[target]):
            rows.insert(0, (f"{source.path.name}, as it is", own))
        for name, plan in rows:
            yield _line(target, name, plan, found[target], context, lengths)


def usual_context(config: ModelConfig) -> int:
    return min(CONTEXT, config.max_position_embeddings)


# A recipe's Planner: tokens → what they need, and how many layers fit into how many bytes (None where all must).
Planner = Callable[[int], tuple[Need, Callable[[int], int] | None]]


def _line(target, name, planner: Planner, room, context, lengths):
    need, layers = planner(context)
    fits = need.total <= room.bytes
    tokens = context if fits else 0
    for n in (n for n in lengths if (n > context) == fits):
        if planner(n)[0].total > room.bytes:
            break
        tokens = n
    split = layers(room.bytes) if layers and not room.on_cpu else None
    if fits:
        verdict = "fits"
    elif tokens or split:
        verdict = "fewer tokens" if tokens else "fewer layers"
    else:
        verdict = "too large"
    return Line(target, name, need, room.bytes, verdict, tokens, split)


def _as_it_is(source, target, room) -> Planner | None:
    """The weights that are here, where this target reads them."""
    if target == "mlx" and source.path.is_dir() and any(source.path.glob("*.safetensors")):
        stored = {n: t for n, t in stored_tensors(source.path).items() if not is_vision(n) and not is_ignored(n)}
        packed = any(t.dtype not in FLOATS for t in stored.values())
        return _mlx_planner(source.config, [(t.dtype, t.shape) for t in stored.values()], packed, room)
    if target == "gguf" and source.path.suffix != ".json" and source.path.is_file():
        plan_for = functools.cache(forecast(open_gguf(source.path), room.on_cpu, _library()))
        return lambda tokens: (plan_for(rounded(tokens)).need(), plan_for(rounded(tokens)).most_layers)
    return None


def _of_mlx(source, recipe, room) -> Planner:
    tensors = plan_from_config(source.raw, source.config, recipe, source.path).tensors
    arrays = [(a.dtype, a.shape) for t in tensors if t.tensor.role != "vision" for a in t.arrays]
    return _mlx_planner(source.config, arrays, any(t.precision.is_quantized for t in tensors), room)


def _mlx_planner(config, arrays, packed, room):
    how = Activations(FLOAT if room.on_cpu else HALF, room.on_cpu, packed)
    weights = stored_bytes(arrays, how.number_bytes)
    return lambda tokens: (mlx_need(config, weights, tokens, 1, how), None)


def _of_gguf(config, recipe, forecasts) -> Planner:
    """The graphs are the same for all recipes but those of floats; only the weights differ."""
    types = {t.tensor.gguf: (t.type, t.tensor.shape) for t in make_gguf_plan(config, recipe).tensors}
    plan_for = forecasts(types["token_embd.weight"][0].name == "F32")

    @functools.cache
    def plan(tokens):
        found = plan_for(tokens)
        return found._replace(weights=tuple(map(stored_as, found.weights)))

    def stored_as(leaf):
        if leaf.name not in types:
            return leaf
        type, shape = types[leaf.name]
        return leaf._replace(spec=spec_of(type.name.lower(), *reversed(shape)))

    return lambda tokens: (plan(rounded(tokens)).need(), plan(rounded(tokens)).most_layers)


def _forecast(config, is_float, on_cpu):
    tensors = make_gguf_plan(config, find_recipe("F32" if is_float else "Q8_0", "gguf")).tensors
    model = planned_model(config, [(t.tensor.gguf, t.type, t.tensor.shape) for t in tensors], "plan")
    return functools.cache(forecast(model, on_cpu, _library()))


def _library():
    return open_ggml() if find_ggml() is not None else None
