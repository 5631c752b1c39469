"""The devices a ggml library can compute on, by ggml's names: CPU, CUDA0, Metal, Vulkan0.

Source   ggml-backend.h
"""

import ctypes
import re
from typing import NamedTuple

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.fits import ram

from .ggml import ADVICE, DeviceProps, Ggml, need_ggml

KINDS = {0: "cpu", 1: "gpu", 2: "integrated gpu", 3: "accelerator", 4: "several"}
GPUS = ("gpu", "integrated gpu")


class Device(NamedTuple):
    name: str
    kind: str
    description: str
    free: int  # bytes; of the CPU, what fits.py leaves a run, since ggml counts all memory as free
    total: int  # bytes
    maps: bool  # computes on the file's own pages, without a copy
    handle: int  # ggml's own


def open_ggml() -> Ggml:
    """The library, its devices found. Raises DgemmaError where there is none, or one too old."""
    library = need_ggml("running a graph takes ggml")
    library.open_backends()
    return library


def check_version(description: dict, library: Ggml) -> None:
    """Raises DgemmaError where the library is older than the description asks for."""
    wanted, found = description["ggml_min"], library.version()
    if _numbers(found) < _numbers(wanted):
        raise DgemmaError(f"{library.file}: ggml {found}, the description asks for {wanted} or newer; {ADVICE}")


def _numbers(version):
    return [int(number) for number in re.findall(r"\d+", version)]


def devices(library: Ggml) -> list[Device]:
    """All of them, in ggml's order."""
    return [_device(library, library.ggml_backend_dev_get(i)) for i in range(library.ggml_backend_dev_count())]


def choose(library: Ggml, name: str = "auto") -> Device:
    """A device by name, in any case; "auto" is the first GPU, else the CPU. Raises DgemmaError that lists them."""
    found = devices(library)
    if name == "auto":
        return next((d for d in found if d.kind in GPUS), None) or cpu(found)
    for device in found:
        if device.name.lower() == name.lower():
            return device
    raise DgemmaError(
        f"device {name!r} is not here, expected auto or one of {', '.join(d.name for d in found)}; for another, set "
        f"GGML_LIBRARY to a ggml that has it (docs/llama_cpp.md); this one is {library.file}"
    )


def cpu(found: list[Device]) -> Device:
    """The CPU, which computes what another device cannot. Raises DgemmaError."""
    for device in found:
        if device.kind == "cpu":
            return device
    raise DgemmaError(
        "ggml finds no CPU device, expected libggml-cpu beside libggml; install a whole llama.cpp release"
    )


def memory_of(library: Ggml, handle: int) -> tuple[int, int]:
    """Bytes free now, and in all; 0 and 0 where the device does not say."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    library.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def _device(library, handle):
    props = DeviceProps()
    library.ggml_backend_dev_get_props(handle, ctypes.byref(props))
    kind = KINDS.get(library.ggml_backend_dev_type(handle), "other")
    registry = library.ggml_backend_reg_name(library.ggml_backend_dev_backend_reg(handle)).decode()
    # A card of its own may take host memory too, but would read it over the bus at every step.
    shares_memory = kind in ("cpu", "integrated gpu") or registry in ("Metal", "MTL")
    free, total = memory_of(library, handle)
    if kind == "cpu":
        free = min(free, ram() or free)
    return Device(
        library.ggml_backend_dev_name(handle).decode(),
        kind,
        library.ggml_backend_dev_description(handle).decode(errors="replace"),
        free,
        total,
        bool(props.buffer_from_host_ptr) and shares_memory,
        handle,
    )
