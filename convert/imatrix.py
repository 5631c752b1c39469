"""The importance matrix: how much each input channel of a matrix matters, in llama.cpp's GGUF form.

Shapes   `<tensor>.in_sum2` (experts, row) and `<tensor>.counts` (experts, 1), float32; experts is 1 for a matrix
Source   llama.cpp: tools/imatrix (writes), common/imatrix-loader.cpp and tools/quantize (read)
Differs  experts whose gate and up are stored apart have the same inputs, so either's entry serves the fused tensor.
         A channel that was always zero keeps a trace of importance: where a block has none, ggml writes zeros
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from gguf_export.writer import GgufWriter
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.reader import GgufFile, Value, read_gguf
from mlx_dgemma.gguf.types import TYPES

SUMS, COUNTS = ".in_sum2", ".counts"
FUSED, SPLIT = "ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps")
TRACE = 1e-6  # of the mean importance
NEXT = "collect it again with `python -m convert imatrix`"


class Entry(NamedTuple):
    sums: np.ndarray  # (experts, row) float32: squared inputs, summed
    counts: np.ndarray  # (experts,) float32: how many inputs


class Imatrix(NamedTuple):
    path: Path | None  # None: collected, not stored yet
    entries: dict[str, Entry]  # by GGUF tensor name
    datasets: tuple[str, ...] = ()
    chunks: int = 0  # what was read, in pieces of chunk_size tokens
    chunk_size: int = 0

    def weights(self, name: str, experts: int, row: int) -> np.ndarray | None:
        """(experts, row) float32: mean squared inputs; ones where an expert saw nothing; None without an entry.

        Raises DgemmaError where the entry has another size.
        """
        entry = next((self.entries[key] for key in _names(name) if key in self.entries), None)
        if entry is None:
            return None
        # Files made from llama.cpp's older form have one count, and the experts in one line.
        if entry.sums.size != experts * row or len(entry.counts) not in (1, experts):
            raise DgemmaError(
                f"{self.path}: {name} has importance for {entry.sums.shape} (experts, columns), expected "
                f"{(experts, row)}; the importance matrix belongs to another model"
            )
        return _weights(entry.sums.reshape(experts, row), entry.counts[:, None])


def read_imatrix(path: Path) -> Imatrix:
    """Raises DgemmaError where the file is no importance matrix or holds what cannot be one."""
    file = read_gguf(path)
    if file.get("general.type") != "imatrix":
        found = file.get("general.architecture") or file.get("general.type")
        raise DgemmaError(f"{path}: holds {found!r}, expected an importance matrix (general.type imatrix); {NEXT}")
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    entries = {name: _entry(file, name) for name in names}
    if not entries:
        raise DgemmaError(f"{path}: holds no {SUMS} tensor, expected one per matrix; {NEXT}")
    datasets = tuple(_value(file, "imatrix.datasets", "arr[str]", ()))
    sizes = (_value(file, f"imatrix.{key}", "u32", 0) for key in ("chunk_count", "chunk_size"))
    return Imatrix(Path(path), entries, datasets, *sizes)


def write_imatrix(imatrix: Imatrix, path: Path) -> None:
    """One file, in the order of the entries' names."""
    metadata = {
        "general.architecture": Value("str", "diffusion-gemma"),
        "general.type": Value("str", "imatrix"),
        "imatrix.datasets": Value("arr[str]", list(imatrix.datasets) or ["unnamed"]),  # gguf-py writes no empty list
        "imatrix.chunk_count": Value("u32", imatrix.chunks),
        "imatrix.chunk_size": Value("u32", imatrix.chunk_size),
    }
    arrays = {}
    for name, entry in sorted(imatrix.entries.items()):
        arrays |= {name + SUMS: entry.sums, name + COUNTS: entry.counts[:, None]}
    with GgufWriter(path, metadata, [(name, TYPES["F32"], a.shape) for name, a in arrays.items()]) as writer:
        for name, array in arrays.items():
            writer.append(name, np.ascontiguousarray(array, np.float32))


def _weights(sums, counts):
    """sums (experts, row), counts (experts or 1, 1) → (experts, row)"""
    seen = (counts > 0) & (sums.max(axis=1, keepdims=True) > 0)
    mean = np.divide(sums, counts, out=np.ones_like(sums), where=seen)
    return np.maximum(mean, TRACE * mean.mean(axis=1, keepdims=True))


def _value(file, key, kind, default):
    """Nothing depends on these: one of another type counts as missing."""
    value = file.metadata.get(key)
    return value.value if value and value.type == kind else default


def _names(name):
    """The names an entry for a tensor may have."""
    return (name, *(name.replace(FUSED, part) for part in SPLIT)) if FUSED in name else (name,)


def _entry(file: GgufFile, name):
    sums = _floats(file, name + SUMS)
    if name + COUNTS not in file.tensors:
        raise DgemmaError(f"{file.path}: {name} has sums and no counts, expected both; {NEXT}")
    counts = _floats(file, name + COUNTS).ravel()
    if len(counts) != len(sums):
        raise DgemmaError(f"{file.path}: {name} has {len(counts)} counts for {len(sums)} rows of sums; {NEXT}")
    if not (np.isfinite(sums).all() and np.isfinite(counts).all() and (sums >= 0).all() and (counts >= 0).all()):
        raise DgemmaError(f"{file.path}: {name} holds values that are no sums of squares; {NEXT}")
    return Entry(sums, counts)


def _floats(file, name):
    if file.tensors[name].type.name != "F32":
        raise DgemmaError(f"{file.path}: {name} is {file.tensors[name].type.name}, expected F32; {NEXT}")
    return np.array(file.rows(name)).view(np.float32)
