"""Acceptance against a slow loop. What a step reads from the vocabulary is tested in test_vocabulary.py."""

import mlx.core as mx
import numpy as np

from mlx_dgemma.sampler import accept_mask


def accept_slowly(entropy, bound):
    keep, spent = [False] * len(entropy), 0.0
    for slot in sorted(range(len(entropy)), key=entropy.__getitem__):
        keep[slot], spent = spent <= bound, spent + entropy[slot]
    return keep


def test_accept_by_hand():
    # Sorted: 0.01 (spent 0), 0.05 (0.01), 0.2 (0.06): all within 0.1 before them; 3.0 comes after 0.26.
    assert accept_mask(mx.array([[0.2, 3.0, 0.01, 0.05]]), 0.1).tolist() == [[True, False, True, True]]
    # The surest always passes, however unsure it is.
    assert accept_mask(mx.array([[3.0, 2.0]]), 0.1).tolist() == [[False, True]]


def test_accept_matches_the_loop():
    for seed in range(20):
        entropy = np.random.default_rng(seed).random((3, 16)).astype(np.float32) ** 4
        got = accept_mask(mx.array(entropy), 0.1).tolist()
        assert got == [accept_slowly(row.tolist(), 0.1) for row in entropy], f"{seed=}"
