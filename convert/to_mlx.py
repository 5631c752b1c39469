"""What is written into an MLX folder: shards, index, config.json. The module here that quantizes with MLX.

Shapes   a weight (…, row) is folded to (rows, row); rows become rows of words, scales and biases
Source   mlx.core.quantize; folder layout of mlx-vlm 0.7.10, whose loader and ours read the result
Differs  mlx-vlm builds the model and quantizes whole modules; here memory holds one piece of a tensor per thread.
         Groups lie inside a row, so the pieces give the same bytes. It is done on the CPU also where there is a GPU:
         every thread has a stream of its own, and the disk is the limit
"""

import contextlib
import json

import mlx.core as mx
import numpy as np

from mlx_dgemma.config import released_spelling
from mlx_dgemma.floats import TORCH_NAMES, cast, from_float32, is_finite, to_float32
from mlx_dgemma.quality import not_finite
from mlx_dgemma.shards import INDEX

from . import gptq
from .checkpoint import Checkpoint
from .factors import Factors
from .plan import Plan, PlannedTensor, quantization_block
from .recipes_mlx import Precision
from .refit import refit
from .work import Fixed, Job, Place, Work
from .writer import safetensors_layout

DTYPE_NAMES = {tag: name for name, tag in TORCH_NAMES.items()}
# A stream keeps one core busy. MLX never ends the thread of one, so they are lent, not made anew for each conversion.
_free_streams: list[mx.Stream] = []


def folder_work(checkpoint: Checkpoint, plan: Plan, refitted: bool = False, factors: Factors | None = None) -> Work:
    """The conversion to a folder.

    refitted: fit affine scales and biases to the rounded weights. factors: round by them what they are for, and fit
    the rest.
    """
    sizes, fixed, jobs = {}, [], []
    for i, shard in enumerate(plan.shards):
        file = plan.shard_name(i)
        layout = safetensors_layout([array for t in shard for array in t.arrays])
        sizes[file] = layout.size
        fixed.append(Fixed(file, 0, layout.header))
        jobs += [_job(checkpoint, t, file, layout.offsets, refitted, factors) for t in shard]
    jobs.sort(key=lambda job: checkpoint.weights[job.stored].start)
    by_numpy = refitted or factors is not None
    quantizer = f"mlx {mx.__version__}" + f", numpy {np.__version__}" * by_numpy
    return Work(sizes, tuple(fixed), tuple(jobs), quantizer, lambda folder: _finish(checkpoint, plan, folder))


def _job(checkpoint, t: PlannedTensor, file, offsets, refitted, factors):
    rows = checkpoint.weights.rows(t.source)
    n, row = rows.shape
    pack, how, together, piece_size = _packing(t, n, refitted, factors)

    def convert(start, stop):
        piece = rows[start:stop]
        # The vision tower is carried as stored: a clipping bound of it may be infinite.
        if t.tensor.role != "vision" and not is_finite(piece, t.stored):
            raise not_finite(t.source, checkpoint.weights[t.source].file)
        return pack(piece, start)

    places = tuple(Place(file, offsets[array.name], array.nbytes // n) for array in t.arrays)
    form = f"{t.stored} through {t.kept} as {t.precision}, {[array.dtype for array in t.arrays]}{how}"
    source = checkpoint.weights[t.source].file
    return Job(t.tensor.mlx, t.source, source, (n, row), places, convert, form, together, piece_size)


def _packing(t, n, refitted, factors):
    """What makes a piece and the number of its first row the arrays; how, in words; rows that stay together; piece."""
    if not t.precision.is_quantized:
        return lambda piece, start: (cast(piece, t.stored, t.arrays[0].dtype),), "", 0, 0
    found = factors.of(t.tensor) if factors and t.precision.mode == "affine" else None
    if found is None:
        refitted = t.precision.mode == "affine" and (refitted or factors is not None)

        def pack_plainly(piece, start):
            return packed(cast(piece, t.stored, t.kept), t.kept, t.precision, refitted)

        return pack_plainly, ", refitted" * refitted, 0, 0
    n_factors, factor = found
    together = n // n_factors  # a piece ends with its expert where each has its own factor

    def pack(piece, start):
        values = to_float32(cast(piece, t.stored, t.kept), t.kept)
        return gptq.gptq(values, factor(start // together), fit, t.kept, t.precision)

    def fit(group):
        return packed(from_float32(group, t.kept), t.kept, t.precision, True)[1:]

    return pack, f", gptq {factors.digest}", together, gptq.PIECE


def packed(rows: np.ndarray, dtype: str, precision: Precision, refitted: bool) -> tuple[np.ndarray, ...]:
    """Rows stored as `dtype` → words, scales and (affine) biases; fitted to the rounded weights where asked for."""
    parts = quantize(rows, dtype, precision)
    if not refitted or precision.mode != "affine":
        return parts
    return refit(to_float32(rows, dtype), *parts[1:], dtype, precision)


def _finish(checkpoint, plan, folder):
    """What is small: the index, config.json, and what is carried along."""
    weight_map = {a.name: plan.shard_name(i) for i, shard in enumerate(plan.shards) for t in shard for a in t.arrays}
    index = {
        "metadata": {"total_size": plan.total_bytes, "total_parameters": plan.parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(folder / INDEX, index)
    _write_json(folder / "config.json", output_config(checkpoint, plan))
    for name, content in checkpoint.files().items():
        (folder / name).write_bytes(content)


def output_config(checkpoint: Checkpoint, plan: Plan) -> dict:
    """The source's config.json with the released spelling, the written dtype and both quantization blocks."""
    config = released_spelling(checkpoint.raw_config)
    config.pop("torch_dtype", None)  # transformers' older word
    # What is not quantized decides: the norms have it in every recipe.
    config["dtype"] = DTYPE_NAMES[next(t.arrays[0].dtype for t in plan.tensors if t.tensor.role == "norm")]
    config["text_config"] = {**config["text_config"], "dtype": config["dtype"]}
    if not checkpoint.vision:
        config["vision_config"] = None  # loaders would otherwise expect a vision tower's weights
    block = quantization_block(plan)
    if block is not None:
        config["quantization"] = config["quantization_config"] = block
    return config


def quantize(rows: np.ndarray, dtype: str, precision: Precision) -> tuple[np.ndarray, ...]:
    """Rows stored as `dtype` → words, scales and (affine) biases, as numpy arrays of the planned dtypes."""
    with _stream():
        weights = mx.array(rows)
        if dtype == "BF16":
            weights = weights.view(mx.bfloat16)
        parts = mx.quantize(weights, group_size=precision.group_size, bits=precision.bits, mode=precision.mode)
        # numpy has no bfloat16: hand its bits over.
        return tuple(np.array(p.view(mx.uint16) if p.dtype == mx.bfloat16 else p) for p in parts)


@contextlib.contextmanager
def _stream():
    """Inside, MLX computes on the CPU, on a stream that no other thread has."""
    try:
        stream = _free_streams.pop()
    except IndexError:
        stream = mx.new_thread_unsafe_stream(mx.cpu)
    try:
        with mx.stream(stream):
            yield
    finally:
        _free_streams.append(stream)


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
