"""Runners of the tiny model on either executor, and what to feed them."""

import numpy as np

from gguf_export import Runner
from gguf_export.numpy_executor import NumpyExecutor
from mlx_dgemma.gguf.model import open_gguf

C, V = 16, 384


def runner_of(path, engine="ggml", **options):
    executor = NumpyExecutor(open_gguf(path)) if engine == "numpy" else None
    return Runner(path, "CPU", executor=executor, **options)


def tokens_of(n, seed=0, rows=1):
    return np.random.default_rng(seed).integers(5, V, (rows, n)).astype(np.int32)


def difference(a, b):
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max())
