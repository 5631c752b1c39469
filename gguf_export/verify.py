"""Reopen a GGUF and measure what the conversion lost, role by role.

Shapes   (rows, bytes of a row) uint8 → (rows, row) float32
Source   gguf.GGUFReader and gguf.dequantize (gguf-py): llama.cpp's own reader, so a mistake of our writer cannot hide
         in our reader
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from mlx_dgemma.config import ModelConfig
from mlx_dgemma.gguf import rope
from mlx_dgemma.gguf.model import open_gguf
from mlx_dgemma.quality import RoleError, TensorError, check_source, failed, role_errors
from mlx_dgemma.tensors import Tensor, text_tensors

PIECE = 1 << 22  # weights compared at a time


class Rows(Protocol):
    """A tensor's rows, every axis but the last folded into one: anything with a length whose slices are float32."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice) -> np.ndarray: ...


def verify_gguf(
    path: Path,
    config: ModelConfig,
    source: Callable[[Tensor], Rows],
    checked: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[RoleError]:
    """Compare every tensor of `path` with the source. `checked(name, nbytes)` is called after every piece.

    Raises DgemmaError where the file describes another model, or a tensor is missing, misshapen, not finite or not
    the source's.
    """
    import gguf

    model = open_gguf(path)  # our reader first: the table's coverage, shapes, vocabulary
    if (found := model.config) != config:
        raise failed(f"{path}: its metadata describes {found}, expected {config}")
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    ours = model.file.tensors
    if set(theirs) != set(ours):
        raise failed(f"{path}: GGUFReader finds {len(theirs)} tensors, expected {len(ours)}")
    if not np.array_equal(theirs[rope.NAME].data, rope.frequency_factors(config)):
        raise failed(f"{path}: {rope.NAME} is not what the configuration says")
    errors = {}
    for t in text_tensors(config):
        found = theirs[t.gguf]
        shape = tuple(int(n) for n in reversed(found.shape))
        if shape != t.shape:
            raise failed(f"{path}: GGUFReader reads {t.gguf} as {shape}, expected {t.shape}")
        errors.setdefault(t.role, []).append(_compare(t, found, source(t), path, checked))
    return role_errors(errors)


def _compare(tensor, found, source, path, checked):
    import gguf

    data = found.data.reshape(len(source), -1)
    error = TensorError()
    step = max(1, PIECE // tensor.shape[-1])
    try:
        for start in range(0, len(source), step):
            rows = slice(start, start + step)
            want, piece = source[rows], data[rows]
            check_source(want, tensor.hf, "the source")
            error.add(want, gguf.dequantize(piece, found.tensor_type))
            checked(tensor.gguf, piece.nbytes)
        error.check()
    except ValueError as problem:
        raise failed(f"{path}: {tensor.gguf} {problem}") from None
    return error
