"""The three floating-point formats of a checkpoint, as numpy arrays.

Shapes   any
Source   safetensors' dtype tags; numpy has no bfloat16, so a BF16 array is the uint16 view of its bits
"""

import numpy as np

STORED_AS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "U32": np.uint32, "U8": np.uint8}
TORCH_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def to_float32(array: np.ndarray, tag: str) -> np.ndarray:
    """An array stored as `tag` → its exact values in float32."""
    if tag == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def from_float32(values: np.ndarray, tag: str) -> np.ndarray:
    """float32 → `tag`, rounded to nearest, ties to even."""
    if tag != "BF16":
        return values.astype(STORED_AS[tag])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    # Rounding would carry a NaN's all-ones payload into the sign bit.
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def cast(array: np.ndarray, source: str, target: str) -> np.ndarray:
    """Stored as `source` → stored as `target`; the same tag keeps every bit."""
    return array if source == target else from_float32(to_float32(array, source), target)


def is_finite(array: np.ndarray, tag: str) -> bool:
    """No number of an array stored as `tag` is infinity or NaN."""
    if tag != "BF16":
        return bool(np.isfinite(array).all())
    magnitudes = array & np.uint16(0x7FFF)  # without the sign; infinity is 0x7F80, a NaN above
    return int(magnitudes.max(initial=0)) < 0x7F80


class Float32Rows:
    """Rows of a tensor stored as `tag`, converted to float32 when a slice is taken. (rows, row)"""

    def __init__(self, stored: np.ndarray, tag: str):
        self.stored, self.tag = stored, tag

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return to_float32(self.stored[rows], self.tag)
