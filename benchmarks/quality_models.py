"""Models before they are loaded: which engine computes them, how large they are, whether they can be compared.

Source   configurations and vocabularies of folders and GGUF files; no weights are read but for a fingerprint
Differs  a model is named PATH or ENGINE:PATH; a folder is MLX's and a .gguf ggml's unless it says otherwise
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

from mlx_dgemma.config import GenerationConfig, ModelConfig, read_config, read_generation_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.gguf.model import open_gguf
from mlx_dgemma.hub import model_path
from mlx_dgemma.shards import stored_tensors
from mlx_dgemma.tensors import is_vision, text_tensors
from mlx_dgemma.tokenizer import Tokenizer

WHOLE, PIECE, PIECES = 64 << 20, 1 << 16, 256  # a larger file's fingerprint is that of pieces
ENGINES = ("mlx", "ggml", "transformers")


class About(NamedTuple):
    """A model before it is loaded."""

    name: str  # as it was given
    engine: str
    path: Path
    form: str  # "MLX", "GGUF" or "Hugging Face"
    config: ModelConfig
    settings: GenerationConfig
    tokenizer: Tokenizer
    nbytes: int  # of the text model's weights
    fingerprint: str  # of the files that hold them


def about(name: str) -> About:
    """What is known of a model without loading it. Raises DgemmaError."""
    engine, colon, rest = name.partition(":")
    if not colon:
        engine, rest = None, name
    elif engine not in ENGINES:
        raise DgemmaError(f"{name}: engine {engine!r} is not known, expected PATH or one of " + ", ".join(
            f"{known}:PATH" for known in ENGINES))  # fmt: skip
    path = model_path(rest)
    is_file = path.is_file()
    engine = engine or ("ggml" if is_file else "mlx")
    if engine == "ggml" and not is_file:
        raise DgemmaError(f"{name}: found a folder, ggml expects a GGUF file; convert it with `python -m convert`")
    if engine == "transformers":
        if is_file:
            raise DgemmaError(f"{name}: found a file, transformers expects a checkpoint folder; use ggml: or mlx:")
        for module in ("torch", "transformers"):
            if importlib.util.find_spec(module) is None:
                raise DgemmaError(f"{name}: {module} is not installed; pip install '.[reference]' brings it")
    form, nbytes, files = _of_file(path) if is_file else _of_folder(path)
    if engine == "transformers" and form == "MLX":
        raise DgemmaError(f"{name}: found an MLX folder, which transformers cannot read; leave its engine out")
    if is_file:
        gguf = open_gguf(path)
        config, settings, tokenizer = gguf.config, gguf.generation, Tokenizer.from_gguf(gguf.file, gguf.config)
    else:
        config, settings = read_config(path), read_generation_config(path)
        tokenizer = Tokenizer(path, config)
    return About(name, engine, path, form, config, settings, tokenizer, nbytes, _fingerprint(files))


def _of_file(path):
    return "GGUF", sum(t.nbytes for t in open_gguf(path).file.tensors.values()), [path]


def _of_folder(path):
    """The vision tower, which some folders carry along, is not counted."""
    stored = stored_tensors(path)
    text = {name: entry for name, entry in stored.items() if not is_vision(name)}
    # What only MLX's layout has: packed weights, or experts with ".weight" at their names.
    mlx = any(name.endswith((".scales", "experts.down_proj.weight")) for name in text)
    files = sorted({entry.file for entry in stored.values()})
    return "MLX" if mlx else "Hugging Face", sum(t.nbytes for t in text.values()), [*files, path / "config.json"]


def _fingerprint(files) -> str:
    """Sizes and contents; of a large file its beginning and pieces all over it."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if len(files) > 2 else ''} {size}".encode())
        with open(file, "rb") as stream:
            if size <= WHOLE:
                digest.update(stream.read())
                continue
            digest.update(stream.read(4 << 20))
            for i in range(PIECES):
                stream.seek(i * (size - PIECE) // (PIECES - 1))
                digest.update(stream.read(PIECE))
    return digest.hexdigest()


def check_alike(reference: About, candidate: About) -> None:
    """Raises DgemmaError where two models' distributions cannot be compared."""
    ours, theirs = reference.config, candidate.config
    for what, a, b in (
        ("a canvas of {} slots", ours.canvas_length, theirs.canvas_length),
        ("a vocabulary of {} tokens", ours.vocab_size, theirs.vocab_size),
    ):
        if a != b:
            raise DgemmaError(
                f"{candidate.name}: found {what.format(b)}, expected {what.format(a)} as {reference.name} has; compare "
                "models made from one checkpoint"
            )
    one, other = reference.tokenizer.vocabulary, candidate.tokenizer.vocabulary
    for i in range(min(one.size, other.size)):
        if one.token(i) != other.token(i):
            raise DgemmaError(
                f"{candidate.name}: found another vocabulary, token {i} is {other.token(i)!r}, expected "
                f"{one.token(i)!r} as {reference.name} has; compare models made from one checkpoint"
            )


def arithmetic(model: About, dtype: str | None = None) -> str:
    """How `load` will have it computed."""
    if model.engine == "ggml":
        return "as in use"
    if model.engine == "transformers":
        return dtype or "float32"
    from mlx_dgemma.products import device_memory, on_cpu

    dtype = dtype or ("float32" if on_cpu() else "bfloat16")
    wide = 4 * sum(tensor.size for tensor in text_tensors(model.config))
    dequantized = on_cpu() and dtype == "float32" and wide < (device_memory() or 0) / 2
    return f"{dtype}, dequantized" if dequantized else dtype
