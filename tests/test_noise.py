"""The noise stream: pinned numbers, independent rows, exact float32, uniform tokens."""

import numpy as np

from mlx_dgemma.noise import NoiseStream


def test_pinned_numbers():
    # Other implementations check against these; they must never change.
    stream = NoiseStream(0)
    assert stream.canvas([0], 0, 4, 262_144).tolist() == [[3026, 63320, 29209, 147957]]
    assert stream.uniforms([0], 0, 0, 2).tolist() == [[0.21185952425003052, 0.21554583311080933]]
    assert stream.renoise([0], 0, 0, 4, 262_144).tolist() == [[173059, 160195, 55973, 198114]]


def test_a_row_does_not_depend_on_its_neighbours():
    stream = NoiseStream(7)
    together = stream.uniforms([3, 0, 9], 1, 2, 16)
    for i, row in enumerate([3, 0, 9]):
        assert (together[i] == stream.uniforms([row], 1, 2, 16)[0]).all()


def test_every_key_gives_other_numbers():
    draws = [
        NoiseStream(seed).renoise([row], block, step, 32, 262_144).tolist()
        for seed in (0, 1, -1)
        for row in (0, 1)
        for block in (0, 1)
        for step in (0, 1)
    ]
    draws.append(NoiseStream(0).canvas([0], 0, 32, 262_144).tolist())
    assert len({str(draw) for draw in draws}) == len(draws)


def test_uniforms_are_exact_and_open():
    u = NoiseStream(1).uniforms(range(8), 0, 0, 4096)
    assert u.dtype == np.float32 and u.min() > 0 and u.max() < 1
    scaled = u.astype(np.float64) * 2**23 - 0.5
    assert (scaled == scaled.round()).all()
    assert abs(u.mean() - 0.5) < 0.01


def test_tokens_are_uniform():
    tokens = NoiseStream(2).canvas(range(16), 0, 4096, 100)
    counts = np.bincount(tokens.ravel(), minlength=100)
    assert counts.size == 100
    # Chi-square with 99 degrees of freedom: 150 is above the 99.9th percentile.
    expected = tokens.size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 150
