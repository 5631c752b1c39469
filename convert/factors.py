"""The file between `python -m convert gptq` and `--gptq`: a factor for every matrix that was listened to.

Shapes   by GGUF name (experts, row × (row + 1) / 2) float32: upper triangles, row by row; experts is 1 where all share
         one, and matrices with the same input share an entry
Source   safetensors; gptq.py says what a factor is
Differs  GPTQ's own code goes layer by layer and keeps nothing; a file serves every recipe
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import safetensors

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.shards import Rows, StoredTensor, read_header
from mlx_dgemma.tensors import Tensor

from .plan import Array
from .writer import safetensors_layout

FORMAT = "dgemma-gptq 1"
SAME_INPUT = {"attn_q": "attn_k", "attn_v": "attn_k", "ffn_up": "ffn_gate", "self_cond_up": "self_cond_gate"}
KEPT = 4  # factors in memory at once
AGAIN = "collect it again with `python -m convert gptq`"


def entry_of(tensor: Tensor) -> str:
    """The name of the entry that a tensor shares with those of the same input."""
    part = tensor.gguf_part
    return tensor.gguf.replace(part, SAME_INPUT.get(part, part))


class Factors:
    """An open file. Raises DgemmaError where it is none; threads may share it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise DgemmaError(f"{path}: is no file, expected what `python -m convert gptq` writes")
        try:
            self._entries: dict[str, StoredTensor] = read_header(self.path)
            with safetensors.safe_open(self.path, "np") as file:
                about = file.metadata() or {}
        except (DgemmaError, safetensors.SafetensorError):
            raise DgemmaError(
                f"{path}: is no whole safetensors file, expected what `python -m convert gptq` writes; {AGAIN}"
            ) from None
        if about.get("format") != FORMAT:
            raise DgemmaError(f"{path}: format is {about.get('format')!r}, expected {FORMAT!r}; {AGAIN}")
        self.model = about.get("model", "")  # identity.py
        self.digest = about.get("digest", "")
        self._kept: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, tensor: Tensor) -> tuple[int, Callable[[int], np.ndarray]] | None:
        """How many factors there are for a tensor, and a function of the expert's number; None without an entry.

        Raises DgemmaError where the entry has another size.
        """
        entry = self._entries.get(entry_of(tensor))
        if entry is None:
            return None
        row = tensor.shape[-1]
        numbers = [1] if len(tensor.shape) == 2 else [1, tensor.shape[0]]
        wanted = [(n, row * (row + 1) // 2) for n in numbers]
        if entry.shape not in wanted or entry.dtype != "F32":
            raise DgemmaError(
                f"{self.path}: {entry_of(tensor)} is {entry.dtype} {entry.shape}, expected F32 "
                f"{' or '.join(map(str, wanted))}; it belongs to another model; {AGAIN}"
            )
        return entry.shape[0], lambda expert: self._factor(entry, entry_of(tensor), expert, row)

    def _factor(self, entry, name, expert, row):
        with self._lock:  # also while it is read: another thread most likely wants the same one
            if (name, expert) not in self._kept:
                self._kept[name, expert] = self._read(entry, name, expert, row)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end((name, expert))
            return self._kept[name, expert]

    def _read(self, entry, name, expert, row):
        try:
            factor = unpacked(Rows(entry)[expert : expert + 1][0], row)
        except DgemmaError:
            raise DgemmaError(f"{self.path}: cannot be read to its end; {AGAIN}") from None
        if not (np.isfinite(factor).all() and (np.diag(factor) > 0).all()):
            raise DgemmaError(f"{self.path}: {name} holds what is no factor, expected numbers; {AGAIN}")
        return factor

    def check_unchanged(self) -> None:
        """Raises DgemmaError where the file is not the one that was opened."""
        if Factors(self.path).digest != self.digest:
            raise DgemmaError(
                f"{self.path}: changed while it was used, expected the same file until the end; start again"
            )


def write_factors(
    path: Path, shapes: dict[str, tuple[int, int]], factors: Iterable[np.ndarray], about: dict[str, str]
) -> None:
    """shapes: name → (experts, row). factors: (row, row) each, in that order. about: strings for the header."""
    arrays = [Array(name, "F32", (experts, row * (row + 1) // 2)) for name, (experts, row) in shapes.items()]
    unknown = "0" * 64
    layout, digest = safetensors_layout(arrays, {"format": FORMAT, "digest": unknown, **about}), hashlib.sha256()
    with path.open("wb") as file:
        file.write(layout.header)
        for factor in factors:
            data = packed(factor).tobytes()
            digest.update(data)
            file.write(data)
        file.seek(layout.header.index(unknown.encode()))
        file.write(digest.hexdigest().encode())


def packed(factor: np.ndarray) -> np.ndarray:
    """(row, row) → its upper triangle, (row × (row + 1) / 2,)"""
    return np.concatenate([line[i:] for i, line in enumerate(factor)]).astype(np.float32)


def unpacked(triangle: np.ndarray, row: int) -> np.ndarray:
    """The inverse of `packed`."""
    factor, end = np.zeros((row, row), np.float32), 0
    for i, line in enumerate(factor):
        begin, end = end, end + row - i
        line[i:] = triangle[begin:end]
    return factor


def about_of(model: str, examples: int, canvases: int, seed: int) -> dict[str, str]:
    """What the header says of where the factors are from."""
    return {"model": model, "collected": json.dumps({"examples": examples, "canvases": canvases, "seed": seed})}
