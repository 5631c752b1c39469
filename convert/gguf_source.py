"""A GGUF file as the checkpoint to convert.

Shapes   rows are dequantized to float32 as they are read; a slice of rows costs its own size
Source   mlx_dgemma/gguf/model.py checks the file and reads it
Differs  a tensor may be copied instead of converted, where the target wants the type it has
"""

import json
from pathlib import Path

from gguf_export.verify import GgufRows
from mlx_dgemma.gguf.metadata import SAMPLER_KEYS
from mlx_dgemma.gguf.model import GgufModel, open_gguf
from mlx_dgemma.gguf.types import FLOATS, Type
from mlx_dgemma.gguf.vocabulary import tokenizer_files
from mlx_dgemma.shards import Rows, StoredTensor
from mlx_dgemma.tensors import text_tensors

from .checkpoint import Checkpoint, fingerprint


class GgufWeights:
    """The tensors of one file under their GGUF names, as checkpoint.Weights has a folder's."""

    def __init__(self, model: GgufModel):
        self.model = model
        self.tensors = {t.gguf: t for t in text_tensors(model.config)}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> StoredTensor:
        t = self.tensors[name]
        first = self.model.file.tensors[self.model.parts[name][0]]
        return StoredTensor(self.model.file.path, "F32", t.shape, first.start, 4 * t.size)

    def rows(self, name: str) -> GgufRows:
        return GgufRows(self.model, self.tensors[name])

    def kept_as(self, name: str) -> str:
        """A file whose norms are all bfloat16 numbers was made from a bfloat16 checkpoint, and becomes one again."""
        return self.model.native_dtype

    def bytes_of(self, name: str, type: Type) -> Rows | None:
        file, parts = self.model.file, self.model.parts[name]
        if len(parts) > 1 or file.tensors[parts[0]].type != type:
            return None
        t = file.tensors[parts[0]]
        shape = *t.shape[:-1], type.row_bytes(t.shape[-1])
        return Rows(StoredTensor(file.path, "U8", shape, t.start, t.nbytes))


def open_gguf_source(path: Path) -> Checkpoint:
    """Check everything that can be checked without reading the weights. Raises DgemmaError."""
    seen = {path: fingerprint(path)}
    model = open_gguf(path)
    return Checkpoint(
        path,
        model.file.get("general.name") or path.stem,
        model.raw_config,
        model.config,
        model.generation,
        GgufWeights(model),
        names={t.hf: t.gguf for t in text_tensors(model.config)},
        vision=(),
        files=lambda: _files(model),
        vocabulary=lambda: {k: v for k, v in model.file.metadata.items() if k.startswith("tokenizer.")},
        carried_bytes=path.stat().st_size - sum(t.nbytes for t in model.file.tensors.values()),
        quantized=_quantized_as(model),
        assumed=tuple(key for key in SAMPLER_KEYS if key not in model.file.metadata),
        seen=seen,
    )


def _files(model):
    generation = json.dumps(model.raw_generation, indent=2) + "\n"
    return tokenizer_files(model.file) | {"generation_config.json": generation.encode()}


def _quantized_as(model):
    """The types of its weights: "Q4_K, Q6_K", or nothing."""
    found = {t.type.name for t in model.file.tensors.values()} - set(FLOATS)
    return ", ".join(sorted(found))
