"""The checkpoint to convert: checked before the first weight is read, then read one tensor at a time.

Shapes   as stored; a BF16 tensor is its uint16 bits (floats.py)
Source   mlx_dgemma/shards.py reads the headers, mlx_dgemma/tensors.py says which tensors there must be;
         gguf_source.py makes the same of a GGUF file
Differs  rows are read when they are asked for, so that a 26B checkpoint costs no memory; and a conversion takes long,
         so it also refuses what a loader survives: holes, trailing bytes, an index that points elsewhere
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from mlx_dgemma.config import GenerationConfig, ModelConfig, parse_config, read_generation_config, read_json
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.floats import Float32Rows
from mlx_dgemma.gguf.reader import Value
from mlx_dgemma.gguf.types import Type
from mlx_dgemma.gguf.vocabulary import vocabulary_metadata
from mlx_dgemma.hub import model_path
from mlx_dgemma.shards import AGAIN, FLOATS, INDEX, Rows, StoredTensor, shard_files, stored_tensors
from mlx_dgemma.tensors import Tensor, check_coverage, check_shape, is_ignored, is_vision, text_tensors

from .plan import expected_vision

# Beside the weights and config.json: what a loader, a tokenizer or a person needs. Carried along as they are.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
SAMPLED_START, SAMPLE, SAMPLES = 1 << 20, 1 << 12, 64  # bytes of a fingerprint, and how many samples
SOURCE_FILES = ["config.json", "*.safetensors", INDEX, *CARRIED]


class Weights:
    """Tensors of safetensors files by name, as `stored_tensors` finds a folder's."""

    def __init__(self, tensors: dict[str, StoredTensor]):
        self.tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[name]

    def rows(self, name: str) -> Rows:
        """One tensor, every axis but the last folded into one; a slice is read when it is taken. (rows, row)"""
        return Rows(self.tensors[name])

    def kept_as(self, name: str) -> str:
        """The dtype of what a recipe does not touch, and of a quantized tensor's scales."""
        return self.tensors[name].dtype

    def bytes_of(self, name: str, type: Type) -> Rows | None:
        """The rows where their bytes are those of that ggml type already; nothing else can be copied."""
        return self.rows(name) if self.tensors[name].dtype == type.name else None


def fingerprint(file: Path) -> str:
    """What tells a local file from a changed one: its size, when it was written, its start and samples of the rest.

    Raises DgemmaError where it cannot be read.
    """
    try:
        stat = file.stat()
        digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        with file.open("rb", buffering=0) as f:
            digest.update(f.read(SAMPLED_START))
            for i in range(SAMPLES + 1):
                f.seek(max(0, stat.st_size - SAMPLE) * i // SAMPLES)
                digest.update(f.read(SAMPLE))
    except OSError as error:
        raise DgemmaError(f"{file}: cannot be read ({error.strerror}), expected a file of the checkpoint") from None
    return digest.hexdigest()


def changed(file: Path) -> DgemmaError:
    return DgemmaError(
        f"{file}: changed while it was converted, expected the same file until the end; "
        "run the conversion again when nothing writes to it any more"
    )


def _at_hand(file: Path) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


class Checkpoint(NamedTuple):
    """A source to convert: complete, with the shapes its configuration implies.

    Its weight files (`weights[name].file` of all tensors) may come and go: the conversion works file by file, enters
    `holding(file)` around everything it reads of that file, and opens no weight file outside of it. A file whose
    tensors are all written already, by an interrupted run, is not entered. Both functions may raise DgemmaError.

    holding: file → context manager inside of which the file is there; by default it always is.
    fingerprint: file → a text that changes with the file's content. Asked for every file before the first is entered
        and again for each one before it is left, so for a file that is not there it comes from elsewhere (an etag).
    seen: the fingerprints from before the headers were read. A plan holds for these files and for no others.
    """

    path: Path  # a folder, or a GGUF file
    name: str  # for general.name
    raw_config: dict
    config: ModelConfig
    generation: GenerationConfig
    weights: "Weights"  # or gguf_source.GgufWeights
    names: dict[str, str]  # Hugging Face name → stored name, text tensors only
    vision: tuple[str, ...]  # stored names
    files: Callable[[], dict[str, bytes]]  # what is carried along, by file name
    vocabulary: Callable[[], dict[str, Value]]  # as GGUF metadata
    carried_bytes: int
    quantized: str = ""  # the types it is quantized to already
    assumed: tuple[str, ...] = ()  # settings it should name and does not
    notes: tuple[str, ...] = ()  # what else a user should know of where it comes from
    held_bytes: int = 0  # of the disk: what the file in hand takes, where files come and go
    holding: Callable[[Path], AbstractContextManager[None]] = _at_hand
    fingerprint: Callable[[Path], str] = fingerprint
    seen: Mapping[Path, str] = MappingProxyType({})

    def values(self, tensor: Tensor) -> Float32Rows:
        """A text tensor's rows as float32."""
        name = self.names[tensor.hf]
        return Float32Rows(self.weights.rows(name), self.weights[name].dtype)


def find_source(src: str | Path, config_only: bool = False) -> Path:
    """The local folder or GGUF file of `src`; a hub id is downloaded first.

    config_only: of a folder on the hub, nothing but config.json; and a config.json alone will do.
    """
    return model_path(src, ["config.json"] if config_only else SOURCE_FILES)


def open_checkpoint(path: Path) -> Checkpoint:
    """A folder's or a GGUF file's. Raises DgemmaError."""
    if path.is_dir():
        return open_folder(path)
    from .gguf_source import open_gguf_source  # builds on this module

    return open_gguf_source(path)


def open_folder(folder: Path) -> Checkpoint:
    """Check everything that can be checked without reading the weights. Raises DgemmaError."""
    folder = Path(folder)
    read_source_config(folder)  # another model is told by its configuration, before its files are
    _check_series(folder)
    seen = {file: fingerprint(file) for file in shard_files(folder)}
    weights = Weights(stored_tensors(folder))
    _check_no_gaps(weights)
    check_index(folder, weights)
    return checkpoint_of(folder, weights)._replace(seen=seen)


def checkpoint_of(folder: Path, weights: Weights) -> Checkpoint:
    """The checkpoint of `folder`'s configuration, tokenizer and other small files, and of `weights`.

    Opens no weight file: these may be elsewhere, as long as their headers are known. Raises DgemmaError where the
    tensors are not those that config.json implies.
    """
    raw, config = read_source_config(folder)
    tensors = text_tensors(config)
    # An unquantized MLX folder is a source too: its experts carry MLX's names.
    names = {t.hf: t.mlx if t.hf not in weights and t.mlx in weights else t.hf for t in tensors}
    hf_name = {stored: hf for hf, stored in names.items()}
    check_coverage([hf_name.get(name, name) for name in weights.tensors], names, str(folder))
    for t in tensors:
        _check_stored(names[t.hf], weights[names[t.hf]], t.shape)
    vision = tuple(name for name in weights.tensors if is_vision(name) and not is_ignored(name))
    if vision:
        expected = {t.hf: t.shape for t in expected_vision(config, folder / "config.json")}
        check_coverage(vision, expected, str(folder))
        for name in vision:
            _check_stored(name, weights[name], expected.get(name, weights[name].shape))
    carried = [folder / name for name in CARRIED if (folder / name).is_file()]
    return Checkpoint(
        folder,
        _name_of(folder),
        raw,
        config,
        read_generation_config(folder),
        weights,
        names,
        vision,
        files=lambda: {file.name: file.read_bytes() for file in carried},
        vocabulary=lambda: vocabulary_metadata(folder, config.vocab_size),
        carried_bytes=sum(file.stat().st_size for file in carried),
    )


def read_source_config(path: Path) -> tuple[dict, ModelConfig]:
    """config.json (or its folder) of a checkpoint that can be converted. Raises DgemmaError where it is quantized."""
    path = path if path.suffix == ".json" else Path(path) / "config.json"
    raw = read_json(path)
    config = parse_config(raw, path)
    for key in ("quantization", "quantization_config"):
        if raw.get(key):
            raise DgemmaError(
                f"{path}: the checkpoint is already quantized ({key} is present), expected bfloat16 or float32 "
                "weights; convert the checkpoint it was made from"
            )
    return raw, config


def _name_of(folder):
    """The folder's name; of a hub snapshot (models--owner--name/snapshots/1a2b3c) the repo's."""
    folder = folder.resolve()
    repo = folder.parent.parent.name
    return repo.rsplit("--", 1)[-1] if folder.parent.name == "snapshots" else folder.name


def _check_series(folder):
    """Without an index, the file names tell how many shards there should be."""
    if (folder / INDEX).exists():
        return
    for file in sorted(folder.glob("*.safetensors")):
        if match := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", file.name):
            stem, _, total = match.groups()
            series = [f"{stem}-{i + 1:05}-of-{total}.safetensors" for i in range(int(total))]
            if missing := [name for name in series if not (folder / name).is_file()]:
                raise DgemmaError(
                    f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(series)}); "
                    "download the checkpoint again"
                )


def _check_no_gaps(weights):
    """The tensors of a file fill it to its last byte; a name given twice in a header leaves a hole."""
    by_file = {}
    for t in weights.tensors.values():
        by_file.setdefault(t.file, []).append(t)
    for file, tensors in by_file.items():
        with file.open("rb") as f:
            data_start = 8 + int.from_bytes(f.read(8), "little")
        size, expected = file.stat().st_size, data_start + sum(t.nbytes for t in tensors)
        if size != expected:
            raise DgemmaError(
                f"{file}: found {size} bytes, expected {expected} for the {len(tensors)} tensors its header names; "
                f"{AGAIN}"
            )


def check_index(folder, weights):
    if not (folder / INDEX).exists():
        return
    for name, file in read_json(folder / INDEX)["weight_map"].items():
        if name not in weights or weights[name].file.name != file:
            where = f"found in {weights[name].file.name}" if name in weights else "not there"
            raise DgemmaError(f"{folder / INDEX}: {name} should be in {file}, {where}; download the checkpoint again")


def _check_stored(name, stored, shape):
    check_shape(name, stored.shape, shape, str(stored.file))
    if stored.dtype not in FLOATS:
        raise DgemmaError(
            f"{stored.file}: {name} is stored as {stored.dtype}, expected one of {', '.join(FLOATS)}; "
            "convert the bfloat16 checkpoint it was made from"
        )
