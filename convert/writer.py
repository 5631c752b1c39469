"""A safetensors file written in any order, from a header that is known before the data.

Shapes   every array is written as bytes, in pieces, at its own place: memory stays at one piece
Source   the safetensors format; MLX reads the metadata {"format": "mlx"}
"""

import json
import os
from pathlib import Path

import numpy as np

from .plan import Array


class ShardWriter:
    """One file; a context manager that checks at the end that every byte was written."""

    def __init__(self, path: Path, arrays: list[Array]):
        header, end = {"__metadata__": {"format": "mlx"}}, 0
        for array in arrays:
            begin, end = end, end + array.nbytes
            header[array.name] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the data
        self._next = {a.name: 8 + len(text) + header[a.name]["data_offsets"][0] for a in arrays}
        self._left = {a.name: a.nbytes for a in arrays}
        # Unbuffered, so that a full disk is noticed at the write it happens in.
        self._file = path.open("wb", buffering=0)
        self._write(0, len(text).to_bytes(8, "little") + text)

    def append(self, name: str, piece: np.ndarray) -> None:
        """The next rows of one array."""
        data = memoryview(np.ascontiguousarray(piece)).cast("B")
        if len(data) > self._left[name]:
            raise AssertionError(f"{name}: {len(data)} bytes given, {self._left[name]} planned")
        self._write(self._next[name], data)
        self._next[name] += len(data)
        self._left[name] -= len(data)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                short = {name: left for name, left in self._left.items() if left}
                if short:
                    raise AssertionError(f"arrays lack bytes: {short}")
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def _write(self, position, data):
        self._file.seek(position)
        data = memoryview(data)
        while data:  # a raw write may take less than it is given
            data = data[self._file.write(data) :]
