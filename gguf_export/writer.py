"""A GGUF file, header first, then one tensor after the other in pieces.

Shapes   a tensor arrives as pieces of rows, (rows, bytes of a row) uint8, in the order of the header
Source   gguf.GGUFWriter writes header, metadata and tensor table; the data and each tensor start on a multiple of 32
Differs  the data is written here, piece by piece: GGUFWriter wants a whole tensor, and the 26B's largest has 2 GB
"""

import os
from pathlib import Path

import numpy as np

from mlx_dgemma.gguf.reader import ALIGNMENT, Value
from mlx_dgemma.gguf.types import Type


class GgufWriter:
    """A context manager that checks at the end that every byte was written.

    tensors: name, type, shape (slowest axis first), in the order of the data.
    """

    def __init__(self, path: Path, metadata: dict[str, Value], tensors: list[tuple[str, Type, tuple[int, ...]]]):
        import gguf

        architecture = metadata["general.architecture"].value
        self._writer = gguf.GGUFWriter(path, architecture)
        for key, (kind, value) in metadata.items():
            if key != "general.architecture":  # GGUFWriter puts it first
                _add(self._writer, key, kind, value)
        self._left = {}
        for name, type, shape in tensors:
            *lead, row = shape
            nbytes = int(np.prod(lead, dtype=np.int64)) * type.row_bytes(row)
            number = gguf.GGMLQuantizationType(type.number)
            self._writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=number)
            self._left[name] = nbytes
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        (self._file,) = self._writer.fout
        self._pad()

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
            self._pad()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                if self._left:
                    raise AssertionError(f"tensors lack bytes: {self._left}")
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._writer.close()

    def _pad(self):
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))


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
