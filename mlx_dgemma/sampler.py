"""The entropy-bound sampler: which canvas slots keep their sampled token this step.

Shapes   B rows, C canvas slots; a pure function
Source   arXiv 2505.24857; transformers 5.23.0, EntropyBoundSampler
"""

import mlx.core as mx


def accept_mask(entropy, bound, free=None):
    """From surest to least sure, keep slots while the entropy spent before is within `bound`. (B, C) → (B, C) bool

    free (B, C): the other slots spend nothing and are not kept, as if the canvas had only the free ones.
    """
    entropy = entropy if free is None else mx.where(free, entropy, 0)
    order = mx.argsort(entropy, axis=-1)
    cost = mx.take_along_axis(entropy, order, axis=-1)
    spent_before = mx.cumsum(cost, axis=-1) - cost  # the surest slot always passes
    kept = mx.take_along_axis(spent_before <= bound, mx.argsort(order, axis=-1), axis=-1)
    return kept if free is None else kept & free
