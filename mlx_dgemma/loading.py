"""A model folder or a GGUF file → model and tokenizer. Reads Hugging Face checkpoints, MLX folders and GGUFs alike.

Source   the MLX layout of mlx-vlm 0.7.10 and mlx-community: `X.weight` (packed), `X.scales`, `X.biases`;
         gguf_weights.py has the GGUF
Differs  a module is quantized where the file holds its scales, and the file's shapes say how; config.json's
         "quantization" block is not consulted, because published folders disagree with it
"""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .config import ModelConfig, read_config, read_generation_config
from .errors import DgemmaError
from .fits import Context, enforce, mlx_refusal, tokens_of
from .gguf_weights import FLOAT_TAGS, GgufSource, Quantization, Weights
from .hub import model_path
from .model import DiffusionGemma
from .products import activations, device_memory
from .shards import FLOATS, StoredTensor, stored_tensors
from .tensors import check_coverage, check_shape, text_tensors
from .tokenizer import Tokenizer
from .units import human_bytes

# How a quantized module without biases is stored: (bits, group size) → MLX's mode.
MODES_WITHOUT_BIASES = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}


def load(
    path_or_repo,
    dtype=None,
    dequantize: bool = False,
    on_note: Callable[[str], None] = lambda note: None,
    *,
    context: Context = None,
    allow_overcommit: bool = False,
) -> tuple[DiffusionGemma, Tokenizer]:
    """Load a model and its tokenizer from a folder, a GGUF file or a hub repo id (or owner/name/FILE.gguf).

    dtype: the activations' type; None means bfloat16 on a GPU and float32 on a CPU, where bfloat16 is slow.
    dequantize: turn quantized weights into `dtype` ones. The values stay the same; memory grows, and float32 steps on a
    CPU with a fast BLAS become several times faster.
    on_note: is told what a user should know before the weights are read, as that a GGUF grows in memory.
    context: tokens of prompt and answer that memory must have room for, or what says how many; by default one canvas.
    allow_overcommit: go on where that does not fit, with a note.
    Raises DgemmaError for what is not a complete DiffusionGemma checkpoint, or cannot fit the device's memory.
    """
    if dtype is not None and dtype not in FLOAT_TAGS:
        raise DgemmaError(f"dtype is {dtype}, expected float32, bfloat16 or float16")
    path = model_path(path_or_repo)
    source = FolderSource(path) if path.is_dir() else GgufSource(path)
    tokenizer = source.tokenizer()
    dtype = dtype or (mx.bfloat16 if mx.default_device().type == mx.gpu else mx.float32)
    for note in source.notes(dtype, dequantize):
        on_note(note)
    tokens = tokens_of(context, tokenizer, source.config, source.generation)
    enforce(_problem(source, dtype, dequantize, tokens), allow_overcommit, on_note)
    model = _build(source, dtype, dequantize)
    model.allow_overcommit = allow_overcommit
    return model, tokenizer


def _problem(source, dtype, dequantize, tokens):
    """Why weights, prefix and a step do not fit; None where they do, or nobody says how much there is."""
    room = device_memory()
    if not room:
        return None
    nbytes, packed = source.memory(dtype, dequantize)
    how = activations(dtype, packed)
    return mlx_refusal(source.config, nbytes, tokens, 1, how, room, f"this device has {human_bytes(room)}")


class FolderSource:
    """A Hugging Face or MLX folder, as gguf_weights.GgufSource is a file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config, self.generation = read_config(folder), read_generation_config(folder)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder, self.config)

    def notes(self, dtype, dequantize: bool) -> list[str]:
        return []

    def memory(self, dtype, dequantize: bool) -> tuple[int, bool]:
        """Bytes that the weights take in MLX, and whether some stay packed."""
        stored = stored_tensors(self.folder)
        quantized = {} if dequantize else check_weights(stored, self.config, self.folder)
        nbytes = 0
        for tensor in text_tensors(self.config):
            module = tensor.mlx.removesuffix(".weight")
            if how := quantized.get(module):
                nbytes += how.nbytes(tensor.size, dtype.size)
            else:
                nbytes += tensor.size * dtype.size
        return nbytes, bool(quantized)

    def weights(self, dtype, dequantize: bool) -> Weights:
        """Every stored array; nothing is read from disk before it is used."""
        stored = stored_tensors(self.folder)
        quantized = check_weights(stored, self.config, self.folder)
        arrays = _read_arrays(stored, self.config)
        if dequantize:
            for path, how in quantized.items():
                parts = [arrays.pop(f"{path}.{part}", None) for part in ("weight", "scales", "biases")]
                arrays[f"{path}.weight"] = mx.dequantize(*parts, **how._asdict()).astype(dtype)
            quantized = {}
        return Weights(arrays, quantized)


def _build(source: FolderSource | GgufSource, dtype, dequantize) -> DiffusionGemma:
    arrays, quantized = source.weights(dtype, dequantize)
    model = DiffusionGemma(source.config, dtype, source.generation)
    nn.quantize(model, class_predicate=lambda path, _: path in quantized and quantized[path]._asdict())
    wanted = {name for name, _ in tree_flatten(model.parameters())}
    model.load_weights([(name, _cast(array, dtype)) for name, array in arrays.items() if name in wanted])
    mx.eval(model.parameters())
    return model.eval()


def _read_arrays(stored, config):
    """Every stored array under its MLX name."""
    arrays = {}
    names = {tensor.hf: tensor.mlx for tensor in text_tensors(config)}
    for file in sorted({entry.file for entry in stored.values()}):
        try:
            found = mx.load(str(file))
        except RuntimeError as error:
            raise DgemmaError(f"{file}: cannot be read ({error}); download it again") from None
        arrays |= {names.get(name, name): array for name, array in found.items()}
    return arrays


def check_weights(stored: dict[str, StoredTensor], config: ModelConfig, where: Path) -> dict[str, Quantization]:
    """Compare stored names and shapes with what config.json implies; returns the quantized modules by path.

    Raises DgemmaError that names the tensor.
    """
    quantized = {}
    wanted = set()
    for tensor in text_tensors(config):
        # Experts carry ".weight" in MLX folders and none in Hugging Face checkpoints.
        name = tensor.mlx if tensor.mlx in stored else tensor.hf
        wanted.add(name)
        module = tensor.mlx.removesuffix(".weight")
        if module + ".scales" in stored and name in stored:
            quantized[module] = _quantization(stored, name, module, tensor.shape, where)
            wanted |= {key for key in (module + ".scales", module + ".biases") if key in stored}
        elif name in stored:
            check_shape(name, stored[name].shape, tensor.shape, str(where))
            if stored[name].dtype not in FLOATS:
                raise DgemmaError(
                    f"{where}: {name} is stored as {stored[name].dtype}, expected {', '.join(FLOATS)} or an MLX "
                    "quantization; convert the original checkpoint"
                )
    check_coverage(stored, wanted, str(where))
    return quantized


def _quantization(stored, name, module, shape, where):
    """Bits, group size and mode of one module, from the shapes of its packed weight and its scales."""
    packed, scales = stored[name], stored[module + ".scales"]
    fits = packed.dtype == "U32" and len(packed.shape) == len(scales.shape) == len(shape)
    if fits and packed.shape[:-1] == scales.shape[:-1] == shape[:-1] and packed.shape[-1] and scales.shape[-1]:
        bits, rest = divmod(packed.shape[-1] * 32, shape[-1])
        group_size, group_rest = divmod(shape[-1], scales.shape[-1])
        has_biases = module + ".biases" in stored
        mode = "affine" if has_biases else MODES_WITHOUT_BIASES.get((bits, group_size))
        if mode and not rest and not group_rest:
            if has_biases:
                check_shape(module + ".biases", stored[module + ".biases"].shape, scales.shape, str(where))
            return Quantization(group_size, bits, mode)
    raise DgemmaError(
        f"{where}: {name} has shape {packed.shape} and scales {scales.shape}, which no quantization of "
        f"{shape} gives; convert the checkpoint again"
    )


def _cast(array, dtype):
    """Floating arrays take the activations' type; packed weights and the 8-bit scales of the mx modes stay."""
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
