"""Write a checkpoint as one GGUF file, one piece of one tensor in memory at a time.

Shapes   every tensor is rows of weights (…, row); the file has the shape in ggml's order, fastest axis first
Source   the layout of llama.cpp pull request 24423: GGUF names of mlx_dgemma/tensors.py, rope_freqs.weight, and no
         output.weight
Differs  no value is transformed on the way, so the bytes of a tensor are ggml's quantization of the checkpoint's rows
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from gguf_export.quantize import quantize
from gguf_export.writer import GgufWriter
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf import rope
from mlx_dgemma.gguf.metadata import metadata
from mlx_dgemma.gguf.reader import Value
from mlx_dgemma.gguf.types import TYPES

from .checkpoint import Checkpoint
from .imatrix import Imatrix
from .plan_gguf import GgufPlan

PIECE = 1 << 24  # weights quantized at a time: 64 MB in float32
LARGEST = 65_504.0  # of float16, in which ggml keeps its scales


def write_gguf(
    checkpoint: Checkpoint, plan: GgufPlan, path: Path, imatrix: Imatrix | None, wrote: Callable[[str, int], None]
) -> None:
    """Write `path`. `wrote(name, nbytes)` is called after every piece."""
    tensors = [(t.tensor.gguf, t.type, t.tensor.shape) for t in plan.tensors]
    factors = rope.frequency_factors(plan.config)
    tensors.insert(1, (rope.NAME, TYPES["F32"], factors.shape))
    with GgufWriter(path, file_metadata(checkpoint, plan), tensors) as writer:
        for i, t in enumerate(plan.tensors):
            for piece in _pieces(checkpoint, t, imatrix):
                writer.append(t.tensor.gguf, piece)
                wrote(t.tensor.gguf, piece.nbytes)
            if i == 0:
                writer.append(rope.NAME, factors)
                wrote(rope.NAME, factors.nbytes)


def file_metadata(checkpoint: Checkpoint, plan: GgufPlan) -> dict[str, Value]:
    """Every key of the file: model, sampler, vocabulary."""
    keys = metadata(plan.config, checkpoint.generation, checkpoint.name, plan.recipe.file_type)
    return keys | checkpoint.vocabulary()


def _pieces(checkpoint, t, imatrix):
    name = checkpoint.names[t.tensor.hf]
    same = checkpoint.weights.bytes_of(name, t.type)
    rows = checkpoint.values(t.tensor) if same is None else same
    importance = t.importance(imatrix)
    experts = t.tensor.shape[0] if len(t.tensor.shape) == 3 else 1
    per_expert = len(rows) // experts
    step = max(1, PIECE // t.tensor.shape[-1])
    # A piece ends with its expert where each has its own importance.
    ends = per_expert if importance is not None else len(rows)
    for begin in range(0, len(rows), ends):
        for start in range(begin, begin + ends, step):
            piece = rows[start : min(start + step, begin + ends)]
            if same is not None:
                yield piece
                continue
            _check_range(piece, t, checkpoint.path)
            yield quantize(piece, t.type, None if importance is None else importance[begin // per_expert])


def _check_range(values, t, file):
    """ggml stops the whole process at what it cannot quantize, so this comes first."""
    largest = float(np.abs(values).max(initial=0.0))  # NaN stays NaN
    if not np.isfinite(largest):
        raise DgemmaError(
            f"{file}: {t.tensor.hf} holds infinity or NaN, expected numbers; download the checkpoint again"
        )
    if largest > LARGEST and t.type.name not in ("F32", "BF16"):
        raise DgemmaError(
            f"{file}: {t.tensor.hf} holds {largest:g}, above the {LARGEST:g} that {t.type.name} can express; "
            f"keep it in full with --tensor-type {t.tensor.gguf_part}=BF16"
        )
