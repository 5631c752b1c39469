"""Attention over a long prefix: keys by chunks, so that no array of scores is as long as the prefix.

Shapes   B rows, T queries, Nq query heads, N key-value heads, G = Nq / N, D head_dim, K keys
Source   arXiv 1805.02867 (softmax with a running maximum), arXiv 2112.05682 (memory-efficient attention)
Differs  scores and sums are float32 also where queries and keys are bfloat16

MLX has no fused kernel for the full layers' head_dim of 512: it makes all (B, Nq, T, K) scores, 537 MB for a canvas of
256 after 32,768 tokens. Here MLX's CPU backend holds about ten chunks at once, 109 MB at any K, as it prepares
operations ahead of those that run. Waiting for each chunk would leave 25 MB, but stop a GPU at every chunk, forbid
mx.compile, and there compute the last layer's attention in a prefill, whose output nobody reads.
"""

import mlx.core as mx

from .elementary import exp
from .products import on_cpu

FEW_KEYS = 4096  # so many are read by MLX's own call on a GPU
CHUNK_KEYS = 512  # at most; as many as head_dim: a chunk's scores are no larger than the queries, in float32
LOWEST = mx.finfo(mx.float32).min


def attention(q, keys, values, mask=None):
    """softmax(q @ keysᵀ) @ values: q (B, Nq, T, D), keys and values (B, N, K, D) → (B, Nq, T, D)

    mask: which keys a query sees, boolean, (T, K) or (B, 1, T or 1, K); None: all. There is no 1 / sqrt(D).
    """
    # On a CPU MLX's call makes all scores too, and its softmax takes three times as long as this one.
    if keys.shape[2] <= FEW_KEYS and not on_cpu():
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=1.0, mask=mask)
    return _by_chunks(q, keys, values, mask)


def _by_chunks(q, keys, values, mask):
    B, Nq, T, D = q.shape
    N, K = keys.shape[1:3]
    grouped = q.reshape(B, N, Nq // N, T, D).astype(mx.float32)
    largest = mx.full((B, N, Nq // N, T, 1), LOWEST)  # score so far
    total = mx.zeros_like(largest)  # sum of e^(score - largest)
    mixed = mx.zeros_like(grouped)  # sum of e^… × value
    chunk = -(-K // -(-K // CHUNK_KEYS))  # even ones: a short last chunk costs almost a whole one
    for start in range(0, K, chunk):
        # MLX may compute in any order: no chunk's scores before the last chunk is summed up.
        k, v = mx.depends([a[:, :, None, start : start + chunk] for a in (keys, values)], [total, mixed])
        scores = grouped @ k.astype(mx.float32).swapaxes(-1, -2)  # (B, N, G, T, chunk)
        if mask is not None:
            scores = mx.where(_chunk_of(mask, start, chunk), scores, LOWEST)
        # Where a query has seen no key yet, LOWEST is its largest score: e^0 is summed for keys that it does not see,
        # and forgotten, × e^-inf, with the first key that it does.
        new = mx.maximum(largest, scores.max(axis=-1, keepdims=True))
        e, kept = exp(scores - new), exp(largest - new)
        total = total * kept + e.sum(axis=-1, keepdims=True)
        mixed = mx.addmm(mixed * kept, e, v.astype(mx.float32))
        largest = new
    return (mixed / total).reshape(q.shape).astype(q.dtype)


def _chunk_of(mask, start, chunk):
    """As the scores of that chunk see it: (T, chunk) or (B, 1, 1, T or 1, chunk)."""
    mask = mask[..., start : start + chunk]
    return mask if mask.ndim == 2 else mask[:, :, None]
