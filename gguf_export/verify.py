"""Reopen a GGUF and measure what the conversion lost, role by role.

Shapes   (rows, bytes of a row) uint8 → (rows, row) float32
Source   gguf.GGUFReader and gguf.dequantize (gguf-py): llama.cpp's own reader, so a mistake of our writer cannot hide
         in our reader
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from mlx_dgemma import shards
from mlx_dgemma.config import ModelConfig, read_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.floats import Float32Rows
from mlx_dgemma.gguf import rope
from mlx_dgemma.gguf.model import GgufModel, open_gguf
from mlx_dgemma.quality import RoleError, TensorError, check_source, failed, role_errors
from mlx_dgemma.shards import FLOATS, stored_tensors
from mlx_dgemma.tensors import Tensor, check_shape, text_tensors

PIECE = 1 << 22  # weights compared at a time


class Rows(Protocol):
    """A tensor's rows, every axis but the last folded into one: anything with a length whose slices are float32."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice) -> np.ndarray: ...


def verify_gguf(
    path: Path,
    source: Callable[[Tensor], Rows],
    config: ModelConfig | None = None,
    checked: Callable[[str, int], None] = lambda name, nbytes: None,
) -> list[RoleError]:
    """Compare every tensor of `path` with the source. `checked(name, nbytes)` is called after every piece.

    config: what the file must describe, where the caller knows it. Raises DgemmaError where it describes another
    model, or a tensor is missing, misshapen, not finite or not the source's.
    """
    import gguf

    model = open_gguf(path)  # our reader first: the table's coverage, shapes, vocabulary
    if config is not None and model.config != _text_of(config, model.config):
        raise failed(f"{path}: its metadata describes {model.config}, expected {config}")
    config = model.config
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    ours = model.file.tensors
    if set(theirs) != set(ours):
        raise failed(f"{path}: GGUFReader finds {len(theirs)} tensors, expected {len(ours)}")
    if rope.NAME in theirs and not np.array_equal(theirs[rope.NAME].data, rope.frequency_factors(config)):
        raise failed(f"{path}: {rope.NAME} is not what the configuration says")
    errors = {}
    for t in text_tensors(config):
        found = theirs[t.gguf]
        shape = tuple(int(n) for n in reversed(found.shape))
        if shape != t.shape:
            raise failed(f"{path}: GGUFReader reads {t.gguf} as {shape}, expected {t.shape}")
        errors.setdefault(t.role, []).append(_compare(t, found, source(t), path, checked))
    return role_errors(errors)


def _text_of(config, written):
    """A configuration as far as a text file holds it: images are another file's."""
    return dataclasses.replace(config, vision=None, image_token_id=written.image_token_id)


def open_source(path: Path) -> Callable[[Tensor], Rows]:
    """What `verify_gguf` compares with: an unquantized folder, or another GGUF. Raises DgemmaError."""
    if path.is_file():
        model = open_gguf(path)
        return lambda t: GgufRows(model, t)
    config, stored = read_config(path), stored_tensors(path)

    def source(t):
        name = t.hf if t.hf in stored else t.mlx  # an MLX folder's name for experts
        if name not in stored or stored[name].dtype not in FLOATS:
            raise DgemmaError(f"{path}: {name} is missing or quantized, expected the checkpoint that was converted")
        check_shape(name, stored[name].shape, t.shape, str(path))
        return Float32Rows(shards.Rows(stored[name]), stored[name].dtype)

    for t in text_tensors(config):
        source(t)
    return source


class GgufRows:
    """Rows of one tensor of a GGUF, dequantized when a slice is taken. (rows, row)"""

    def __init__(self, model: GgufModel, tensor: Tensor):
        self.model, self.tensor = model, tensor
        row = tensor.shape[-1]
        self.shape = (tensor.size // row, row)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.model.rows(self.tensor, *rows.indices(len(self))[:2])


def _compare(tensor, found, source, path, checked):
    import gguf

    data = found.data.reshape(len(source), -1)
    error = TensorError()
    step = max(1, PIECE // tensor.shape[-1])
    try:
        for start in range(0, len(source), step):
            rows = slice(start, start + step)
            want, piece = source[rows], data[rows]
            check_source(want, f"{tensor.hf} ({tensor.gguf})", "the source")
            error.add(want, gguf.dequantize(piece, found.tensor_type))
            checked(tensor.gguf, piece.nbytes)
        error.check()
    except ValueError as problem:
        raise failed(f"{path}: {tensor.gguf} {problem}") from None
    return error
