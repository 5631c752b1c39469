"""One pass over the vocabulary: lm_head, and all that a denoising step reads from the distribution behind it.

Shapes   M slots of a canvas (rows flattened), H hidden, V vocabulary, K rows of the table in one chunk
Source   lm_head, softmax and self-conditioning are attention over the vocabulary with K = V = embedding; sums by chunks
         as in arXiv 2112.05682 (memory-efficient attention)
Differs  transformers makes (M, V) arrays in float32, several of them; here none is larger than (M, K)

`Reading` is what the pass found. A token's logit is softcapped and divided by the temperature, in float32. A slot
that is sure of few tokens can do without the rest of the table in self-conditioning (`mix_blocks`): what that leaves
out is known, because all masses are.
"""

import math
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .elementary import exp, softcap
from .products import Packing, expert_product, on_cpu, packed_expert_product, packed_product

BLOCK, BLOCKS = 64, 512  # tokens whose mass is summed at least, and how many such sums a running sum may add up
# Of (M, K), and there are a few of them at a time: a CPU wants them in its cache, a GPU wants few launches.
CPU_CHUNK, GPU_CHUNK = 1 << 19, 1 << 21
BUCKET = 32  # slots that are read anew come in multiples of this


class Reading(NamedTuple):
    """What a step reads from the distributions of its M slots."""

    draft: mx.array  # (M,) int32, the likeliest token
    entropy: mx.array  # (M,) nats
    sampled: mx.array  # (M,) int32, by inverting the cumulative distribution at a uniform number
    soft: mx.array | None  # (M, H) expected embedding, unscaled
    masses: mx.array  # (M, V / block) e^(logit - top), summed by blocks of tokens
    top: mx.array  # (M, 1) the largest logit


class _Sums(NamedTuple):
    """Over the rows read so far, seen from the largest logit among them."""

    top: mx.array  # (M, 1) that logit
    draft: mx.array  # (M, 1) its row
    total: mx.array  # (M, 1) sum of e^(logit - top)
    weighted: mx.array  # (M, 1) sum of e^… × (logit - top)
    soft: mx.array  # (M, H) sum of e^… × row, float32; empty where nobody asked for it


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

    def pick(self, tokens) -> list[mx.array]:
        """The rows of some tokens (A,), for `logits` and `mix`."""
        return [array[tokens] for array in self.arrays]

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
        return self._by_block(hidden, block, size, transpose=True)

    def block_mix(self, shares, block):
        """One block of rows mixed per slot: shares (M, size), block (M,) → (M, H)"""
        return self._by_block(shares, block, shares.shape[-1], transpose=False)

    def _by_block(self, x, block, size, transpose):
        order = mx.argsort(block)
        blocks, x, n = [a.reshape(-1, size, a.shape[-1]) for a in self.arrays], x[order][:, None], block[order]
        if self.packing:
            out = packed_expert_product(x, blocks, self.packing, n, transpose)
        else:
            out = expert_product(x, blocks[0] if transpose else blocks[0].swapaxes(-1, -2), n)
        return out[mx.argsort(order), 0]


class Reader:
    """The distributions of one step: hidden (M, H), read against the table."""

    def __init__(self, hidden, table: Table, cap: float, temperature):
        """temperature: a number, or one per slot, (M, 1)"""
        self.hidden, self.table, self.cap, self.temperature = hidden, table, cap, temperature
        self.block = block_of(table.n_rows)

    def logits(self, x, slots=None):
        """x (M, …) softcapped and divided by the temperature; of some slots, where x has only those"""
        return softcap(x, self.cap, 1 / self._temperature(slots))

    def _temperature(self, slots):
        return self.temperature if slots is None or isinstance(self.temperature, float) else self.temperature[slots]

    def read(self, uniforms, mix: bool = True) -> Reading:
        """uniforms (M,) in (0, 1). mix: also the expected embedding, from all tokens."""
        sums, masses, tops = None, [], []
        for start, rows in self._chunks():
            if sums:  # one after the other: evaluated side by side they would all be in memory at once
                rows = mx.depends(rows, list(sums))
            sums, by_block = self._add(sums, start, rows, mix)
            masses.append(by_block)
            tops.append(sums.top)
        masses = mx.concatenate([m * exp(top - sums.top) for m, top in zip(masses, tops, strict=True)], axis=-1)
        total = masses.sum(axis=-1)
        number, target = choose_block(masses, uniforms)
        inside = exp(self.logits(self.table.block_logits(self.hidden, number, self.block)) - sums.top)
        # Another kernel read the block again and may have found another sum: the share is what counts.
        share = target / mx.take_along_axis(masses, number[:, None], axis=-1)
        up_to = mx.cumsum(inside, axis=-1)
        inside = mx.minimum((up_to < share * up_to[:, -1:]).sum(axis=-1), self.block - 1)
        return Reading(
            sums.draft[:, 0].astype(mx.int32),
            (mx.log(sums.total) - sums.weighted / sums.total)[:, 0],
            (number * self.block + inside).astype(mx.int32),
            (sums.soft / total[:, None]).astype(self.hidden.dtype) if mix else None,
            masses,
            sums.top,
        )

    def _add(self, sums: _Sums | None, start, rows, mix):
        """The sums with these rows too, and the rows' masses by blocks."""
        z = self.logits(self.table.logits(self.hidden, rows))
        draft = z.argmax(axis=-1, keepdims=True)
        largest = mx.take_along_axis(z, draft, axis=-1)
        draft = draft + start
        top = largest if sums is None else mx.maximum(sums.top, largest)
        z = z - top
        e = exp(z)
        # By blocks: one float32 sum over thousands of terms loses the small ones.
        masses, weighted = (x.reshape(x.shape[0], -1, self.block).sum(axis=-1) for x in (e, e * z))
        total, weighted = masses.sum(axis=-1, keepdims=True), weighted.sum(axis=-1, keepdims=True)
        soft = self.table.mix(e.astype(self.hidden.dtype), rows).astype(mx.float32) if mix else mx.zeros((0,))
        if sums is not None:
            shift = sums.top - top
            kept = exp(shift)
            draft = mx.where(largest > sums.top, draft, sums.draft)
            weighted = weighted + kept * (sums.weighted + sums.total * shift)
            total = total + kept * sums.total
            soft = soft + kept * sums.soft if mix else soft
        return _Sums(top, draft, total, weighted, soft), masses

    def mix_blocks(self, found: Reading, k: int):
        """The expected embedding from each slot's k heaviest blocks, (M, H), and the share of mass they hold, (M,)."""
        numbers, covered = best_blocks(found.masses, k)  # (M, k)
        slot, number = mx.repeat(mx.arange(len(numbers)), numbers.shape[-1]), numbers.reshape(-1)
        z = self.logits(self.table.block_logits(self.hidden[slot], number, self.block), slot)
        shares = exp(z - found.top[slot]) / (found.masses.sum(axis=-1) * covered)[slot][:, None]
        parts = self.table.block_mix(shares.astype(self.hidden.dtype), number)
        return parts.reshape(*numbers.shape, -1).sum(axis=1), covered

    def mix_slots(self, found: Reading, soft, slots: np.ndarray):
        """`soft` with these slots' expected embeddings read from all tokens."""
        # Few shapes: a multiple of BUCKET, the last slot as often as it takes.
        slots = mx.array(np.append(slots, np.full(-len(slots) % BUCKET, slots[-1])))
        few = Reader(self.hidden[slots], self.table, self.cap, self._temperature(slots))
        top, total = found.top[slots], found.masses[slots].sum(axis=-1, keepdims=True)
        mixed = mx.zeros((len(slots), soft.shape[-1]), mx.float32)
        for _, rows in few._chunks():
            rows = mx.depends(rows, [mixed])
            e = exp(self.logits(self.table.logits(few.hidden, rows)) - top)
            mixed = mixed + self.table.mix(e.astype(soft.dtype), rows).astype(mx.float32)
        soft = mx.array(soft)
        soft[slots] = (mixed / total).astype(soft.dtype)
        return soft

    def _chunks(self):
        V, K = self.table.n_rows, chunk_of(len(self.hidden), self.table.n_rows, self.block)
        return [(start, self.table.rows(start, min(start + K, V))) for start in range(0, V, K)]


def best_blocks(masses, k: int):
    """The k heaviest blocks of each slot, (M, k), and the share of mass they hold, (M,)."""
    k = min(k, masses.shape[-1])
    numbers = mx.argpartition(-masses, kth=k - 1, axis=-1)[:, :k]
    return numbers, mx.take_along_axis(masses, numbers, axis=-1).sum(axis=-1) / masses.sum(axis=-1)


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
    """Rows of the table per chunk: whole blocks."""
    elements = CPU_CHUNK if on_cpu() else GPU_CHUNK
    return min(V, max(1, elements // (M * block)) * block)
