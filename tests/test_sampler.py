"""The sampler's functions against slow loops."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.sampler import BLOCK, accept_mask, entropies, sample


def logits_of(seed, shape, scale=4.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_entropy_by_hand():
    even = entropies(mx.zeros((1, 1, 8)))
    sure = entropies(mx.array([[[100.0, 0, 0, 0]]]))
    assert even.item() == pytest.approx(np.log(8), abs=1e-6)
    assert sure.item() == pytest.approx(0, abs=1e-6)


def test_entropy_matches_float64():
    x = logits_of(0, (2, 16, 1000))
    p = softmax(x)
    want = -(p * np.log(p)).sum(-1)
    assert np.abs(np.array(entropies(mx.array(x))) - want).max() < 1e-5


@pytest.mark.parametrize("vocab", [5, BLOCK, 3 * BLOCK + 17])
def test_sample_inverts_the_cumulative_distribution(vocab):
    x = logits_of(vocab, (2, 64, vocab))
    u = np.random.default_rng(1).random((2, 64), np.float32)
    cdf = softmax(x).cumsum(-1)
    got = np.array(sample(mx.array(x), mx.array(u)))
    want = (cdf < u[..., None] * cdf[..., -1:]).sum(-1)
    # float32 sums may land on the neighbour where u lies within rounding of a boundary.
    distance = np.abs(np.take_along_axis(cdf, got[..., None], -1)[..., 0] - u)
    assert ((got == want) | (distance < 1e-6)).all()
    assert (got == want).mean() > 0.99


def test_sample_never_takes_a_token_without_mass():
    x = np.full((1, 2, 2 * BLOCK), -200.0, np.float32)
    x[:, :, BLOCK + 3] = 0
    for u in (6e-8, 0.5, 1 - 6e-8):
        assert sample(mx.array(x), mx.full((1, 2), u)).tolist() == [[BLOCK + 3] * 2]


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
