"""How much each group of weights matters: the KL it costs when that group alone is rounded.

Shapes   B canvases, each at one share of noise, C canvas slots, S slots looked at, V vocabulary
Source   canvases and noise of examples.py; the KL of two passes, the second with self-conditioning from the first
Differs  mlx-optiq and others measure a causal pass over clean text. Here a group is rounded for encoder and decoder
         alike, and judged where it is used: on corrupted slots of canvases

A group is a role in a layer (`blk.3.attention`), each of a layer's expert tensors (`blk.3.ffn_down_exps`), or a role
that no layer has (`embedding`). auto.py turns the result into a recipe.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.layers import PackedLinear
from mlx_dgemma.model import DiffusionGemma
from mlx_dgemma.noise import NoiseStream
from mlx_dgemma.products import Packing
from mlx_dgemma.session import left_padded
from mlx_dgemma.tensors import Tensor
from mlx_dgemma.tokenizer import Tokenizer

from .auto import FEWEST, Group, Sensitivity, grouped, typical
from .calibrate import model_identity, place
from .examples import NOISE_SHARES, Example, canvases, check_context, corrupt, temperature_at
from .recipes_mlx import PRECISIONS, Precision, fallback

PROBE = "q4"
SLOTS = 32  # of a canvas
LOGITS_AT_ONCE = 1 << 26  # numbers of one batch's logits: 256 MB


class NotFinite(DgemmaError):
    """Infinity or NaN came out of the model."""


class GroupDone(NamedTuple):
    """The only event of `measure`."""

    done: int
    total: int


def measure(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    examples: Iterable[Example],
    probe: str = PROBE,
    ts: tuple[float, ...] = NOISE_SHARES,
    seed: int = 0,
    limit: int | None = None,
    on_event: Callable[[GroupDone], None] = lambda event: None,
) -> Sensitivity:
    """The typical KL in nats per corrupted slot (SLOTS of a canvas at most), for each group rounded to the MLX `probe`.

    model: floats, or packed at more bits than the probe. limit: canvases at most. Raises DgemmaError.
    """
    precision = PRECISIONS[probe]
    found = canvases(examples, tokenizer, model.config.canvas_length, limit)
    if len(found) < FEWEST:
        raise DgemmaError(f"the examples fill {len(found)} canvases, expected at least {FEWEST}; give more of them")
    if len({canvas.instance for canvas in found}) < 2:
        raise DgemmaError("the examples are a single one, expected several; their differences tell how sure a KL is")
    check_context([len(c.prefix) + len(c.clean) for c in found], model.config.max_position_embeddings)
    batches = _batches(found, model, ts, seed)
    reference = [_log_shares(model, batch) for batch in batches]
    members = grouped(model.config)
    _check_bits(model, members, precision)
    instance = np.concatenate([batch.instance for batch in batches])
    kls, errors = {}, {}
    for key, tensors in members.items():
        with rounded(model, tensors, precision) as errors[key]:
            pairs = [_kl(model, batch, known) for batch, known in zip(batches, reference, strict=True)]
        kl, slots = (np.concatenate(part) for part in zip(*pairs, strict=True))
        kls[key] = _by_instance(kl, slots, instance)
        on_event(GroupDone(len(kls), len(members)))
    groups = {key: Group(*found, errors[key]) for key, found in typical(kls).items()}
    return Sensitivity(probe, groups, len(found), ts, seed, model_identity(model))


def _by_instance(kl, slots, instance):
    """Sums of canvases → KL per slot of each instance that has any."""
    _, which = np.unique(instance, return_inverse=True)
    kl, slots = np.bincount(which, kl), np.bincount(which, slots)
    return kl[slots > 0] / slots[slots > 0]


@contextlib.contextmanager
def rounded(model: DiffusionGemma, tensors: list[Tensor], precision: Precision) -> Iterator[dict[str, float]]:
    """The model with these tensors at `precision` until the block ends; yields their relative squared errors."""
    kept = []
    try:
        errors = {}
        for tensor in tensors:
            parent, name = place(model, tensor)
            kept.append((parent, name, parent[name]))
            parent[name], errors[tensor.gguf_part] = _at(parent[name], fallback(precision, tensor.shape[-1]))
        yield errors
    finally:
        for parent, name, module in kept:
            parent[name] = module


def _check_bits(model, members, precision):
    """Weights that the probe leaves about as they are seem to cost nothing, and would get anything."""
    for tensor in (t for tensors in members.values() for t in tensors):
        parent, name = place(model, tensor)
        if "scales" in parent[name] and (bits := _bits(parent[name])) <= precision.bits:
            raise DgemmaError(
                f"{tensor.gguf} is stored in {bits} bits, expected more than the {precision.bits} of {precision.name}; "
                "measure the original or an 8-bit copy, or with a lower --probe"
            )


def _bits(module):
    return module.packing.bits if isinstance(module, PackedLinear) else module.bits


def _at(module, precision):
    """A module of the same kind, and the relative squared error of its weights."""
    how = {"group_size": precision.group_size, "bits": precision.bits, "mode": precision.mode}
    packed = "scales" in module
    if not precision.is_quantized:
        return module, 0.0
    weight = _floats(module) if packed else module.weight
    values = mx.dequantize(*mx.quantize(weight, **how), **how).astype(weight.dtype)
    squared = mx.square(weight.astype(mx.float32)).sum()
    error = mx.square((values - weight).astype(mx.float32)).sum() / mx.where(squared > 0, squared, 1)
    if isinstance(module, PackedLinear):
        twin = type(module)(weight, Packing(**how))
    elif packed:
        table = nn.Embedding(1, 1)
        table.weight = weight
        twin = table.to_quantized(**how)
    else:
        twin = copy.copy(module)
        twin.weight = values
    mx.eval(twin.parameters(), error)
    return twin, error.item()


def _floats(module):
    how = module.packing._asdict() if isinstance(module, PackedLinear) else {
        "group_size": module.group_size, "bits": module.bits, "mode": module.mode
    }  # fmt: skip
    arrays = [module[name] for name in ("weight", "scales", "biases") if name in module]
    return mx.dequantize(*arrays, **how)


class _Batch(NamedTuple):
    """Canvases of about the same prefix length, each at one share of noise."""

    instance: np.ndarray  # (B,)
    tokens: np.ndarray  # (B, T) prefixes, padded at the left
    padding: np.ndarray  # (B,)
    canvas: np.ndarray  # (B, C)
    slots: np.ndarray  # (B, S) slots looked at
    counted: np.ndarray  # (B, S) bool: those of them that are corrupted
    temperature: np.ndarray  # (B, 1, 1)


def _batches(found, model, ts, seed) -> list[_Batch]:
    """One share for each canvas, in turn: other canvases say more than the same canvas again."""
    stream, config, settings = NoiseStream(seed), model.config, model.generation_config
    C, V = config.canvas_length, config.vocab_size
    size = max(1, LOGITS_AT_ONCE // (C * V))
    order = sorted(range(len(found)), key=lambda i: len(found[i].prefix))  # little padding
    batches = []
    for start in range(0, len(order), size):
        some = [(found[i], ts[i % len(ts)]) for i in order[start : start + size]]
        pairs = [corrupt(c.clean[None], t, stream, [c.instance], c.block, V) for c, t in some]
        canvas, noisy = (np.concatenate(part) for part in zip(*pairs, strict=True))
        # Corrupted slots first, in an order that has nothing to do with their places.
        chance = stream.uniforms(order[start : start + size], 0, 0, C)
        slots = np.argsort(chance + ~noisy, axis=-1)[:, :SLOTS]
        batches.append(
            _Batch(
                np.array([c.instance for c, _ in some]),
                *left_padded([c.prefix for c, _ in some], settings.pad_token_id),
                canvas,
                slots,
                np.take_along_axis(noisy, slots, axis=-1),
                np.array([temperature_at(t, settings) for _, t in some], np.float32)[:, None, None],
            )
        )
    return batches


def _log_shares(model, batch: _Batch) -> list[mx.array]:
    """Log probabilities at the slots looked at: pass without self-conditioning, pass with it, (B, S, V) each"""
    cache, slots = model.make_cache(), mx.array(batch.slots)[..., None]
    model.prefill(mx.array(batch.tokens), cache, mx.array(batch.padding) if batch.padding.any() else None)
    canvas, temperature, out, soft = mx.array(batch.canvas), mx.array(batch.temperature), [], None
    for conditioned in (False, True):
        hidden = model.denoise_hidden(canvas, cache, soft)
        logits = model.logits(mx.take_along_axis(hidden, slots, axis=1))
        out.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(out)
        if not conditioned:
            soft = model.soft_embedding((model.logits(hidden) / temperature).astype(model.dtype))
            mx.eval(soft)
    return out


def _kl(model, batch, reference):
    """Summed over corrupted slots and both passes, and how many those were: (B,), (B,)"""
    total = 0
    for known, found in zip(reference, _log_shares(model, batch), strict=True):
        total = total + divergence(known, found)
    if not mx.isfinite(total).all().item():
        raise NotFinite("the model's logits are not finite, expected numbers; load it in bfloat16 or float32")
    counted = batch.counted.astype(np.float64)
    return (np.array(total, np.float64) * counted).sum(axis=-1), 2 * counted.sum(axis=-1)


def divergence(reference: mx.array, found: mx.array) -> mx.array:
    """KL(reference || found) in nats: log probabilities (…, V) → (…)

    Every term is positive, because both add up to 1; plain p × (log p − log q) loses a small KL in cancellation.
    """
    d = found - reference
    return (mx.exp(reference) * (mx.expm1(d) - d)).sum(axis=-1)
