"""A GGUF file: its header, and where the data of each tensor goes.

Shapes   a tensor is rows, (rows, bytes of a row) uint8
Source   gguf.GGUFWriter writes header, metadata and tensor table; the data and each tensor start on a multiple of 32
Differs  the data is written by ours, in pieces: GGUFWriter wants a whole tensor, and the 26B's largest has 2 GB
"""

import io
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_dgemma.gguf.reader import ALIGNMENT, Value
from mlx_dgemma.gguf.types import Type


class Layout(NamedTuple):
    """A file that is known before its data."""

    header: bytes  # everything before the data
    offsets: dict[str, int]  # name → first byte of its data in the file
    size: int  # bytes of the whole file


def gguf_layout(metadata: dict[str, Value], tensors: list[tuple[str, Type, tuple[int, ...]]]) -> Layout:
    """tensors: name, type, shape (slowest axis first), in the order of the data."""
    import gguf

    header = io.BytesIO()
    writer = gguf.GGUFWriter(None, metadata["general.architecture"].value)
    for key, (kind, value) in metadata.items():
        if key != "general.architecture":  # GGUFWriter puts it first
            _add(writer, key, kind, value)
    sizes = {}
    for name, type, shape in tensors:
        sizes[name] = math.prod(shape[:-1]) * type.row_bytes(shape[-1])
        number = gguf.GGMLQuantizationType(type.number)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], raw_dtype=number)
    # As if it had opened a file of its own.
    writer.fout, writer.state = [header], gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    end = _aligned(header.tell())
    content = header.getvalue().ljust(end, b"\0")
    offsets = {}
    for name, nbytes in sizes.items():
        offsets[name], end = end, _aligned(end + nbytes)
    return Layout(content, offsets, end)


class GgufWriter:
    """A file written front to back; a context manager that checks at the end that every byte was written.

    metadata, tensors: as `gguf_layout` takes them.
    """

    def __init__(self, path: Path, metadata: dict[str, Value], tensors: list[tuple[str, Type, tuple[int, ...]]]):
        self._layout = gguf_layout(metadata, tensors)
        self._left = {name: math.prod(shape[:-1]) * type.row_bytes(shape[-1]) for name, type, shape in tensors}
        self._file = Path(path).open("wb")  # noqa: SIM115 (closed by __exit__)
        self._file.write(self._layout.header)

    def append(self, name: str, piece: np.ndarray) -> None:
        """The next rows of the next tensor."""
        if name != next(iter(self._left)):
            raise AssertionError(f"{name} comes after {next(iter(self._left))}")
        data = memoryview(np.ascontiguousarray(piece)).cast("B")
        if len(data) > self._left[name]:
            raise AssertionError(f"{name}: {len(data)} bytes given, {self._left[name]} planned")
        self._file.write(data)
        self._left[name] -= len(data)
        if not self._left[name]:
            del self._left[name]
            self._file.write(bytes(-self._file.tell() % ALIGNMENT))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        with self._file:
            if kind is None:
                if self._left:
                    raise AssertionError(f"tensors lack bytes: {self._left}")
                self._file.flush()
                os.fsync(self._file.fileno())


def _aligned(position):
    return -(-position // ALIGNMENT) * ALIGNMENT


def _add(writer, key, kind, value):
    import gguf

    types = gguf.GGUFValueType
    names = {
        "u8": types.UINT8, "i8": types.INT8, "u16": types.UINT16, "i16": types.INT16, "u32": types.UINT32,
        "i32": types.INT32, "u64": types.UINT64, "i64": types.INT64, "f32": types.FLOAT32, "f64": types.FLOAT64,
        "bool": types.BOOL, "str": types.STRING,
    }  # fmt: skip
    if kind.startswith("arr["):
        writer.add_key_value(key, value, types.ARRAY, sub_type=names[kind[4:-1]])
    else:
        writer.add_key_value(key, value, names[kind])
