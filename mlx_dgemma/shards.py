"""The safetensors files of a model folder: which tensor lies where, checked before anything large is read.

Source   safetensors format: 8 bytes header length, JSON header, data; model.safetensors.index.json of transformers
Differs  a header is checked against the file's size here, so a truncated download is named before it is mapped

The loader, the converter and the verifiers start from these entries. Needs no MLX.
"""

import json
import math
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from .config import read_json
from .errors import DgemmaError
from .floats import STORED_AS

INDEX = "model.safetensors.index.json"
# mlx-optiq keeps these beside the shards, under names of its own; they hold nothing of the text model.
SIDECARS = ("optiq_vision.safetensors", "mtp.safetensors")

# fmt: off
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}
# fmt: on
FLOATS = ("BF16", "F16", "F32")  # what an unquantized weight may be
AGAIN = "the file is corrupt or its download incomplete; download it again"
MAX_HEADER = 100_000_000  # bytes; the format's own limit


class StoredTensor(NamedTuple):
    """Where one tensor lies."""

    file: Path
    dtype: str  # safetensors' name, as BF16
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    nbytes: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's shards by name. Raises DgemmaError for a missing, truncated or corrupt shard."""
    folder = Path(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in shard_files(folder):
        for name, entry in read_header(file).items():
            if name in tensors:
                raise DgemmaError(
                    f"{file}: {name} is stored in {tensors[name].file.name} too; remove the shards of another download"
                )
            tensors[name] = entry
    return tensors


class Rows:
    """One tensor, every axis but the last folded into one; a slice of rows is read when it is taken. (rows, row)

    BF16 comes as its bits, uint16. Slices are read into memory of their own, not mapped: what a program has mapped
    counts as its memory, and a file that shrinks under a map ends the program.
    """

    def __init__(self, t: StoredTensor):
        self.stored, self.dtype = t, STORED_AS[t.dtype]
        row = t.shape[-1] if t.shape else 1  # a clipping bound of a vision tower has no axis
        self.shape = (math.prod(t.shape) // max(row, 1), row)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Raises DgemmaError where the file cannot be read or has become too short."""
        start, stop, _ = rows.indices(len(self))
        out = np.empty((max(stop - start, 0), self.shape[1]), self.dtype)
        read_into(memoryview(out).cast("B"), self.stored.file, self.stored.start + start * out.itemsize * self.shape[1])
        return out


def read_into(buffer: memoryview, file: Path, start: int) -> None:
    """Fill `buffer` with a file's bytes from `start`. Raises DgemmaError."""
    try:
        with file.open("rb", buffering=0) as f:
            f.seek(start)
            while buffer:
                n = f.readinto(buffer)
                if not n:
                    raise DgemmaError(f"{file}: ends before its last tensor does; {AGAIN}")
                buffer = buffer[n:]
    except OSError as error:
        raise DgemmaError(f"{file}: cannot be read ({error.strerror or error}); check its disk and try again") from None


def shard_files(folder: Path) -> list[Path]:
    """The index's shards, or every *.safetensors where there is no index."""
    index = folder / INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise DgemmaError(f"{index}: found no weight_map, expected tensor names and their files; download it again")
        names = sorted({str(name) for name in weight_map.values() if Path(str(name)).name not in SIDECARS})
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise DgemmaError(
                f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(names)} listed in {INDEX}); "
                "download the checkpoint again"
            )
        return [folder / name for name in names]
    files = sorted(file for file in folder.glob("*.safetensors") if file.name not in SIDECARS)
    if not files:
        raise DgemmaError(f"{folder}: found no .safetensors file, expected the model's weights; check the path")
    return files


def read_header(file: Path) -> dict[str, StoredTensor]:
    """One file's tensors, each checked to lie inside the file, with the size its shape implies, none overlapping."""
    try:
        with file.open("rb") as f:
            return parse_header(f, file.stat().st_size, file)
    except OSError as error:
        raise DgemmaError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None


def parse_header(f: BinaryIO, size: int, file: Path) -> dict[str, StoredTensor]:
    """The same of a file that need not be here: `f` reads its beginning, `size` is its length. Raises OSError."""
    try:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise DgemmaError(f"{file}: its header should take {length} bytes of a {size}-byte file; {AGAIN}")
        header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(file, 8 + length, raw) for name, raw in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DgemmaError(f"{file}: its header is not valid safetensors ({error}); {AGAIN}") from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start < end or entry.nbytes < 0:
            raise DgemmaError(f"{file}: the data of {name} overlaps another tensor's; {AGAIN}")
        end = entry.start + entry.nbytes
        if end > size:
            raise DgemmaError(f"{file}: {name} ends at byte {end} of a {size}-byte file; {AGAIN}")
    return entries


def _entry(file, data_start, raw):
    shape = tuple(raw["shape"])
    first, last = raw["data_offsets"]
    if not all(isinstance(n, int) and 0 <= n < 2**48 for n in (*shape, first, last)):
        raise ValueError(f"shape {shape} or offsets {first}, {last} are not sizes")
    nbytes = ITEM_BYTES[raw["dtype"]]
    for n in shape:
        nbytes *= n
    if last - first != nbytes:
        raise ValueError(f"{last - first} bytes for a {raw['dtype']} tensor of shape {shape}")
    return StoredTensor(file, raw["dtype"], shape, data_start + first, nbytes)
