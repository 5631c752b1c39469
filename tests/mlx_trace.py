"""What every module of the MLX model computed, under the names that the graph description gives the same values.

Source   mlx_dgemma/tensors.py: a product with weight X.weight is node X
Differs  experts are left out: MLX sorts their rows by expert
"""

import contextlib

import mlx.nn as nn
import numpy as np

from mlx_dgemma.layers import RMSNorm
from mlx_dgemma.model import DiffusionGemma, Layer
from mlx_dgemma.tensors import text_tensors


@contextlib.contextmanager
def traced(model: DiffusionGemma):
    """Yields a dictionary of node name → array that fills as the model is called."""
    nodes = {t.mlx.removesuffix(".weight"): t.gguf.removesuffix(".weight") for t in text_tensors(model.config)}
    nodes |= {f"model.decoder.layers.{i}": f"blk.{i}.layer_out" for i in range(model.config.num_hidden_layers)}
    names = {id(module): nodes[path] for path, module in model.named_modules() if path in nodes}
    seen, originals = {}, {}

    def watch(kind):
        originals[kind] = kind.__call__

        def call(self, *arguments):
            result = originals[kind](self, *arguments)
            if id(self) in names:
                seen[names[id(self)]] = np.array(result)
            return result

        kind.__call__ = call

    for kind in (nn.Linear, RMSNorm, Layer):
        watch(kind)
    try:
        yield seen
    finally:
        for kind, original in originals.items():
            kind.__call__ = original
