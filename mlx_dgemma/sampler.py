"""The entropy-bound sampler: which canvas slots keep their sampled token this step.

Shapes   B rows, C canvas slots, V vocabulary; every function is pure
Source   arXiv 2505.24857; transformers 5.23.0, EntropyBoundSampler and _denoising_step
Differs  a token is drawn by inverting the cumulative distribution at a given uniform number (noise.py), where
         transformers draws from the device's own generator; the distribution is the same

*Processed* logits are softcapped and divided by the step's temperature; everything here reads those, in float32.
"""

import mlx.core as mx

# Sums over the vocabulary go by blocks: one float32 sum over 262,144 terms would lose the small ones.
BLOCK = 512


def entropies(processed):
    """Entropy of each slot's distribution in nats. (B, C, V) → (B, C)"""
    logp = processed - mx.logsumexp(processed, axis=-1, keepdims=True)
    return -(mx.exp(logp) * logp).sum(axis=-1)


def sample(processed, uniforms):
    """One token per slot: how many entries of the cumulative distribution lie below uniform × total.

    processed (B, C, V), uniforms (B, C) in (0, 1) → (B, C) int32
    """
    p = mx.softmax(processed, axis=-1, precise=True)
    B, C, V = p.shape
    p = mx.pad(p, [(0, 0), (0, 0), (0, -V % BLOCK)]).reshape(B, C, -1, BLOCK)
    up_to_block = mx.cumsum(p.sum(axis=-1), axis=-1)  # (B, C, V/BLOCK)
    target = uniforms[..., None] * up_to_block[..., -1:]  # (B, C, 1)
    block = (up_to_block < target).sum(axis=-1, keepdims=True)  # (B, C, 1)
    before = mx.where(block > 0, mx.take_along_axis(up_to_block, mx.maximum(block - 1, 0), axis=-1), 0)
    inside = mx.take_along_axis(p, block[..., None], axis=2)[:, :, 0]  # (B, C, BLOCK)
    slot = (mx.cumsum(inside, axis=-1) < target - before).sum(axis=-1)
    # Rounding may step past the last entry with mass; the last token of the vocabulary is the bound.
    return mx.minimum(block[..., 0] * BLOCK + slot, V - 1).astype(mx.int32)


def accept_mask(entropy, bound):
    """From surest to least sure, keep slots while the entropy spent before is within `bound`. (B, C) → (B, C) bool"""
    order = mx.argsort(entropy, axis=-1)
    cost = mx.take_along_axis(entropy, order, axis=-1)
    spent_before = mx.cumsum(cost, axis=-1) - cost  # the surest slot always passes
    return mx.take_along_axis(spent_before <= bound, mx.argsort(order, axis=-1), axis=-1)
