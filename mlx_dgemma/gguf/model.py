"""The text model in a GGUF file, checked against the table of tensors: configuration, places and values of tensors.

Shapes   rows of a tensor with every axis but the last folded into one: (rows, row) float32
Source   tensors.py for names and shapes; llama.cpp pull request 24423 for what a file may hold besides
Differs  experts whose gate and up are stored apart, which Gemma 4 readers accept too, are read as the fused tensor
"""

import dataclasses
import functools
import reprlib
from pathlib import Path

import numpy as np

from ..config import GenerationConfig, ModelConfig, parse_config, parse_generation_config
from ..errors import DgemmaError
from ..tensors import Tensor, text_tensors
from . import rope
from .metadata import TOKENS, read_metadata
from .reader import GgufFile, read_gguf
from .types import FLOATS, TYPES, Type
from .values import to_float32

FUSED, SPLIT = "ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps")
NEXT = "the file is not a whole DiffusionGemma text model; convert the checkpoint again, or download another file"


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """What `open_gguf` found.

    parts: a tensor's GGUF name → the stored tensors it is made of: itself, or the experts' gate and up.
    """

    file: GgufFile
    raw_config: dict  # config.json
    raw_generation: dict  # generation_config.json
    config: ModelConfig
    generation: GenerationConfig
    parts: dict[str, tuple[str, ...]]

    def types(self, tensor: Tensor) -> tuple[Type, ...]:
        """One type per stored part."""
        return tuple(self.file.tensors[name].type for name in self.parts[tensor.gguf])

    def rows(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` in float32. (rows, row)"""
        names = self.parts[tensor.gguf]
        if len(names) == 1:
            return self._values(names[0], slice(start, stop))
        per_expert = tensor.shape[1] // 2  # rows of gate, then as many of up
        wanted = np.arange(tensor.size // tensor.shape[-1])[start:stop]
        expert, row = np.divmod(wanted, 2 * per_expert)
        part, row = np.divmod(row, per_expert)
        out = np.empty((len(wanted), tensor.shape[-1]), np.float32)
        for i, name in enumerate(names):
            out[part == i] = self._values(name, (expert * per_expert + row)[part == i])
        return out

    @property
    def quantized(self) -> bool:
        return any(t.type.name not in FLOATS for t in self.file.tensors.values())

    @functools.cached_property
    def native_dtype(self) -> str:
        """What the file was made from, which the norms tell, since no recipe quantizes them: "BF16" or "F32"."""
        return "BF16" if all(_is_bfloat16(self._values(name, slice(None))) for name in self._vectors()) else "F32"

    def _vectors(self):
        stored = (self.file.tensors[name] for names in self.parts.values() for name in names)
        return [t.name for t in stored if t.type.name == "F32" and len(_axes(t.shape)) <= 1]

    def _values(self, name, rows):
        return to_float32(self.file.rows(name)[rows], self.file.tensors[name].type)


def open_gguf(path: str | Path) -> GgufModel:
    """Read a file's header and check that it is the whole text model. Raises DgemmaError."""
    return check_model(read_gguf(path))


def check_model(file: GgufFile) -> GgufModel:
    """The model of a file that was read. Raises DgemmaError."""
    raw_config, raw_generation = read_metadata(file)
    config = parse_config(raw_config, file.path)
    generation = parse_generation_config(raw_generation, file.path)
    _check_vocabulary(file, config)
    parts = {t.gguf: _parts(file, t) for t in text_tensors(config)}
    _check_coverage(file, parts)
    for t in text_tensors(config):
        for name in parts[t.gguf]:
            _check_tensor(file, name, t.shape if len(parts[t.gguf]) == 1 else _half(t.shape))
    return GgufModel(file, raw_config, raw_generation, config, generation, parts)


def _parts(file, tensor):
    """The names a tensor is stored under, whether they are there or not."""
    split = tuple(tensor.gguf.replace(FUSED, name) for name in SPLIT)
    is_split = tensor.gguf_part == FUSED and tensor.gguf not in file.tensors and split[0] in file.tensors
    return split if is_split else (tensor.gguf,)


def _check_coverage(file, parts):
    wanted = {name for names in parts.values() for name in names}
    missing, unknown = sorted(wanted - set(file.tensors)), sorted(set(file.tensors) - wanted - {rope.NAME})
    for what, names in (("missing", missing), ("unknown", unknown)):
        if names:
            n = f"{len(names)} tensors are" if len(names) > 1 else "1 tensor is"
            raise DgemmaError(f"{file.path}: {n} {what}, as {names[0]}, expected {len(wanted)} in all; {NEXT}")


def _check_tensor(file, name, shape):
    stored = file.tensors[name]
    if _axes(stored.shape) != _axes(shape):
        raise DgemmaError(
            f"{file.path}: {name} has shape {stored.shape}, expected {shape} as the metadata implies; {NEXT}"
        )
    if stored.type.name not in TYPES:
        raise DgemmaError(f"{file.path}: {name} is {stored.type.name}, expected one of {', '.join(TYPES)}; {NEXT}")


def _check_vocabulary(file, config):
    """Fewer tokens than rows are fine, as in a folder: the ids behind the last token are never a prompt's."""
    tokens = file.get(TOKENS, [])
    if not isinstance(tokens, list):
        raise DgemmaError(f"{file.path}: {TOKENS} is {reprlib.repr(tokens)}, expected a list; {NEXT}")
    if len(tokens) > config.vocab_size:
        raise DgemmaError(
            f"{file.path}: the vocabulary has {len(tokens)} tokens and token_embd.weight {config.vocab_size} rows, "
            f"expected a row for each token; {NEXT}"
        )


def _axes(shape):
    """A shape without leading ones: (1, 64) holds what (64,) does, and a scalar is (1,) or ()."""
    return shape[next((i for i, n in enumerate(shape) if n > 1), len(shape)) :]


def _half(shape):
    experts, rows, row = shape
    return experts, rows // 2, row


def _is_bfloat16(values):
    return not (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any()
