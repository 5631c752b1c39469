"""Write the MLX folder: quantize, stream into shards, index, config.json. The only module here that uses MLX.

Shapes   a weight (…, row) is folded to (rows, row); pieces of whole rows are quantized and written one by one
Source   mlx.core.quantize; folder layout of mlx-vlm 0.7.10, whose loader and ours read the result
Differs  mlx-vlm builds the model and quantizes whole modules; here memory holds one piece of a tensor, whatever its
         size. Groups lie inside a row, so the pieces give the same bytes.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dgemma.config import released_spelling
from mlx_dgemma.floats import TORCH_NAMES, cast
from mlx_dgemma.shards import INDEX

from .checkpoint import Checkpoint
from .plan import Plan, quantization_block
from .recipes_mlx import Precision
from .writer import ShardWriter

PIECE = 1 << 24  # weights quantized at a time: 64 MB in float32

DTYPE_NAMES = {tag: name for name, tag in TORCH_NAMES.items()}


def write_folder(checkpoint: Checkpoint, plan: Plan, folder: Path, wrote: Callable[[str, int], None]) -> None:
    """Fill `folder`. `wrote(name, nbytes)` is called after every piece."""
    weight_map = {}
    for i, shard in enumerate(plan.shards):
        file = plan.shard_name(i)
        arrays = [array for t in shard for array in t.arrays]
        weight_map |= {array.name: file for array in arrays}
        with ShardWriter(folder / file, arrays) as writer:
            for t in shard:
                for pieces in _pieces(checkpoint.weights.rows(t.source), t):
                    for array, piece in zip(t.arrays, pieces, strict=True):
                        writer.append(array.name, piece)
                    wrote(t.tensor.mlx, sum(piece.nbytes for piece in pieces))
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
    weights = mx.array(rows)
    if dtype == "BF16":
        weights = weights.view(mx.bfloat16)
    parts = mx.quantize(weights, group_size=precision.group_size, bits=precision.bits, mode=precision.mode)
    # numpy has no bfloat16: hand its bits over.
    return tuple(np.array(p.view(mx.uint16) if p.dtype == mx.bfloat16 else p) for p in parts)


def _pieces(rows, planned) -> Iterator[tuple[np.ndarray, ...]]:
    step = max(1, PIECE // rows.shape[-1])
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        if planned.precision.is_quantized:
            yield quantize(cast(piece, planned.stored, planned.kept), planned.kept, planned.precision)
        else:
            yield (cast(piece, planned.stored, planned.arrays[0].dtype),)


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
