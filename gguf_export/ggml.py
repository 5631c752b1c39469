"""ggml through ctypes, on a library somebody else compiled: found once, its functions typed on first use.

Source   ggml.h, ggml-backend.h of ggml 0.26. xllamacpp's wheel is one shared object that exports all of it; llama.cpp's
         releases, Homebrew and llama-cpp-python ship libggml-base, libggml and one library per backend side by side
Differs  every struct stays opaque but the three that are passed by value, so another version's layout does no harm

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

OLDEST = "0.25"
ADVICE = "pip install xllamacpp, or set GGML_LIBRARY to the libraries of a llama.cpp release"

_pointer, _int, _int64, _size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_float, _bool, _text = ctypes.c_float, ctypes.c_bool, ctypes.c_char_p
_sizes = ctypes.POINTER(_size)


class InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (("mem_size", _size), ("mem_buffer", _pointer), ("no_alloc", _bool))


LogCallback = ctypes.CFUNCTYPE(None, _int, _text, _pointer)
EvalCallback = ctypes.CFUNCTYPE(_bool, _pointer, _bool, _pointer)


class DeviceProps(ctypes.Structure):
    """struct ggml_backend_dev_props of ggml 0.15 to 0.26, and room for what a later one may add."""

    _fields_ = (
        ("name", _text), ("description", _text), ("memory_free", _size), ("memory_total", _size), ("type", _int),
        ("device_id", _text), ("async", _bool), ("host_buffer", _bool), ("buffer_from_host_ptr", _bool),
        ("later", ctypes.c_uint8 * 253),
    )  # fmt: skip


class TensorLayout(ctypes.Structure):
    """struct ggml_tensor, as ggml 0.15 to 0.26 lay it out; op_tests.py checks that a library does."""

    _fields_ = (
        ("type", _int), ("buffer", _pointer), ("ne", _int64 * 4), ("nb", _size * 4), ("op", _int),
        ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32), ("src", _pointer * 10),
    )  # fmt: skip


def _unary(n=1):
    """A function of a context and n tensors."""
    return (_pointer, *[_pointer] * (n + 1))


# Name → result, arguments.
# fmt: off
QUANTIZE = {
    # type, source, destination, first weight, rows, weights per row, importance per column or null → bytes written
    "ggml_quantize_chunk": (_size, _int, _pointer, _pointer, _int64, _int64, _int64, _pointer),
    "ggml_row_size": (_size, _int, _int64),
    "ggml_validate_row_data": (_bool, _int, _pointer, _size),
}
GRAPH = {
    "ggml_init": (_pointer, InitParams), "ggml_free": (None, _pointer),
    "ggml_tensor_overhead": (_size,), "ggml_graph_overhead_custom": (_size, _size, _bool),
    "ggml_new_tensor": (_pointer, _pointer, _int, _int, ctypes.POINTER(_int64)),
    "ggml_new_graph_custom": (_pointer, _pointer, _size, _bool),
    "ggml_build_forward_expand": (None, _pointer, _pointer), "ggml_graph_n_nodes": (_int, _pointer),
    "ggml_set_input": (None, _pointer), "ggml_set_output": (None, _pointer),
    "ggml_set_name": (_pointer, _pointer, _text), "ggml_nbytes": (_size, _pointer), "ggml_get_name": (_text, _pointer),
    "ggml_op_desc": (_text, _pointer), "ggml_log_set": (None, LogCallback, _pointer), "ggml_version": (_text,),
}
OPERATIONS = {
    **{f"ggml_{name}": _unary() for name in (
        "cont", "argmax", "cumsum", "sum_rows", "log", "tanh", "silu", "step", "geglu")},
    **{f"ggml_{name}": _unary(2) for name in (
        "get_rows", "mul_mat", "out_prod", "add", "sub", "mul", "div", "geglu_split", "cpy")},
    **{f"ggml_{name}": _unary(3) for name in ("set_rows", "mul_mat_id")},
    **{f"ggml_{name}": (*_unary(), _int) for name in ("argsort", "argsort_top_k", "top_k", "cast")},
    "ggml_rms_norm": (*_unary(), _float),
    "ggml_scale_bias": (*_unary(), _float, _float), "ggml_clamp": (*_unary(), _float, _float),
    "ggml_rope_ext": (*_unary(3), _int, _int, _int, *[_float] * 6),
    "ggml_flash_attn_ext": (*_unary(4), _float, _float, _float),
    "ggml_prec_set_acc": (_bool, _pointer, _int),
    "ggml_soft_max_ext": (*_unary(2), _float, _float),
    "ggml_reshape_4d": (*_unary(), *[_int64] * 4), "ggml_repeat_4d": (*_unary(), *[_int64] * 4),
    "ggml_view_4d": (*_unary(), *[_int64] * 4, *[_size] * 4),
    "ggml_permute": (*_unary(), *[_int] * 4), "ggml_pad": (*_unary(), *[_int] * 4),
    "ggml_arange": (_pointer, _pointer, _float, _float, _float),
}
BACKEND = {
    "ggml_backend_load_all_from_path": (None, _text), "ggml_backend_dev_count": (_size,),
    "ggml_backend_dev_get": (_pointer, _size), "ggml_backend_dev_name": (_text, _pointer),
    "ggml_backend_dev_description": (_text, _pointer), "ggml_backend_dev_type": (_int, _pointer),
    "ggml_backend_dev_get_props": (None, _pointer, ctypes.POINTER(DeviceProps)),
    "ggml_backend_dev_memory": (None, _pointer, _sizes, _sizes), "ggml_backend_dev_init": (_pointer, _pointer, _text),
    "ggml_backend_dev_buffer_type": (_pointer, _pointer), "ggml_backend_dev_backend_reg": (_pointer, _pointer),
    "ggml_backend_dev_supports_op": (_bool, _pointer, _pointer),
    "ggml_backend_dev_buffer_from_host_ptr": (_pointer, _pointer, _pointer, _size, _size),
    "ggml_backend_reg_name": (_text, _pointer), "ggml_backend_reg_get_proc_address": (_pointer, _pointer, _text),
    "ggml_backend_free": (None, _pointer), "ggml_backend_alloc_ctx_tensors_from_buft": (_pointer, _pointer, _pointer),
    "ggml_backend_buffer_free": (None, _pointer), "ggml_backend_buffer_get_size": (_size, _pointer),
    "ggml_backend_buffer_set_usage": (None, _pointer, _int),
    "ggml_backend_buffer_clear": (None, _pointer, ctypes.c_uint8),
    "ggml_backend_tensor_alloc": (_int, _pointer, _pointer, _pointer),
    "ggml_backend_tensor_set": (None, _pointer, _pointer, _size, _size),
    "ggml_backend_tensor_get": (None, _pointer, _pointer, _size, _size),
    "ggml_backend_tensor_copy": (None, _pointer, _pointer),
    "ggml_backend_sched_new": (_pointer, ctypes.POINTER(_pointer), _pointer, _int, _size, _bool, _bool),
    "ggml_backend_sched_free": (None, _pointer), "ggml_backend_sched_alloc_graph": (_bool, _pointer, _pointer),
    "ggml_backend_sched_graph_compute": (_int, _pointer, _pointer),
    "ggml_backend_sched_get_buffer_size": (_size, _pointer, _pointer),
    "ggml_backend_sched_get_n_splits": (_int, _pointer),
    "ggml_backend_sched_get_tensor_backend": (_pointer, _pointer, _pointer),
    "ggml_backend_sched_set_eval_callback": (None, _pointer, EvalCallback, _pointer),
}
# fmt: on
FUNCTIONS = {**QUANTIZE, **GRAPH, **OPERATIONS, **BACKEND}


class Ggml:
    """The functions of one library, as attributes."""

    def __init__(self, file: Path):
        self.file = file
        self._libraries = [_open(file)]
        self._keep = []  # callbacks that C holds on to
        self.bind(QUANTIZE)

    def bind(self, functions: dict) -> None:
        """Type these functions. Raises DgemmaError that names the first one missing."""
        for name, (result, *arguments) in functions.items():
            function = next((f for f in (getattr(x, name, None) for x in self._libraries) if f is not None), None)
            if function is None:
                raise DgemmaError(
                    f"{self.file}: exports no {name}, expected a ggml library of version {OLDEST} or newer; {ADVICE}"
                )
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def open_backends(self) -> None:
        """Bind all there is to run graphs, and let ggml look for devices. Raises DgemmaError."""
        if hasattr(self, "ggml_backend_dev_count"):
            return
        if not hasattr(self._libraries[0], "ggml_backend_load_all_from_path"):
            self._libraries += _registry_libraries(self.file)
        self.bind({**GRAPH, **OPERATIONS})
        self.messages: list[str] = []
        callback = LogCallback(lambda level, text, _: self._hear(level, text))
        self._keep.append(callback)
        self.ggml_log_set(callback, None)
        self.bind(BACKEND)
        # Backends lie beside the library; where that is a link, as Homebrew's are, beside what it leads to.
        folders = dict.fromkeys([self.file.parent, self.file.resolve().parent])
        for folder in folders:
            if self.ggml_backend_dev_count() == 0:
                self.ggml_backend_load_all_from_path(str(folder).encode())
        if self.ggml_backend_dev_count() == 0:
            places = " or ".join(map(str, folders))
            raise DgemmaError(f"{self.file}: finds no device; expected {_file_name('ggml-cpu')}… in {places}; {ADVICE}")

    def layout(self, tensor: int) -> TensorLayout:
        """A tensor's own fields. Only what exports ggml's numbers needs them."""
        return TensorLayout.from_address(tensor)

    def version(self) -> str:
        return self.ggml_version().decode()

    def _hear(self, level, text):
        """ggml's warnings and errors, for messages of ours; the rest would only disturb a live view."""
        if level in (3, 4):  # GGML_LOG_LEVEL_WARN, _ERROR
            self.messages = [*self.messages[-9:], (text or b"").decode(errors="replace").strip()]


def _open(file):
    try:
        return ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise DgemmaError(f"{file}: cannot be loaded as ggml ({error}); {ADVICE}") from None


def _registry_libraries(base):
    """libggml beside libggml-base: it knows the backends. Its name may carry a version: libggml.so.0.26.0"""
    stem, suffix = _file_name("ggml").split(".")
    found = [_open(file) for file in sorted(base.parent.glob(f"{stem}.*")) if f".{suffix}" in file.suffixes]
    if not found:
        raise DgemmaError(f"{base.parent}: holds no {_file_name('ggml')}, expected it beside {base.name}; {ADVICE}")
    return found


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
    """The library; `what` says who needs it. Raises DgemmaError that names the extra."""
    library = find_ggml()
    if library is None:
        raise DgemmaError(f"{what}, and it is not installed; {ADVICE}")
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
