"""What the reference said, in a file: candidates are compared with it one after the other, and never beside it.

Shapes   N canvases, T shares of noise, P passes, C slots, S sampled, L layers, K experts, V vocabulary
Source   the safetensors format, so that other programs can read it; llama.cpp's `llama-perplexity --kl-divergence-base`
         for the idea
Differs  of each canvas a sample of slots is kept whole; of the others the loss, the likeliest token and the experts

A row of V log-probabilities is the size that counts: N × T × P × S of them, in float32 or float16.
"""

import contextlib
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.units import human_bytes

from .quality_scores import PASSES, Reading

FORMAT = {"name": "dgemma-quality-base", "version": 1}
DTYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "U16": np.uint16, "F64": np.float64}
UNTOLD = 65_535  # for experts, where the reference's engine does not tell
WIDE = 2_000_000_000  # bytes up to which log-probabilities are kept in float32


class Base:
    """Arrays on disk, a canvas at a time. `about`: what it is a base of, compared before it is used."""

    def __init__(self, path: Path, about: dict, header: dict, start: int, mode: str):
        self.path, self.about = path, about
        self._arrays = {}
        for name, entry in header.items():
            offset, shape = start + entry["data_offsets"][0], tuple(entry["shape"])
            self._arrays[name] = np.memmap(path, DTYPES[entry["dtype"]], mode, offset, shape)

    @property
    def share_type(self):
        return self._arrays["shares"].dtype

    def put(self, n: int, t: int, p: int, reading: Reading) -> None:
        for name in Reading._fields:
            value = getattr(reading, name)
            self._arrays[name][n, t, p] = UNTOLD if value is None else value

    def get(self, n: int, t: int, p: int) -> Reading:
        reading = Reading(*(self._arrays[name][n, t, p] for name in Reading._fields))
        return reading._replace(experts=None) if (reading.experts == UNTOLD).all() else reading

    @property
    def next_token(self) -> np.ndarray:
        """(instances, 2) float64: the encoder's loss in nats, and over how many tokens"""
        return self._arrays["next_token"]

    def close(self) -> None:
        self._arrays.clear()


def shapes(n_canvases, n_texts, n_shares, slots, config) -> dict[str, tuple[str, tuple]]:
    """Array → type and shape."""
    C, V = config.canvas_length, config.vocab_size
    lead = (n_canvases, n_shares, len(PASSES))
    size = n_canvases * n_shares * len(PASSES) * min(slots, C) * V
    return {
        "shares": ("F32" if 4 * size <= WIDE else "F16", (*lead, min(slots, C), V)),
        "loss": ("F32", (*lead, C)),
        "best": ("I32", (*lead, C)),
        "experts": ("U16", (*lead, C, config.num_hidden_layers, config.top_k_experts)),
        "next_token": ("F64", (n_texts, 2)),
    }


def nbytes(arrays: dict) -> int:
    return sum(int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize for dtype, shape in arrays.values())


def create(path: Path, about: dict, arrays: dict) -> Base:
    """A base to be filled, at its place's .partial until `finish`. Raises DgemmaError where the disk is too small."""
    needed, free = nbytes(arrays), shutil.disk_usage(path.parent).free
    if needed > free - (64 << 20):
        raise DgemmaError(
            f"{path.parent}: {human_bytes(free)} free, expected {human_bytes(needed)} for the reference's "
            "distributions; give --base a place with more, or fewer --canvases or --slots"
        )
    header, at = {}, 0
    for name, (dtype, shape) in sorted(arrays.items(), key=lambda item: -np.dtype(DTYPES[item[1][0]]).itemsize):
        size = int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"about": json.dumps({**FORMAT, **about})}, **header}).encode()
    text += b" " * (-len(text) % 8)
    partial = _partial(path)
    try:
        with open(partial, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            _reserve(file, 8 + len(text) + at)
    except OSError as error:
        raise DgemmaError(f"{path}: cannot be written ({error.strerror}); give another --base") from None
    return Base(partial, about, header, 8 + len(text), "r+")


def finish(base: Base, path: Path) -> Base:
    """The base under its own name, reopened for reading."""
    base.close()
    os.replace(base.path, path)
    return open_base(path)


def open_base(path: Path) -> Base:
    """Raises DgemmaError for what is no base of ours."""
    try:
        with open(path, "rb") as file:
            (n,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(n if n < 1 << 20 else 0))
        about = json.loads(header.pop("__metadata__")["about"])
        if {key: about.pop(key) for key in FORMAT} != FORMAT:
            raise ValueError
        if path.stat().st_size != 8 + n + max(entry["data_offsets"][1] for entry in header.values()):
            raise ValueError
        return Base(path, about, header, 8 + n, "r")
    except OSError as error:
        raise DgemmaError(f"{path}: cannot be read ({error.strerror}); give another --base") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise DgemmaError(
            f"{path}: not a whole base of this program (version {FORMAT['version']}); remove it, or give another --base"
        ) from None


def check_base(base: Base, about: dict) -> None:
    """Raises DgemmaError that names what differs."""
    for key in about:
        if base.about.get(key) != about[key]:
            raise DgemmaError(
                f"{base.path}: made with {key} {base.about.get(key)}, expected {about[key]}; give another --base, or "
                "remove it"
            )


def forget(path: Path) -> None:
    """What an interrupted run left."""
    with contextlib.suppress(OSError):
        _partial(path).unlink()


def _reserve(file, size):
    """A file with holes would end the process where the disk turns out to be full."""
    file.flush()
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
