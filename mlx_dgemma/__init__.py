"""DiffusionGemma on MLX: `load`, `generate`, `stream`, `infill`, `edit`, `decide`.

Names resolve on first use, so that `mlx_dgemma.config`, `.tensors`, `.noise` and `.tokenizer` import without MLX.
"""

import importlib

_HOMES = {
    "load": "loading",
    "generate": "api",
    "stream": "api",
    "infill": "api",
    "edit": "api",
    "decide": "api",
    "make_session": "api",
    "DgemmaError": "errors",
    "GenerationConfig": "config",
    "StepDone": "events",
    "BlockDone": "events",
    "Done": "events",
}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'mlx_dgemma' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return __all__
