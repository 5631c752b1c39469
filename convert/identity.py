"""Which model weights belong to, whatever they are quantized to. What is measured on one model is no good for another.

Source   norms and router scales, which no recipe touches: bfloat16 in the released files, float32 in a GGUF

A fine-tune that trains none of them (LoRA) counts as its base model.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.floats import from_float32
from mlx_dgemma.tensors import text_tensors

from .checkpoint import Checkpoint

ROLE = "norm"


def identity(vectors: Iterable[np.ndarray]) -> str:
    """Of the ROLE tensors in the order of text_tensors, float32 of any shape."""
    digest = hashlib.sha256()
    for vector in vectors:
        digest.update(from_float32(np.ravel(vector), "BF16").tobytes())
    return digest.hexdigest()[:16]


def identity_of(checkpoint: Checkpoint) -> str:
    """Reads a few megabytes of a checkpoint."""
    return identity(checkpoint.values(t)[:] for t in text_tensors(checkpoint.config) if t.role == ROLE)


def check_identity(checkpoint: Checkpoint, measured: str, what: str, command: str) -> None:
    """Raises DgemmaError where `what` was measured on another model."""
    if (found := identity_of(checkpoint)) != measured:
        raise DgemmaError(
            f"{what} was measured on another model ({measured}), expected {checkpoint.path} ({found}); measure it with "
            f"`python -m convert {command}`"
        )
