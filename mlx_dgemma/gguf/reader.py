"""A GGUF file's header: metadata, and which tensor lies where. Everything is checked before anything large is read.

Shapes   slowest axis first, as in PyTorch; the file has them fastest first. A tensor without axes is read as (1,)
Source   ggml's docs/gguf.md, versions 2 and 3 (the same bytes where little-endian); gguf.cpp for what ggml refuses
Differs  nothing is allocated from a length before the length is known to fit the file; gaps between tensors and any
         order of their data are read, which ggml refuses

A tensor's data is mapped on its own (`rows`), so that letting go of it gives its memory back.
"""

import math
import mmap
import reprlib
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DgemmaError
from .types import BY_NUMBER, Type

ALIGNMENT = 32  # bytes, where general.alignment says nothing
MAX_ALIGNMENT = 1 << 20
MAX_HEADER = 100_000_000  # bytes; the 26B's, with its vocabulary of 262,144 tokens and 514,906 merges, takes 16 MB
MAX_NAME = 1_000  # characters; ggml stops at 63 for tensors. Errors and `info` repeat names, so they are printable
MAX_DIMS = 4  # ggml's own limit
# name, struct's letter, bytes
SCALARS = {
    0: ("u8", "B", 1), 1: ("i8", "b", 1), 2: ("u16", "H", 2), 3: ("i16", "h", 2), 4: ("u32", "I", 4),
    5: ("i32", "i", 4), 6: ("f32", "f", 4), 7: ("bool", "?", 1), 10: ("u64", "Q", 8), 11: ("i64", "q", 8),
    12: ("f64", "d", 8),
}  # fmt: skip
STRING, ARRAY = 8, 9
AGAIN = "the file is corrupt or its download incomplete; download it again"
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


class Value(NamedTuple):
    """One metadata entry. type: "u32", "f32", "bool", "str", …, or "arr[u32]" with a list as value."""

    type: str
    value: Any


class StoredTensor(NamedTuple):
    name: str
    type: Type
    shape: tuple[int, ...]  # slowest axis first
    start: int  # byte offset in the file
    nbytes: int


class GgufFile(NamedTuple):
    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, StoredTensor]

    def get(self, key: str, default=None):
        """A metadata value, or `default` where the file has no such key."""
        return self.metadata[key].value if key in self.metadata else default

    def rows(self, name: str) -> np.ndarray:
        """A view of one tensor's bytes. (rows, bytes of a row) uint8"""
        t = self.tensors[name]
        data = np.memmap(self.path, np.uint8, "r", offset=t.start, shape=t.nbytes)
        return data.reshape(-1, t.type.row_bytes(t.shape[-1]))


def read_gguf(path: str | Path) -> GgufFile:
    """Read and check a file's header. Raises DgemmaError."""
    path = Path(path)
    if path.exists() and not path.is_file():
        found = "a folder" if path.is_dir() else "no regular file"
        raise DgemmaError(f"{path}: found {found}, expected a GGUF file; name the .gguf file itself")
    try:
        with path.open("rb") as f:
            size = f.seek(0, 2)
            if size < 4:
                raise DgemmaError(f"{path}: found {size} bytes, expected a GGUF file; download it again")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(path, data)
    except FileNotFoundError:
        raise DgemmaError(f"{path}: not found; expected a GGUF file, check the path") from None
    except OSError as error:
        raise DgemmaError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def _read(path, data):
    cursor = _Cursor(path, data)
    n_tensors, n_keys = _start(cursor)
    metadata = {}
    # An entry takes at least its name's length, its type and one byte.
    for _ in range(cursor.count(n_keys, 8 + 4 + 1, "metadata keys")):
        key = cursor.name("a metadata key")
        if key in metadata:
            raise DgemmaError(f"{path}: metadata key {key} comes twice, expected once; {AGAIN}")
        metadata[key] = cursor.value(cursor.number(U32, key), key)
    _check_whole(path, metadata)
    infos = [_tensor_info(cursor) for _ in range(cursor.count(n_tensors, 8 + 4 + 4 + 8, "tensors"))]
    alignment = _alignment(path, metadata)
    base = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, type, shape, offset in infos:
        if name in tensors:
            raise DgemmaError(f"{path}: tensor {name} comes twice, expected once; {AGAIN}")
        if offset % alignment:
            raise DgemmaError(f"{path}: {name} starts at {offset}, expected a multiple of {alignment}; {AGAIN}")
        nbytes = math.prod(shape[:-1]) * type.row_bytes(shape[-1])
        tensors[name] = StoredTensor(name, type, shape, base + offset, nbytes)
    _check_places(path, tensors.values(), len(data))
    return GgufFile(path, metadata, tensors)


def _start(cursor):
    """Magic and version → number of tensors, number of metadata keys."""
    path, data = cursor.path, cursor.data
    if data[:4] != b"GGUF":
        raise DgemmaError(f"{path}: starts with {data[:4]!r}, expected b'GGUF'; {_what_else(data[:64])}")
    cursor.at = 4
    version = cursor.number(U32, "the version")
    if version and version & 0xFFFF == 0:
        raise DgemmaError(
            f"{path}: a big-endian GGUF, expected little-endian; download the usual file, or turn it round with "
            "`gguf-convert-endian FILE little`"
        )
    if version not in (2, 3):
        raise DgemmaError(f"{path}: GGUF version {version}, expected 2 or 3; convert the checkpoint again")
    return cursor.number(U64, "the number of tensors"), cursor.number(U64, "the number of metadata keys")


def _what_else(start):
    if start[8:9] == b"{":
        return "this looks like safetensors: give its folder instead, with config.json in it"
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer: fetch the file itself with `git lfs pull`"
    return "not a GGUF file; check the path, or download it again"


def _tensor_info(cursor):
    """name, type, shape, offset behind the header"""
    path, name = cursor.path, cursor.name("a tensor's name")
    n_dims = cursor.number(U32, name)
    if n_dims > MAX_DIMS:
        raise DgemmaError(f"{path}: {name} has {n_dims} dimensions, expected at most {MAX_DIMS}; {AGAIN}")
    shape = tuple(reversed([cursor.number(U64, name) for _ in range(n_dims)])) or (1,)
    number, offset = cursor.number(U32, name), cursor.number(U64, name)
    if not all(shape) or math.prod(shape) >= 2**63:  # ggml counts in 64 bits
        raise DgemmaError(f"{path}: {name} has shape {shape}, expected sizes from 1 that fit the file; {AGAIN}")
    if number not in BY_NUMBER:
        raise DgemmaError(
            f"{path}: {name} has tensor type {number}, expected one that ggml has today; convert the checkpoint again"
        )
    type = BY_NUMBER[number]
    if shape[-1] % type.block:
        raise DgemmaError(
            f"{path}: {name} has rows of {shape[-1]}, expected a multiple of {type.block} for {type.name}; {AGAIN}"
        )
    return name, type, shape, offset


def _check_whole(path, metadata):
    """One part of a split model holds some of the tensors only."""
    parts = metadata.get("split.count", Value("u16", 0)).value
    if parts != 0 and parts != 1:
        raise DgemmaError(
            f"{path}: one of {reprlib.repr(parts)} parts of a split model, expected a whole one; "
            "merge them with `llama-gguf-split --merge FIRST-PART OUT.gguf`"
        )


def _alignment(path, metadata):
    value = metadata.get("general.alignment", Value("u32", ALIGNMENT)).value
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise DgemmaError(
            f"{path}: general.alignment is {reprlib.repr(value)}, expected a power of two, at most {MAX_ALIGNMENT}; "
            f"{AGAIN}"
        )
    return value


def _check_places(path, tensors, size):
    """Inside the file, none overlapping."""
    end = 0
    for t in sorted(tensors, key=lambda t: t.start):
        if t.start < end:
            raise DgemmaError(
                f"{path}: {t.name} starts at byte {t.start}, expected {end} or later, past its neighbour; {AGAIN}"
            )
        end = t.start + t.nbytes
        if end > size:
            raise DgemmaError(f"{path}: {t.name} ends at byte {end}, expected the end within {size} bytes; {AGAIN}")


class _Cursor:
    """Reads the header front to back; whatever is read must lie inside the file."""

    def __init__(self, path, data):
        self.path, self.data, self.at = path, data, 0
        self.end = min(len(data), MAX_HEADER)

    def need(self, nbytes, what):
        """The position of the next `nbytes`, which are then behind the cursor."""
        at = self.at
        if nbytes > self.end - at:
            raise self.too_short(f"{what} needs {nbytes} bytes")
        self.at = at + nbytes
        return at

    def too_short(self, wanted):
        limit = "file" if self.end == len(self.data) else "largest header"
        return DgemmaError(
            f"{self.path}: at byte {self.at} of a {self.end}-byte {limit}, {wanted}, expected no more than are left; "
            f"{AGAIN}"
        )

    def count(self, n, least, what):
        """`n` things of at least `least` bytes each."""
        if n * least > self.end - self.at:
            raise self.too_short(f"{n} {what} need {n * least} bytes")
        return n

    def number(self, form, what):
        return form.unpack_from(self.data, self.need(form.size, what))[0]

    def name(self, what):
        name = self.string(what)
        if len(name) > MAX_NAME or not name.isprintable():
            raise DgemmaError(
                f"{self.path}: {what} is {reprlib.repr(name)} of {len(name)} characters, expected at most {MAX_NAME} "
                f"printable ones; {AGAIN}"
            )
        return name

    def string(self, what):
        return self.strings(1, what)[0]

    def strings(self, n, what):
        # A loop of its own, without the methods above: the 26B's vocabulary has 777,050 strings.
        strings, data, at = [], self.data, self.at
        for _ in range(n):
            first = at + 8
            end = first + U64.unpack_from(data, at)[0] if first <= self.end else first
            if end > self.end:
                self.at = at
                raise self.too_short(f"{what} needs {end - at} bytes")
            try:
                strings.append(data[first:end].decode())
            except UnicodeDecodeError:
                raise DgemmaError(
                    f"{self.path}: at byte {first}, {what} is {reprlib.repr(data[first:end])}, expected UTF-8; {AGAIN}"
                ) from None
            at = end
        self.at = at
        return strings

    def value(self, number, key):
        if number == STRING:
            return Value("str", self.string(key))
        if number == ARRAY:
            return self.array(key)
        name, _, _ = self.scalar(number, key)
        return Value(name, self.scalars(number, 1, key)[0])

    def array(self, key):
        item, n = self.number(U32, key), self.number(U64, key)
        if item == STRING:
            return Value("arr[str]", self.strings(self.count(n, 8, f"strings of {key}"), key))
        if item == ARRAY:
            raise DgemmaError(f"{self.path}: {key} is an array of arrays, expected numbers or strings; {AGAIN}")
        name, _, _ = self.scalar(item, key)
        return Value(f"arr[{name}]", self.scalars(item, n, key))

    def scalar(self, number, key):
        if number not in SCALARS:
            raise DgemmaError(f"{self.path}: {key} has value type {number}, expected 0 to 12; {AGAIN}")
        return SCALARS[number]

    def scalars(self, number, n, key):
        _, letter, nbytes = SCALARS[number]
        return list(struct.unpack_from(f"<{n}{letter}", self.data, self.need(n * nbytes, key)))
