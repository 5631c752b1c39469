"""Reopen an MLX folder and measure what the conversion lost, role by role.

Shapes   words (rows, row × bits / 32) uint32, scales and biases (rows, row / group) → (rows, row) float32
Source   MLX's packing: codes follow each other from the lowest bit; OCP microscaling formats (E2M1, E4M3, E8M0);
         tests compare `dequantize` with mlx.core.dequantize
Differs  numpy alone, and settings found as a loader finds them (config.json and `.scales`), never from the plan: a
         mistake of the writer cannot hide in its own reader
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors

from mlx_dgemma.config import parse_config, read_json
from mlx_dgemma.floats import to_float32
from mlx_dgemma.quality import RoleError, TensorError, check_source, failed, role_errors
from mlx_dgemma.shards import stored_tensors
from mlx_dgemma.tensors import check_coverage, check_shape, text_tensors

from .checkpoint import Checkpoint, Weights

PIECE = 1 << 22  # weights compared at a time


def verify_folder(checkpoint: Checkpoint, folder: Path, checked: Callable[[str, int], None]) -> list[RoleError]:
    """Compare every tensor of `folder` with the source. `checked(name, nbytes)` is called after every piece.

    Raises DgemmaError where a tensor is missing, unknown, misshapen, not finite, or not what its precision allows.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    config = parse_config(raw, path)
    block = raw.get("quantization", {})
    if raw.get("quantization_config", {}) != block:
        raise failed(f"{path}: quantization and quantization_config differ")
    weights = Weights(stored_tensors(folder))
    _open_with_safetensors(weights)
    pairs = [(t.role, checkpoint.names[t.hf], t.mlx) for t in text_tensors(config)]
    pairs += [("vision", name, name) for name in checkpoint.vision]
    settings = {mlx: _settings(weights, mlx, block, path) for _, _, mlx in pairs}
    wanted = [name for mlx, found in settings.items() for name in _parts(mlx, found)]
    check_coverage(weights.tensors, wanted, str(folder))
    errors = {}
    for role, source, name in pairs:
        one = _compare(checkpoint.weights, source, weights, name, settings[name], checked)
        errors.setdefault(role, []).append(one)
    return role_errors(errors)


def dequantize(words: np.ndarray, scales: np.ndarray, biases: np.ndarray | None, settings: dict) -> np.ndarray:
    """Packed rows → float32. Affine scales and biases come as float32, the other modes' scales as bytes."""
    bits, group, mode = settings["bits"], settings["group_size"], settings["mode"]
    codes = _unpack(words, bits)
    grouped = codes.reshape(len(codes), -1, group)
    if mode == "affine":
        values = grouped * scales[..., None] + biases[..., None]
    else:
        elements, scale = {
            "mxfp8": (E4M3, E8M0),
            "mxfp4": (E2M1, E8M0),
            "nvfp4": (E2M1, E4M3),
        }[mode]
        values = elements[grouped] * scale[scales][..., None]
    return values.astype(np.float32).reshape(codes.shape)


def _unpack(words, bits):
    """Eight codes take `bits` bytes: read those as one integer and shift. (rows, row) uint8"""
    eights = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1, bits)
    wide = np.zeros((*eights.shape[:2], 8), np.uint8)
    wide[..., :bits] = eights
    shifted = wide.view("<u8") >> (np.arange(8, dtype=np.uint64) * np.uint64(bits))
    return (shifted & np.uint64(2**bits - 1)).astype(np.uint8).reshape(len(words), -1)


def _small_float(exponent_bits, mantissa_bits, bias):
    """Every value of a sign-exponent-mantissa format, by code. (2^(1 + exponent + mantissa) bits,) float32"""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    subnormal = exponent == 0
    magnitude = np.where(subnormal, mantissa, 1 + mantissa) * 2.0 ** (np.where(subnormal, 1, exponent) - bias)
    return np.where(codes >> (exponent_bits + mantissa_bits), -magnitude, magnitude).astype(np.float32)


E2M1 = _small_float(2, 1, bias=1)
E4M3 = _small_float(4, 3, bias=7)
E4M3[[0x7F, 0xFF]] = np.nan
E8M0 = np.append(2.0 ** (np.arange(255) - 127.0), np.nan).astype(np.float32)


def _open_with_safetensors(weights):
    """The format's own library agrees with our reader on every name, dtype and shape."""
    for file in sorted({t.file for t in weights.tensors.values()}):
        ours = {name: (t.dtype, t.shape) for name, t in weights.tensors.items() if t.file == file}
        with safetensors.safe_open(file, "np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dictionary)
        theirs = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        if ours != theirs:
            raise failed(f"{file}: the safetensors library reads another header")


def _settings(weights, name, block, path):
    """Group size, bits and mode of a tensor as a loader finds them; None where it is not quantized."""
    module = name.removesuffix(".weight")
    if f"{module}.scales" not in weights:
        return None
    settings = block.get(module) or {key: block[key] for key in ("group_size", "bits", "mode") if key in block}
    if not {"group_size", "bits"} <= set(settings):
        raise failed(f"{path}: its quantization block has no settings for {module}")
    return {"mode": "affine"} | settings


def _parts(name, settings):
    """The entries that a tensor has in a file."""
    if settings is None:
        return [name]
    module = name.removesuffix(".weight")
    return [name, f"{module}.scales", *([f"{module}.biases"] if settings["mode"] == "affine" else [])]


def _compare(source, source_name, output, name, settings, checked):
    old = source.rows(source_name)
    old_tag, new_tag = source[source_name].dtype, output[name].dtype
    words = output.rows(name)
    if settings is None:
        check_shape(name, output[name].shape, source[source_name].shape, str(output[name].file))
    else:
        scales, biases = _scales(output, name.removesuffix(".weight"), settings, old.shape)
    error = TensorError()
    step = max(1, PIECE // old.shape[-1])
    try:
        for start in range(0, len(old), step):
            rows = slice(start, start + step)
            want = to_float32(old[rows], old_tag)
            check_source(want, source_name, source[source_name].file)
            if settings is None:
                got = to_float32(words[rows], new_tag)
            else:
                got = dequantize(words[rows], scales(rows), biases(rows), settings)
            check_shape(name, got.shape, want.shape, str(output[name].file))
            error.add(want, got)
            checked(name, words[rows].nbytes)
        if settings is None and old_tag == new_tag and error.largest > 0:
            raise ValueError(f"differs from the source by {error.largest}, expected a copy")
        error.check()
    except ValueError as found:
        raise failed(f"{output[name].file}: {name} {found}") from None
    return error


def _scales(output, module, settings, shape):
    """Two functions: rows → scales, rows → biases or None."""

    def reader(part):
        name = f"{module}.{part}"
        array, tag = output.rows(name), output[name].dtype
        check_shape(name, array.shape, (shape[0], shape[1] // settings["group_size"]), str(output[name].file))
        return lambda rows: array[rows] if tag == "U8" else to_float32(array[rows], tag)

    affine = settings["mode"] == "affine"
    return reader("scales"), reader("biases") if affine else lambda rows: None
