"""ggml through ctypes, on a library somebody else compiled: found once, its functions typed.

Source   ggml.h of ggml 0.26. xllamacpp's wheel is one shared object that exports all of it; llama.cpp's releases,
         Homebrew and llama-cpp-python ship libggml-base, libggml-cpu and libggml side by side
Differs  only what quantization needs is bound; in the split form that is libggml-base

Searched in this order: GGML_LIBRARY (a file, or a folder of libraries), xllamacpp, llama-cpp-python.
"""

import ctypes
import functools
import importlib.util
import os
import sys
from pathlib import Path

from mlx_dgemma.errors import DgemmaError

SUFFIXES = {"darwin": ".dylib", "win32": ".dll"}

ADVICE = "pip install 'dgemma[ggml]', or set GGML_LIBRARY to the libraries of a llama.cpp release"

_pointer, _int, _int64, _size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
FUNCTIONS = {
    # type, source, destination, first weight, rows, weights per row, importance per column or null → bytes written
    "ggml_quantize_chunk": (_size, _int, _pointer, _pointer, _int64, _int64, _int64, _pointer),
    "ggml_row_size": (_size, _int, _int64),
    "ggml_validate_row_data": (ctypes.c_bool, _int, _pointer, _size),
}


class Ggml:
    """The functions of one library, as attributes."""

    def __init__(self, file: Path):
        self.file = file
        try:
            library = ctypes.CDLL(str(file))
        except OSError as error:
            raise DgemmaError(f"{file}: cannot be loaded as ggml ({error}); {ADVICE}") from None
        for name, (result, *arguments) in FUNCTIONS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise DgemmaError(f"{file}: exports no {name}, expected a ggml library; {ADVICE}") from None
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)


@functools.cache
def find_ggml() -> Ggml | None:
    """The library, or None where none is installed. Raises DgemmaError where the one that was found does not work."""
    if named := os.environ.get("GGML_LIBRARY"):
        path = Path(named).expanduser()
        file = path if path.is_file() else _base_library(path)
        if file is None:
            raise DgemmaError(
                f"GGML_LIBRARY is {named}, expected a ggml library or a folder that holds {_file_name('ggml-base')}"
            )
        return Ggml(file)
    for folder in _package_folders("xllamacpp"):
        if file := next(iter(sorted(folder.glob("xllamacpp*.so"))), None):  # also on macOS; its Windows wheel has none
            return Ggml(file)
    for folder in _package_folders("llama_cpp"):
        if file := _base_library(folder / "lib"):
            return Ggml(file)
    return None


def need_ggml(what: str) -> Ggml:
    """The library; `what` needs it. Raises DgemmaError that names the extra."""
    library = find_ggml()
    if library is None:
        raise DgemmaError(f"{what}: only ggml can quantize to this, and it is not installed; {ADVICE}")
    return library


def _base_library(folder):
    """The file of the split form, with or without a version behind its name: libggml-base.so.0.26.0"""
    name = _file_name("ggml-base")
    return next(iter(sorted(folder.glob(name + "*"))), None)


def _file_name(stem):
    return f"{'' if sys.platform == 'win32' else 'lib'}{stem}{SUFFIXES.get(sys.platform, '.so')}"


def _package_folders(package):
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
