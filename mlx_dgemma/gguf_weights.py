"""A GGUF's tensors → MLX arrays: packed where MLX has the same arithmetic, else as floats.

Shapes   rows of a ggml type (rows, bytes of a row) uint8 → words (rows, row × bits / 32) uint32, scales and biases
         (rows, row / group) float32, or uint8 scales and no biases for the mx and nv modes
Source   ggml-quants.c, dequantize_row_*; MLX's packing: codes follow each other from the lowest bit
Differs  a block's weights are put in MLX's order, its scale and minimum become scale and bias; no value changes:
         mx.dequantize of the result equals ggml's in float32, bit for bit. Scales then take the activations' type, as a
         folder's do, which rounds them: for bfloat16 by up to 0.4 %, one factor for a whole group.

MLX has no groups of 16 with an affine scale (Q6_K, Q3_K, Q2_K) and no codebooks (IQ…): those become floats.
"""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .floats import STORED_AS, cast, from_float32
from .gguf.model import open_gguf
from .gguf.types import FLOATS, Type
from .gguf.values import to_float32
from .tensors import QUANTIZED_ROLES, Tensor, text_tensors
from .tokenizer import Tokenizer
from .units import human_bytes

PIECE = 1 << 20  # weights converted at a time; what numpy makes of them on the way stays in the processor's cache
WORTH_A_NOTE = 0.25  # share of the weights that grow
FLOAT_TAGS = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16"}


class Quantization(NamedTuple):
    """How MLX stores a module."""

    group_size: int
    bits: int
    mode: str

    def nbytes(self, weights: int, scale_bytes: int) -> int:
        """Words, scales and biases."""
        per_group = 2 * scale_bytes if self.mode == "affine" else 1
        return weights * self.bits // 8 + weights // self.group_size * per_group


class Weights(NamedTuple):
    """What a source of weights gives the model."""

    arrays: dict[str, mx.array]  # by MLX name
    quantized: dict[str, Quantization]  # by module path


# Blocks of one type (n, bytes) uint8 → codes as MLX packs them (n, bytes) uint8, scales (n, groups), biases or None.


def _q8_0(blocks):
    scales = _halves(blocks[:, :2])
    return blocks[:, 2:] ^ 0x80, scales, -128 * scales  # int8 + 128


def _q4_0(blocks):
    scales = _halves(blocks[:, :2])
    return _fours(blocks[:, 2:]), scales, -8 * scales


def _q4_1(blocks):
    return _fours(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q5_0(blocks):
    scales = _halves(blocks[:, :2])
    return _fives(_nibbles(blocks[:, 6:]), _bits(blocks[:, 2:6])), scales, -16 * scales


def _q5_1(blocks):
    return _fives(_nibbles(blocks[:, 8:]), _bits(blocks[:, 4:8])), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q4_k(blocks):
    return _fours(blocks[:, 16:].reshape(-1, 4, 32)), *_k_scales(blocks[:, :16])


def _q5_k(blocks):
    # Bit j of byte i belongs to weight i of group j.
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return _fives(_nibbles(blocks[:, 48:].reshape(-1, 4, 32)), fifth), *_k_scales(blocks[:, :16])


def _mxfp4(blocks):
    return _fours(blocks[:, 1:]), blocks[:, :1], None  # E8M0 and E2M1 on both sides


def _nvfp4(blocks):
    return _fours(blocks[:, 4:].reshape(-1, 4, 8)), blocks[:, :4], None  # E4M3 and E2M1 on both sides


class Form(NamedTuple):
    """What MLX calls a ggml type, and how to get there."""

    quantization: Quantization
    repack: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray | None]]


FORMS = {
    "Q8_0": Form(Quantization(32, 8, "affine"), _q8_0),
    "Q5_1": Form(Quantization(32, 5, "affine"), _q5_1),
    "Q5_0": Form(Quantization(32, 5, "affine"), _q5_0),
    "Q4_1": Form(Quantization(32, 4, "affine"), _q4_1),
    "Q4_0": Form(Quantization(32, 4, "affine"), _q4_0),
    "Q5_K": Form(Quantization(32, 5, "affine"), _q5_k),
    "Q4_K": Form(Quantization(32, 4, "affine"), _q4_k),
    "MXFP4": Form(Quantization(32, 4, "mxfp4"), _mxfp4),
    "NVFP4": Form(Quantization(16, 4, "nvfp4"), _nvfp4),
}


def pack(rows: np.ndarray, type: Type) -> tuple[np.ndarray, ...]:
    """Rows of a type in FORMS → words, scales and, for affine ones, biases."""
    codes, *groups = FORMS[type.name].repack(rows.reshape(-1, type.block_bytes))
    words = np.ascontiguousarray(codes).reshape(len(rows), -1).view("<u4")
    return words, *(np.ascontiguousarray(g).reshape(len(rows), -1) for g in groups if g is not None)


def _halves(data):
    """float16 bytes → float32. (n, 2k) → (n, k)"""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _fours(data):
    """4-bit codes in MLX's order. ggml's k bytes hold k weights in their low halves, then k in their high halves;
    MLX's hold neighbours. (…, k) → (…, 2, k / 2)"""
    pairs = np.ascontiguousarray(data).view("<u2")
    low = (pairs & 0x0F) | ((pairs >> 4) & 0xF0)
    high = ((pairs >> 4) & 0x0F) | ((pairs >> 8) & 0xF0)
    return np.stack([low.astype(np.uint8), high.astype(np.uint8)], axis=-2)


def _nibbles(data):
    """ggml's 4-bit codes, one per byte. (…, k) → (…, 2, k)"""
    return np.stack([data & 0x0F, data >> 4], axis=-2)


def _bits(data):
    """One bit per byte, the lowest first. (n, k) → (n, 8k)"""
    return np.unpackbits(data, axis=-1, bitorder="little")


def _fives(low, fifth):
    """5-bit codes, eight in five bytes: low (n, …) has four bits of each, fifth the last. → (n, weights / 8, 5)"""
    codes = low.reshape(len(low), -1) | (fifth.reshape(len(low), -1) << 4)
    eights = codes.view("<u8")  # one code per byte; neighbours close up in three steps, to 10, 20 and 40 bits
    eights = (eights & 0x001F001F001F001F) | ((eights >> 3) & 0x03E003E003E003E0)
    eights = (eights & 0x000003FF000003FF) | ((eights >> 6) & 0x000FFC00000FFC00)
    eights = (eights & 0x00000000000FFFFF) | ((eights >> 12) & 0x000000FFFFF00000)
    return eights.view(np.uint8).reshape(len(low), -1, 8)[..., :5]


def _k_scales(head):
    """Scales and biases of the eight groups of a K block. (n, 16) → (n, 8), (n, 8)"""
    d, dmin = _halves(head[:, :2]), _halves(head[:, 2:4])
    # 6 bits each: four bytes of scales, four of minimums, then four whose low halves continue the scales and high
    # halves the minimums; the upper two bits of the continued ones fill the first eight bytes.
    first, second, rest = head[:, 4:8], head[:, 8:12], head[:, 12:]
    scales = np.concatenate([first & 63, (rest & 15) | ((first >> 6) << 4)], axis=-1)
    minimums = np.concatenate([second & 63, (rest >> 4) | ((second >> 6) << 4)], axis=-1)
    return d * scales, -(dmin * minimums)


class GgufSource:
    """A GGUF file as a source of a model, as loading.FolderSource is a folder."""

    def __init__(self, path: Path):
        self.path = path
        self.gguf = open_gguf(path)
        self.config, self.generation = self.gguf.config, self.gguf.generation

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self.gguf.file, self.config)

    def memory(self, dtype, dequantize: bool) -> tuple[int, bool]:
        """Bytes that the weights take in MLX, and whether some stay packed."""
        forms = [(tensor, self._form(tensor, dequantize)) for tensor in text_tensors(self.config)]
        nbytes = sum(f.nbytes(t.size, dtype.size) if f else t.size * dtype.size for t, f in forms)
        return nbytes, any(form for _, form in forms)

    def notes(self, dtype, dequantize: bool) -> list[str]:
        """What to say before the weights are read."""
        tensors, grown = text_tensors(self.config), Counter()
        for tensor in tensors:
            if self._form(tensor, dequantize) is None:
                grown.update({t.name: tensor.size for t in self._types(tensor)[:1] if t.name not in FLOATS})
        share = grown.total() / sum(tensor.size for tensor in tensors)
        if dequantize or share <= WORTH_A_NOTE:
            return []
        names, float_type = ", ".join(sorted(grown)), str(dtype).removeprefix("mlx.core.")
        size, advice = human_bytes(grown.total() * dtype.size), f"python -m convert {self.path} OUT --recipe q4"
        return [
            f"{names}: MLX has no such form; {share:.0%} of the weights become {float_type}, {size}; for a smaller "
            f"model: {advice}"
        ]

    def weights(self, dtype, dequantize: bool) -> Weights:
        """Every tensor, read. Floats and scales have `dtype`."""
        arrays, quantized = {}, {}
        with ThreadPoolExecutor(_cores()) as pool:
            for tensor in text_tensors(self.config):
                form = self._form(tensor, dequantize)
                module = tensor.mlx.removesuffix(".weight")
                names = [tensor.mlx]
                if form:
                    quantized[module] = form
                    names += [f"{module}.scales", f"{module}.biases"][: 2 if form.mode == "affine" else 1]
                arrays |= zip(names, self._read(tensor, form, FLOAT_TAGS[dtype], pool), strict=True)
        return Weights(arrays, quantized)

    def _types(self, tensor: Tensor) -> list[Type]:
        return [self.gguf.file.tensors[part].type for part in self.gguf.parts[tensor.gguf]]

    def _form(self, tensor, dequantize) -> Quantization | None:
        """How MLX will hold it; None for floats. Experts stored split must have one form to be joined in it."""
        if dequantize or tensor.role not in QUANTIZED_ROLES:
            return None
        forms = {FORMS[t.name].quantization if t.name in FORMS else None for t in self._types(tensor)}
        return forms.pop() if len(forms) == 1 else None

    def _read(self, tensor, form, tag, pool) -> list[mx.array]:
        """The arrays of one tensor, in memory."""
        parts = []
        for name in self.gguf.parts[tensor.gguf]:
            rows = self.gguf.file.rows(name)
            parts.append(_in_pieces(rows, self.gguf.file.tensors[name].type, _packed if form else _floats, tag, pool))
        shape = tensor.shape[:-1]
        if len(parts) == 1:
            return [_to_mlx(array.reshape(*shape, -1)) for (array,) in zip(*parts, strict=True)]
        # Experts stored split: inside each, the gate's rows come first.
        arrays = [[array.reshape(shape[0], -1, array.shape[-1]) for array in part] for part in parts]
        return [_to_mlx(np.concatenate(both, axis=1)) for both in zip(*arrays, strict=True)]


def _in_pieces(rows, type, convert, tag, pool) -> list[np.ndarray]:
    """`convert` over all rows, each piece straight to its place in the result. [(rows, …)]"""
    step = max(1, PIECE * type.block_bytes // (rows.shape[1] * type.block))
    wholes = [np.empty((len(rows), a.shape[1]), a.dtype) for a in convert(rows[:1], type, tag)]

    def work(start):
        for whole, piece in zip(wholes, convert(rows[start : start + step], type, tag), strict=True):
            whole[start : start + step] = piece

    for _ in pool.map(work, range(0, len(rows), step)):
        pass
    return wholes


def _packed(rows, type, tag):
    return [from_float32(a, tag) if a.dtype == np.float32 else a for a in pack(rows, type)]


def _floats(rows, type, tag):
    if type.name in FLOATS:
        return [cast(rows.view(STORED_AS[type.name]), type.name, tag)]
    return [from_float32(to_float32(rows, type), tag)]


def _to_mlx(array):
    """numpy has no bfloat16: those arrays come as bits."""
    return mx.array(array).view(mx.bfloat16) if array.dtype == np.uint16 else mx.array(array)


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
