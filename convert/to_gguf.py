"""What is written into a GGUF file.

Shapes   every tensor is rows of weights (…, row); the file has the shape in ggml's order, fastest axis first
Source   the layout of llama.cpp pull request 24423: GGUF names of mlx_dgemma/tensors.py, rope_freqs.weight, and no
         output.weight
Differs  no value is transformed on the way, so the bytes of a tensor are ggml's quantization of the checkpoint's rows;
         with GPTQ's factors, of what they become once the blocks before have been made up for. ggml then sees a block
         at a time, where its older types would weigh by the importance of a row
"""

import hashlib

import numpy as np

from gguf_export.quantize import quantize, quantizer
from gguf_export.writer import gguf_layout
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.floats import STORED_AS, is_finite
from mlx_dgemma.gguf import rope
from mlx_dgemma.gguf.metadata import metadata
from mlx_dgemma.gguf.reader import Value
from mlx_dgemma.gguf.types import FLOATS, TYPES
from mlx_dgemma.quality import not_finite

from . import gptq
from .checkpoint import Checkpoint
from .factors import Factors
from .imatrix import Imatrix
from .plan_gguf import GgufPlan, PlannedTensor
from .work import Fixed, Job, Place, Work

LARGEST = 65_504.0  # of float16, in which ggml keeps its scales


def gguf_work(
    checkpoint: Checkpoint, plan: GgufPlan, imatrix: Imatrix | None = None, factors: Factors | None = None
) -> Work:
    """The conversion to a file. factors: round by them, block after block, what they are for."""
    tensors = [(t.tensor.gguf, t.type, t.tensor.shape) for t in plan.tensors]
    frequencies = rope.frequency_factors(plan.config)
    tensors.insert(1, (rope.NAME, TYPES["F32"], frequencies.shape))
    layout = gguf_layout(file_metadata(checkpoint, plan), tensors)
    fixed = (
        Fixed("", 0, layout.header),
        Fixed("", layout.offsets[rope.NAME], frequencies.tobytes(), rope.NAME),
    )
    jobs = [_job(checkpoint, t, layout.offsets[t.tensor.gguf], imatrix, factors) for t in plan.tensors]
    jobs.sort(key=lambda job: checkpoint.weights[job.stored].start)
    by_numpy = f", numpy {np.__version__}" if factors is not None else ""
    return Work({"": layout.size}, fixed, tuple(jobs), quantizer() + by_numpy)


def file_metadata(checkpoint: Checkpoint, plan: GgufPlan) -> dict[str, Value]:
    """Every key of the file: model, sampler, vocabulary."""
    keys = metadata(plan.config, checkpoint.generation, checkpoint.name, plan.recipe.file_type)
    return keys | checkpoint.vocabulary()


def _job(checkpoint, t: PlannedTensor, offset, imatrix, factors):
    name = checkpoint.names[t.tensor.hf]
    source = checkpoint.weights[name].file
    same, values = checkpoint.weights.bytes_of(name, t.type), checkpoint.values(t.tensor)
    importance = t.importance(imatrix)
    n, row = t.tensor.size // t.tensor.shape[-1], t.tensor.shape[-1]
    # In a single block nothing is left to make up for it.
    corrected = factors if same is None and t.type.name not in FLOATS and row > t.type.block else None
    n_factors, factor = (corrected and corrected.of(t.tensor)) or (0, None)
    # A piece ends with its expert where each has its own importance or factor.
    experts = max(n_factors, 0 if importance is None else len(importance))
    together = n // experts if experts else 0

    def convert(start, stop):
        if same is not None:
            piece = same[start:stop]
            if t.type.name in FLOATS:
                _check_finite(piece, t, source)
            return (piece,)
        piece = values[start:stop]
        _check_range(piece, t, source)
        expert = start // together if together else 0
        weights = None if importance is None else importance[expert % len(importance)]
        if factor is None:
            return (quantize(piece, t.type, weights, threads=1),)
        return (_corrected(piece, t.type, weights, factor(expert % n_factors)),)

    form = f"{checkpoint.weights[name].dtype} as {t.type.name}"
    if importance is not None:
        form += f" weighed by {hashlib.sha256(importance.tobytes()).hexdigest()}"
    if factor is not None:
        form += f", gptq {factors.digest}"
    place = Place("", offset, t.type.row_bytes(row))
    piece_size = gptq.PIECE if factor else 0
    return Job(t.tensor.gguf, name, source, (n, row), (place,), convert, form, together, piece_size)


def _corrected(piece, type, importance, factor):
    import gguf

    def pack(block, start):
        if not np.abs(block).max() <= LARGEST:  # a factor of another kind of input
            raise DgemmaError(f"--gptq leads to weights beyond float16's {LARGEST}; leave it out, or collect it again")
        weights = None if importance is None else importance[start : start + type.block]
        data = quantize(block, type, weights, threads=1)
        return data, gguf.dequantize(data, gguf.GGMLQuantizationType[type.name])

    return gptq.gptq_by_blocks(piece, factor, type.block, pack)


def _check_finite(piece, t, file):
    if not is_finite(np.ascontiguousarray(piece).view(STORED_AS[t.type.name]), t.type.name):
        raise not_finite(t.tensor.hf, file)


def _check_range(values, t, file):
    """ggml stops the whole process at what it cannot quantize, so this comes first."""
    largest = float(np.maximum(values.max(initial=0.0), -values.min(initial=0.0)))  # NaN stays NaN
    if not np.isfinite(largest):
        raise not_finite(t.tensor.hf, file)
    if largest > LARGEST and t.type.name not in ("F32", "BF16"):
        raise DgemmaError(
            f"{file}: {t.tensor.hf} holds {largest:g}, above the {LARGEST:g} that {t.type.name} can express; "
            f"keep it in full with --tensor-type {t.tensor.gguf_part}=BF16"
        )
