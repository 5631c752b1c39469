"""float32 rows → rows of a ggml type.

Shapes   (rows, row) float32 → (rows, bytes of a row) uint8; importance: (row,) float32, how much each column matters
Source   ggml_quantize_chunk for what has a search in it; gguf.quants (gguf-py) for the simple types where ggml is not
         installed, byte for byte the same (tests/test_quantize.py)
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mlx_dgemma.gguf.types import FLOATS, Type

from .ggml import find_ggml, need_ggml

# What numpy can do without ggml, as long as no importance is given.
SIMPLE = (*FLOATS, "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4")
# ggml's MXFP4 and Q8_0 take no importance.
IGNORE_IMPORTANCE = (*FLOATS, "Q8_0", "MXFP4")


def check_can_quantize(types: set[str], importance: bool) -> None:
    """Raises DgemmaError that names the extra, before anything is read, where a type needs ggml and there is none."""
    hard = sorted(t for t in types if t not in SIMPLE or (importance and t not in IGNORE_IMPORTANCE))
    if hard:
        need_ggml(
            f"{', '.join(hard)}{' with an importance matrix' if importance else ''}: only ggml can quantize to this"
        )


def quantize(
    values: np.ndarray, type: Type, importance: np.ndarray | None = None, threads: int | None = None
) -> np.ndarray:
    """One piece of a tensor, on every core or on `threads`. Raises DgemmaError where ggml is needed and missing."""
    values = np.ascontiguousarray(values, np.float32)
    if type.name in IGNORE_IMPORTANCE:
        importance = None
    if type.name in FLOATS or (find_ggml() is None and importance is None and type.name in SIMPLE):
        return _with_numpy(values, type)
    library = need_ggml(f"{type.name}: only ggml can quantize to this")
    rows, row = values.shape
    out = np.empty((rows, type.row_bytes(row)), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if weights is None else weights.ctypes.data
    threads = threads or cores()
    # More pieces than threads, since some rows take longer.
    step = rows if threads == 1 else max(1, -(-rows // (4 * threads)))

    def work(first):
        n = min(step, rows - first)
        # ctypes lets go of the interpreter's lock, so the threads do run side by side.
        return library.ggml_quantize_chunk(
            type.number, values.ctypes.data, out.ctypes.data, first * row, n, row, pointer
        )

    if threads == 1:
        written = work(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            written = sum(pool.map(work, range(0, rows, step)))
    if written != out.nbytes:
        raise AssertionError(f"ggml wrote {written} bytes of {type.name}, expected {out.nbytes}")
    return out


def quantizer() -> str:
    """Who quantizes here, as a text that changes with it: ggml's library or, where there is none, gguf-py."""
    library = find_ggml()
    if library is None:
        from importlib.metadata import version

        return f"gguf-py {version('gguf')}"
    stat = library.file.stat()
    return f"{library.file.name} of {stat.st_size} bytes, {stat.st_mtime_ns}"


def _with_numpy(values, type):
    import gguf

    return gguf.quantize(values, gguf.GGMLQuantizationType[type.name]).view(np.uint8)


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
