"""A checkpoint of the released 26B's exact layout whose weights are a small random pool, repeated.

Shapes   1,047 bfloat16 tensors in 11 shards, 51.6 GB; fewer layers with `layers`, the rest as it is
Source   tests/data/diffusiongemma-26b-config.json, mlx_dgemma/tensors.py; shards are cut as huggingface_hub cuts them:
         tensors in the model's order, a new shard where one would pass 5 GB; a shard's tensors lie in order of name
Differs  a vocabulary of the 26B's size grown from the demo's, because the real one is not here. A file system that
         compresses or deduplicates would find the repeats: measure on one that does not.
"""

import itertools
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert.output import appears_when_done, check_free_name
from mlx_dgemma.config import FULL, ModelConfig, parse_config, read_json
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.floats import from_float32
from mlx_dgemma.shards import INDEX
from mlx_dgemma.tensors import Tensor, text_tensors, vision_tensors
from mlx_dgemma.units import human_bytes

ROOT = Path(__file__).parent.parent
RELEASED = ROOT / "tests/data/diffusiongemma-26b-config.json"
DEMO = ROOT / "demo/checkpoint"
SHARD_BYTES = 5_000_000_000  # huggingface_hub's "5GB"
OTHER_BYTES = 20_000_000  # at most: headers, index, tokenizer
# Values of a pool: a prime, so that no row length divides it and equal rows do not repeat at a tensor's pace.
POOL = 4_194_301
# A trained matrix has a few columns and cells far above the rest; they decide the scales of their groups.
OUTLIERS, OUTLIER_SIZE = 1e-3, 8.0


def released_config(layers: int | None = None) -> dict:
    """config.json of the 26B, or of its first `layers` layers. The last one is full attention, as loaders expect."""
    raw = read_json(RELEASED)
    text = raw["text_config"]
    most = text["num_hidden_layers"]
    if layers is not None:
        if not 1 <= layers <= most:
            raise DgemmaError(f"--layers is {layers}, expected 1 to {most}")
        text["layer_types"] = [*text["layer_types"][: layers - 1], FULL]
        text["num_hidden_layers"] = layers
    return raw


def shards_of(config: ModelConfig, limit: int = SHARD_BYTES) -> list[list[Tensor]]:
    """The tensors of each shard, in the order of the model."""
    shards, room = [[]], limit
    for t in (*text_tensors(config), *vision_tensors(config)):
        if 2 * t.size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(t)
        room -= 2 * t.size
    return shards


def make(
    folder: Path,
    raw: dict,
    seed: int = 0,
    limit: int = SHARD_BYTES,
    wrote: Callable[[int], None] = lambda nbytes: None,
) -> dict:
    """Write the checkpoint that `raw`, a config.json, describes; returns what was made.

    wrote: called with the bytes of every piece. Raises DgemmaError with both figures where the disk is too small.
    """
    folder, config = Path(folder), parse_config(raw)
    shards = shards_of(config, limit)
    total = sum(2 * t.size for shard in shards for t in shard)
    check_free_name(folder)
    needed = total + OTHER_BYTES
    check_room(folder, needed, raw)
    files = _other_files(raw, config)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    weight_map = {t.hf: name for name, shard in zip(names, shards, strict=True) for t in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with appears_when_done(folder, needed) as scratch:
        pools = {}
        for name, shard in zip(names, shards, strict=True):
            _write_shard(scratch / name, sorted(shard, key=lambda t: t.hf), pools, seed, wrote)
        for name, content in (files | {INDEX: _json(index)}).items():
            (scratch / name).write_bytes(content)
    return {
        "layers": config.num_hidden_layers,
        "tensors": sum(map(len, shards)),
        "shards": len(shards),
        "bytes": total,
        "seed": seed,
    }


def check_room(folder: Path, needed: int, raw: dict) -> None:
    """Raises DgemmaError that says how many layers there is room for."""
    parent = Path(os.path.abspath(folder)).parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free >= needed:
        return
    text = raw["text_config"]
    here = text["num_hidden_layers"]
    layer = sum(2 * t.size for t in text_tensors(parse_config(raw)) if t.layer == 0)
    fits = here - -(-(needed - free) // layer)  # rounded up
    advice = f"scale it down with --layers {fits}, or choose another disk" if fits >= 1 else "choose another disk"
    raise DgemmaError(
        f"{folder}: a checkpoint of {here} layers needs {human_bytes(needed)} ({needed} bytes) and {human_bytes(free)} "
        f"({free} bytes) are free; {advice}"
    )


def _write_shard(path, tensors, pools, seed, wrote):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for t in tensors:
        header[t.hf] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [end, end + 2 * t.size]}
        end += 2 * t.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            if _kind(t) not in pools:
                pools[_kind(t)] = memoryview(pool(_kind(t), seed)).cast("B")
            for piece in _repeated(pools[_kind(t)], t):
                file.write(piece)
                wrote(len(piece))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # else 52 GB of it push everything else out of memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _repeated(pool, tensor):
    """A tensor's bytes as pieces of the pool, which begins at another place for every tensor."""
    left, start = 2 * tensor.size, 2 * (zlib.crc32(tensor.hf.encode()) % POOL)
    while left:
        piece = pool[start : start + left]
        yield piece
        left -= len(piece)
        start = 0


def pool(kind: str, seed: int = 0) -> np.ndarray:
    """POOL values of one kind of tensor, as the bits of bfloat16. Seeded."""
    rng = np.random.default_rng((zlib.crc32(kind.encode()), seed))
    draw = rng.standard_normal(POOL, np.float32)
    centre, spread = KINDS[kind]
    if not centre:
        draw[rng.random(POOL, np.float32) < OUTLIERS] *= OUTLIER_SIZE
    return from_float32(centre + spread * draw, "BF16")


# Kind of tensor → centre and spread. Matrices about as wide as trained ones, norms and scalars away from zero.
KINDS = {
    "embedding": (0, 0.03),
    "attention": (0, 0.02),
    "dense": (0, 0.02),
    "router": (0, 0.02),
    "expert": (0, 0.02),
    "self_conditioning": (0, 0.02),
    "vision": (0, 0.03),
    "norm": (1.0, 0.1),
    "qk_norm": (0.45, 0.05),
    "scalar": (1.0, 0.02),
}


def _kind(tensor):
    return "qk_norm" if tensor.hf.endswith(("q_norm.weight", "k_norm.weight")) else tensor.role


def _other_files(raw, config):
    """What lies beside the weights: both configurations, tokenizer, chat template."""
    files = {"config.json": _json(raw)}
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        files[name] = (DEMO / name).read_bytes()
    files["tokenizer.json"] = json.dumps(grown_tokenizer(config.vocab_size), ensure_ascii=False).encode()
    return files


def grown_tokenizer(n_tokens: int) -> dict:
    """The demo's tokenizer.json, with pairs of its tokens joined until there are `n_tokens`."""
    raw = read_json(DEMO / "tokenizer.json")
    vocab, merges = raw["model"]["vocab"], raw["model"]["merges"]
    special = {entry["content"] for entry in raw["added_tokens"]}
    # A GGUF vocabulary takes no merge of a newline with other text.
    plain = [text for text in vocab if text not in special and not text.startswith("<") and "\n" not in text]
    for left, right in itertools.product(plain, plain):
        if len(vocab) >= n_tokens:
            break
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append([left, right])
    return raw


def _json(value):
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
