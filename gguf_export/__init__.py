"""GGUF files, the writing half; the graph description and a runner on stock ggml: `python -m gguf_export`.

Names resolve on first use. mlx_dgemma/gguf/ reads the files.
"""

import importlib

_HOMES = {"describe": "graph", "Runner": "runner"}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'gguf_export' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return __all__
