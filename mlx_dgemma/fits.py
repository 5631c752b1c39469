"""What a run takes against what there is: said, and refused, before weights are read. One wording for both engines.

Shapes   B rows, T tokens computed at once, K keys they see, C canvas slots, H hidden, V vocabulary, E experts
Source   MLX 0.32's allocator, whose peak tests/test_fit.py compares with `mlx_step`; docs/memory.md has the figures
Differs  for a GPU `mlx_step` is counted, not measured: nothing is unpacked there, but MLX lets go of a result only when
         its command buffer is done. gguf_export/memory.py counts for ggml

Knows no MLX but in `mlx_device`, so that a plan needs none.
"""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from .config import GenerationConfig, ModelConfig
from .errors import DgemmaError
from .floats import STORED_AS
from .tensors import QUANTIZED_ROLES, text_tensors
from .tokenizer import Tokenizer
from .units import human_bytes

PREFILL_CHUNK = 512  # prompt tokens encoded at once: bounds the memory of attention scores
# How attention and the vocabulary pass cut what is long; long_attention.py and vocabulary.py have the same numbers.
CHUNK_KEYS, FEW_KEYS = 512, 4096
BLOCK, BLOCKS, CPU_CHUNK, GPU_CHUNK = 64, 512, 1 << 19, 1 << 21
FLOAT_TAGS = ("BF16", "F16", "F32")
OVERCOMMIT = "--allow-overcommit tries it all the same"
# Bits of experts and self-conditioning in the mixtures of convert/recipes_mlx.py, for the one an error advises.
MIXTURES = {"q8": (8, 8), "q6": (6, 6), "q5": (5, 5), "q4": (4, 4), "q3": (3, 4)}
REST, GROUP = 8, 64  # bits of all that is no expert; weights that share a scale and a bias
SYSTEM = 1 << 30  # bytes of a machine's memory that its system keeps; an eighth where that is less
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Need(NamedTuple):
    """Bytes that a run must find on its device."""

    weights: int
    prefix: int  # keys and values
    step: int  # most that a step, or encoding the prompt, computes in

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self):
        parts = zip(("weights", "keys and values", "computing"), self, strict=True)
        return ", ".join(f"{name} {human_bytes(n)}" for name, n in parts)


class Machine(NamedTuple):
    """Where MLX computes here."""

    name: str
    memory: int | None  # bytes; None where nobody says
    on_cpu: bool


class Activations(NamedTuple):
    """How MLX computes: on which kind of device, in which numbers, with packed weights or not."""

    number_bytes: int
    on_cpu: bool
    packed: bool


# Tokens of prompt and answer: a number, or what finds it once tokenizer and sampler settings are known.
Context = int | Callable[[Tokenizer, ModelConfig, GenerationConfig], int] | None


def tokens_of(context: Context, tokenizer: Tokenizer, config: ModelConfig, generation: GenerationConfig) -> int:
    """At least one canvas."""
    found = context(tokenizer, config, generation) if callable(context) else context
    return max(found or 0, config.canvas_length)


def refusal(need: Need, room: int, where: str, what: str, advice: Iterable[str]) -> str | None:
    """Why a run does not fit, and what would; None where it does. where: "GPU0 has 8.00 GB". what: "4096 tokens"."""
    if need.total <= room:
        return None
    return f"{where}, expected {human_bytes(need.total)} for {what} ({need}); {'; or '.join([*advice, OVERCOMMIT])}"


def enforce(problem: str | None, allow_overcommit: bool, on_note: Callable[[str], None]) -> None:
    """Raises DgemmaError; or says the same as a note, where somebody asked to go on."""
    if problem and not allow_overcommit:
        raise DgemmaError(problem)
    if problem:
        on_note(problem.removesuffix(OVERCOMMIT).removesuffix("; or "))


def most_tokens(need: Callable[[int], Need], room: int, limit: int, canvas: int) -> int:
    """The most tokens up to `limit`, in whole canvases, that fit; 0: not even one. `need` grows with tokens."""
    low, high = 0, limit // canvas
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if need(middle * canvas).total <= room else (low, middle - 1)
    return low * canvas


def ram() -> int | None:
    """Bytes that a run on the CPU may use: the machine's memory less the system's part, or its container's limit.

    None where nobody says.
    """
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found.append(whole - min(SYSTEM, whole // 8))
    for limit in CGROUPS:
        try:
            found.append(int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(found, default=None)


def mlx_machine() -> Machine | None:
    """MLX's default device; None where MLX does not install."""
    try:
        import mlx.core as mx
    except ImportError:
        return None
    from .products import device_memory, on_cpu

    return Machine(str(mx.device_info().get("device_name", "this device")), device_memory(), on_cpu())


# What is counted for MLX


def stored_bytes(arrays: Iterable[tuple[str, tuple[int, ...]]], number_bytes: int) -> int:
    """What stored arrays (safetensors' tag, shape) take in MLX: floats get the activations' type, the others stay."""
    return sum(
        math.prod(shape) * (number_bytes if tag in FLOAT_TAGS else STORED_AS[tag]().itemsize) for tag, shape in arrays
    )


def mixture_bytes(config: ModelConfig, bits: tuple[int, int], number_bytes: int) -> int:
    """What the weights of one of MIXTURES take in MLX."""
    expert, self_conditioning = bits
    total = 0
    for t in text_tensors(config):
        if t.role in QUANTIZED_ROLES and t.shape[-1] % 32 == 0:
            n = {"expert": expert, "self_conditioning": self_conditioning}.get(t.role, REST)
            groups = t.size // (GROUP if t.shape[-1] % GROUP == 0 else 32)
            total += t.size * n // 8 + groups * 2 * number_bytes
        else:
            total += t.size * number_bytes
    return total


def mlx_refusal(
    config: ModelConfig, weights: int, tokens: int, rows: int, how: Activations, room: int, where: str
) -> str | None:
    """`refusal` for MLX: advises the largest mixture that would fit, or how many tokens would."""
    need = mlx_need(config, weights, tokens, rows, how)
    if need.total <= room:
        return None
    advice = []
    for name, bits in MIXTURES.items():
        smaller = mixture_bytes(config, bits, how.number_bytes)
        if smaller < weights and need.total - weights + smaller <= room:
            advice.append(f"choose a smaller recipe ({name} would fit, with {human_bytes(smaller)} of weights)")
            break
    most = most_tokens(lambda n: mlx_need(config, weights, n, rows, how), room, tokens, config.canvas_length)
    if most:
        advice.append(f"ask for fewer tokens ({most} would fit, prompt and answer)")
    if not advice:
        advice.append("no recipe for MLX would; see `python -m convert fit`")
    what = f"{rows} rows of {tokens} tokens" if rows > 1 else f"{tokens} tokens"
    return refusal(need, room, where, what, advice)


def mlx_need(config: ModelConfig, weights: int, tokens: int, rows: int, how: Activations) -> Need:
    """`rows` rows of `tokens` tokens each, prompt and answer."""
    C = config.canvas_length
    step = max(prefill_step(config, tokens, rows, how), mlx_step(config, rows, C, max(0, tokens - C), True, how))
    return Need(weights, prefix_bytes(config, rows, tokens, how.number_bytes), step)


def prefill_step(config: ModelConfig, tokens: int, rows: int, how: Activations) -> int:
    """As mlx_step, of encoding `tokens` tokens: its last whole chunk, and what is left."""
    whole, rest = divmod(tokens, PREFILL_CHUNK)
    passes = [(PREFILL_CHUNK, (whole - 1) * PREFILL_CHUNK)] * (whole > 0) + [(rest, tokens - rest)] * (rest > 0)
    return max(mlx_step(config, rows, T, prefix, False, how) for T, prefix in passes)


def prefix_bytes(config: ModelConfig, rows: int, tokens: int, number_bytes: int) -> int:
    """Keys and values, as cache.py keeps them."""
    kept = [
        2 * layer.num_key_value_heads * layer.head_dim
        * (min(tokens, config.sliding_window - 1) if layer.is_sliding else tokens)
        for layer in config.layers
    ]  # fmt: skip
    return rows * number_bytes * sum(kept)


def mlx_step(config: ModelConfig, rows: int, T: int, prefix: int, vocabulary: bool, how: Activations) -> int:
    """Most bytes alive at once, weights and prefix aside, while T tokens of each row pass the layers.

    prefix: tokens before them. vocabulary: the pass over it follows, as in a step.
    """
    M, kinds = rows * T, {layer.is_sliding: layer for layer in config.layers}.values()
    stages = [_layer(config, layer, rows, T, prefix, how) for layer in kinds]
    if vocabulary:
        stages.append(_vocabulary(config, M, how))
    return round(SLACK * (max(stages) + RESIDUALS * 4 * M * config.hidden_size))


# On a CPU MLX prepares some fifty operations ahead of those that run, each with memory of its own, and a packed matrix
# is unpacked in float32. How many arrays of a kind that leaves alive at once was measured; these numbers bound it.
ONE_CHUNK, CHUNKS = (9.5, 0.5), (12, 2)  # scores, and arrays like the queries: one chunk of keys; three or more
UNPACKED = 2  # copies of a matrix while it is unpacked
RESIDUALS = 6  # (M, H) arrays around a stage
SLACK = 1.05
# On a GPU nothing is unpacked, and a result lives until its command buffer is done. Ten of those wait at most, each
# with about 50 MB of inputs: two layers of the 26B, or four chunks of its vocabulary.
LAYERS_AHEAD, CHUNKS_AHEAD, BYTES_AHEAD = 2, 4, 500_000_000


def _layer(config, layer, rows, T, prefix, how):
    H, F, I = config.hidden_size, config.moe_intermediate_size, config.intermediate_size  # noqa: E741
    M, heads = rows * T, config.num_attention_heads
    pairs, Q = M * config.top_k_experts, heads * layer.head_dim
    keys = T + (min(prefix, config.sliding_window - 1) if layer.is_sliding else prefix)
    around = 2 * rows * layer.num_key_value_heads * layer.head_dim * keys * how.number_bytes  # the prefix, joined
    around += rows * T * keys * (1 if rows == 1 else 4)  # masks
    chunks = -(-keys // CHUNK_KEYS)
    scores = 4 * rows * heads * T * min(keys, CHUNK_KEYS)  # of one chunk
    if not how.on_cpu:
        # Up to FEW_KEYS MLX makes all scores at once: as they are, masked, and as shares. A long prefix was short once.
        seen = 3 * how.number_bytes * rows * heads * T * min(keys, FEW_KEYS)
        seen = max(seen, 6 * scores * chunks * (keys > FEW_KEYS))
        others = 5 * M * Q + 14 * M * H + 8 * M * I + 4 * pairs * H + 10 * pairs * F
        return around + LAYERS_AHEAD * (how.number_bytes * others + min(seen, max(BYTES_AHEAD, 6 * scores)))
    more = min(1, (chunks - 1) / 2)
    of_scores, of_queries = (a + more * (b - a) for a, b in zip(ONE_CHUNK, CHUNKS, strict=True))
    attended, matrix = of_scores * scores + of_queries * 4 * M * Q, 4 * Q * H * how.packed
    attention = around + max(attended + matrix, 0.6 * attended + UNPACKED * matrix)
    experts = 4 * pairs * (H + 10 * F) + 3 * 4 * 2 * F * H * how.packed
    dense = 8 * 4 * M * I + 2 * UNPACKED * 4 * I * H * how.packed
    return max(attention, experts, dense)


def _vocabulary(config, M, how):
    block = math.gcd(config.vocab_size, max(BLOCK, config.vocab_size // BLOCKS))
    elements = CPU_CHUNK if how.on_cpu else GPU_CHUNK
    chunk = min(config.vocab_size, max(1, elements // (M * block)) * block)
    masses = 4 * 4 * M * config.vocab_size // block
    if not how.on_cpu:
        return masses + CHUNKS_AHEAD * 12 * 4 * M * chunk
    if how.packed:
        return masses + 7 * 4 * M * chunk + 2 * UNPACKED * 4 * chunk * config.hidden_size
    return masses + 14 * 4 * M * chunk
