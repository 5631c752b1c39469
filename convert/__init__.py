"""Convert a DiffusionGemma checkpoint: `convert.convert(src, out, to="gguf", recipe="Q4_K_M")`, or `python -m convert`.

Names resolve on first use, so that Ctrl-C works from the command's first moment.
"""

import importlib

_HOMES = {"convert": "api", "Planned": "api", "Resumed": "api", "Worked": "api", "Report": "api", "TARGETS": "recipes"}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'convert' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return __all__
