"""A GGUF tensor's bytes → float32, exactly as ggml defines them.

Shapes   (rows, bytes of a row) uint8 → (rows, row) float32
Source   gguf.quants (gguf-py), which llama.cpp tests bit for bit against ggml
"""

import numpy as np

from .types import Type


def to_float32(rows: np.ndarray, type: Type) -> np.ndarray:
    """Rows of one tensor (or a slice of them) → their values."""
    import gguf

    if not len(rows):  # gguf-py cannot fold nothing into blocks
        return np.empty((0, rows.shape[1] // type.block_bytes * type.block), np.float32)
    if type.name == "F32":
        return np.ascontiguousarray(rows).view(np.float32)
    return gguf.dequantize(np.ascontiguousarray(rows), gguf.GGMLQuantizationType[type.name])
