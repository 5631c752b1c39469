"""What a stored copy of the weights lost against its source, role by role; means with their standard errors.

Shapes   rows of both sides, float32, compared piece by piece
Source   the usual relative root-mean-square error; both verifiers (MLX folder, GGUF file) use it
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import DgemmaError
from .floats import is_finite
from .gguf.reader import read_gguf
from .shards import FLOATS, Rows, StoredTensor, stored_tensors
from .tensors import ROLES, is_ignored, is_vision

# Far above what any type loses on real weights (2 bits: about 0.3), far below scrambled ones (about 1.4).
MAX_RELATIVE_ERROR = 0.6
SCANNED = 1 << 22  # numbers looked at in one piece


class RoleError(NamedTuple):
    """What one role lost. relative_rms = rms(written − source) / rms(source)"""

    role: str
    tensors: int
    relative_rms: float
    max_abs: float


class TensorError:
    """Sums over the pieces of one tensor."""

    def __init__(self):
        self.squared_error = self.squared = self.largest = 0.0

    def add(self, want: np.ndarray, got: np.ndarray) -> None:
        """One piece. Raises ValueError where `got` is not finite."""
        error = np.abs(got - want)
        if not np.isfinite(error).all():
            raise ValueError("is not finite")
        self.largest = max(self.largest, float(error.max(initial=0.0)))
        self.squared_error += float(np.square(error, dtype=np.float64).sum())
        self.squared += float(np.square(want, dtype=np.float64).sum())

    def check(self) -> None:
        """Raises ValueError where this is not the same tensor at all."""
        if self.squared_error > MAX_RELATIVE_ERROR**2 * self.squared:
            raise ValueError(f"has a relative error of {math.sqrt(self.squared_error / self.squared):.2f}")


def check_source(values: np.ndarray, name: str, file) -> None:
    if not np.isfinite(values).all():
        raise not_finite(name, file)


def not_finite(name: str, file) -> DgemmaError:
    return DgemmaError(f"{file}: {name} holds infinity or NaN, expected numbers; download the checkpoint again")


def first_bad_tensor(path: str | Path) -> str | None:
    """The first stored tensor of a folder's or GGUF's text model that holds infinity or NaN; None where none does.

    Of what is packed, scales and biases of a folder are looked at, blocks of a GGUF are not. Reads all floats, a piece
    at a time. Raises DgemmaError.
    """
    path = Path(path)
    if path.is_dir():
        tensors = stored_tensors(path)
    else:
        found = read_gguf(path).tensors
        tensors = {name: StoredTensor(path, t.type.name, t.shape, t.start, t.nbytes) for name, t in found.items()}
    for name, t in tensors.items():
        # Nothing computes with the vision tower, and a clipping bound of it may be infinite.
        if t.dtype in FLOATS and not is_vision(name) and not is_ignored(name) and not _is_finite(Rows(t)):
            return name
    return None


def _is_finite(rows):
    n = max(1, SCANNED // max(rows.shape[1], 1))
    return all(is_finite(rows[i : i + n], rows.stored.dtype) for i in range(0, len(rows), n))


def role_errors(by_role: dict[str, list[TensorError]]) -> list[RoleError]:
    """One line per role, in the order of ROLES."""
    lines = []
    for role in (role for role in ROLES if role in by_role):
        errors = by_role[role]
        squared = sum(e.squared for e in errors)
        relative = math.sqrt(sum(e.squared_error for e in errors) / squared) if squared else 0.0
        lines.append(RoleError(role, len(errors), relative, max(e.largest for e in errors)))
    return lines


def error_table(errors: list[RoleError]) -> str:
    """For people: a line per role."""
    lines = [f"{'role':<18}{'tensors':>8}{'relative error':>16}{'largest':>12}"]
    lines += [f"{e.role:<18}{e.tensors:>8,}{e.relative_rms:>16.6f}{e.max_abs:>12.6f}" for e in errors]
    return "\n".join(lines)


def failed(found: str) -> DgemmaError:
    return DgemmaError(f"verification failed: {found}. If this project wrote it, please report it as a defect")


def ratio(total: np.ndarray, count: np.ndarray, instance: np.ndarray) -> tuple[float, float | None] | None:
    """sum(total) / sum(count) and its standard error: (N,) each, the N canvases being of these instances.

    Canvases of one instance are not independent; instances are. No standard error with one instance, and nothing at
    all without a count or where a total is not finite.
    """
    totals, counts = np.bincount(instance, total), np.bincount(instance, count)
    if not counts.sum() or not np.isfinite(totals).all():
        return None
    mean, m = totals.sum() / counts.sum(), np.count_nonzero(counts)
    if m == 1:
        return float(mean), None
    spread = np.square(totals - mean * counts).sum() * m / (m - 1)
    return float(mean), float(np.sqrt(spread) / counts.sum())
