"""One pass over the vocabulary: lm_head, and all that a denoising step reads from the distribution behind it.

Shapes   M slots of a canvas (rows flattened), H hidden, V vocabulary, K rows of the table in one chunk
Source   lm_head, softmax and self-conditioning are attention over the vocabulary with K = V = embedding; sums by chunks
         as in arXiv 2112.05682 (memory-efficient attention)
Differs  transformers makes (M, V) arrays in float32, several of them; here none is larger than (M, K)

`Reading` is what the pass found. A token's logit is softcapped and divided by the temperature, in float32.
"""

import math
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .products import Packing, expert_product, packed_expert_product, packed_product

BLOCK, BLOCKS = 64, 512  # tokens whose mass is summed at least, and how many such sums a running sum may add up
CHUNK_ELEMENTS = 1 << 21  # of (M, K): 8 MB in float32, and a few of them at a time


class Reading(NamedTuple):
    """What a step reads from the distributions of its M slots."""

    draft: mx.array  # (M,) int32, the likeliest token
    entropy: mx.array  # (M,) nats
    sampled: mx.array  # (M,) int32, by inverting the cumulative distribution at a uniform number
    soft: mx.array  # (M, H) expected embedding, unscaled, in the table's type


class _Chunk(NamedTuple):
    largest: mx.array  # (M, 1) logit
    best: mx.array  # (M,) its row
    masses: mx.array  # (M, K / BLOCK) sums of e^(logit - largest)
    weighted: mx.array  # (M,) sum of e^… × (logit - largest)
    soft: mx.array  # (M, H) sum of e^… × row, float32


class Table:
    """The tied embedding, packed or not, by ranges of its rows."""

    def __init__(self, embedding: nn.Embedding | nn.QuantizedEmbedding):
        self.packing = None
        if isinstance(embedding, nn.QuantizedEmbedding):
            self.packing = Packing(embedding.group_size, embedding.bits, embedding.mode)
        self.arrays = [embedding[name] for name in ("weight", "scales", "biases") if name in embedding]
        self.n_rows = self.arrays[0].shape[0]

    def rows(self, start: int, stop: int) -> list[mx.array]:
        return [array[start:stop] for array in self.arrays]

    def logits(self, hidden, rows=None):
        """(…, H) → (…, K), before the softcap. rows: of `rows`, by default all."""
        rows = rows or self.arrays
        return packed_product(hidden, rows, self.packing) if self.packing else hidden @ rows[0].T

    def mix(self, shares, rows=None):
        """(…, K) shares → (…, H)"""
        rows = rows or self.arrays
        return packed_product(shares, rows, self.packing, transpose=False) if self.packing else shares @ rows[0]

    def block_logits(self, hidden, block, size: int):
        """Logits of one block of `size` rows per slot: hidden (M, H), block (M,) → (M, size)"""
        order = mx.argsort(block)
        blocks, x, n = [a.reshape(-1, size, a.shape[-1]) for a in self.arrays], hidden[order][:, None], block[order]
        out = packed_expert_product(x, blocks, self.packing, n) if self.packing else expert_product(x, blocks[0], n)
        return out[mx.argsort(order), 0]


def read_vocabulary(hidden, table: Table, cap: float, temperature: float, uniforms) -> Reading:
    """hidden (M, H), uniforms (M,) in (0, 1) → Reading"""
    M, V = hidden.shape[0], table.n_rows
    block = block_of(V)
    K = chunk_of(M, V, block)

    def processed(x):
        return mx.tanh(x.astype(mx.float32) / cap) * (cap / temperature)

    chunks = []
    for start in range(0, V, K):
        rows = table.rows(start, min(start + K, V))
        chunks.append(_read_chunk(processed(table.logits(hidden, rows)), start, block, table, rows, hidden.dtype))
    largest = mx.concatenate([c.largest for c in chunks], axis=-1)  # (M, chunks)
    top = largest.max(axis=-1, keepdims=True)
    scale = mx.exp(largest - top)
    draft = mx.take_along_axis(
        mx.stack([c.best for c in chunks], axis=-1), largest.argmax(axis=-1, keepdims=True), axis=-1
    )
    masses = mx.concatenate([c.masses * scale[:, i : i + 1] for i, c in enumerate(chunks)], axis=-1)  # (M, blocks)
    total = masses.sum(axis=-1)
    # Each chunk's sum of e × (z - its largest), seen from the largest of all.
    weighted = sum(
        (c.weighted + c.masses.sum(axis=-1) * (largest[:, i] - top[:, 0])) * scale[:, i] for i, c in enumerate(chunks)
    )
    soft = sum(c.soft * scale[:, i : i + 1] for i, c in enumerate(chunks)) / total[:, None]
    number, target = choose_block(masses, uniforms)
    inside = mx.exp(processed(table.block_logits(hidden, number, block)) - top)
    sampled = number * block + mx.minimum((mx.cumsum(inside, axis=-1) < target).sum(axis=-1), block - 1)
    return Reading(
        draft[:, 0].astype(mx.int32),
        mx.log(total) - weighted / total,
        sampled.astype(mx.int32),
        soft.astype(hidden.dtype),
    )


def _read_chunk(z, start, block, table, rows, dtype):
    best = z.argmax(axis=-1)
    largest = mx.take_along_axis(z, best[:, None], axis=-1)
    z = z - largest
    e = mx.exp(z)
    masses = e.reshape(e.shape[0], -1, block).sum(axis=-1)
    soft = table.mix(e.astype(dtype), rows).astype(mx.float32)
    return _Chunk(largest, best + start, masses, (e * z).sum(axis=-1), soft)


def choose_block(masses, uniforms):
    """Which block the uniform share of the mass falls into, and how much of that block lies below it.

    masses (M, blocks), uniforms (M,) → (M,) int32, (M, 1)
    """
    up_to = mx.cumsum(masses, axis=-1)
    target = uniforms[:, None] * up_to[:, -1:]
    # Rounding may step past the last block; what has no mass is never chosen.
    number = mx.minimum((up_to < target).sum(axis=-1, keepdims=True), masses.shape[-1] - 1)
    before = mx.where(number > 0, mx.take_along_axis(up_to, mx.maximum(number - 1, 0), axis=-1), 0)
    return number[:, 0], target - before


def block_of(V: int) -> int:
    """Tokens per block: a divisor of V, so that the table is whole blocks.

    One float32 running sum over 262,144 terms would lose the small ones.
    """
    return math.gcd(V, max(BLOCK, V // BLOCKS))


def chunk_of(M: int, V: int, block: int) -> int:
    """Rows of the table per chunk: whole blocks, as many as CHUNK_ELEMENTS allow."""
    return min(V, max(1, CHUNK_ELEMENTS // (M * block)) * block)
