"""Temperatures and the stop rule, by hand."""

import numpy as np
import pytest

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.schedule import LinearAnneal, Patience, Plateau, StableAndConfident, default_stop_rule

A, B = np.array([[1, 2]]), np.array([[1, 3]])
SURE, UNSURE = np.array([[0.0, 0.001]], np.float32), np.array([[0.0, 1.0]], np.float32)


def test_the_first_step_is_hottest_and_the_last_not_quite_t_min():
    anneal = LinearAnneal(t_min=0.4, t_max=0.8, n_steps=4)
    assert [anneal(step) for step in range(4)] == pytest.approx([0.8, 0.7, 0.6, 0.5])


def stops(stability, drafts, entropies):
    rule = StableAndConfident(stability, 0.005)
    return [bool(rule(draft, entropy)[0]) for draft, entropy in zip(drafts, entropies, strict=True)]


def test_a_draft_must_repeat_and_be_confident():
    assert stops(1, [A, A], [SURE, SURE]) == [False, True]
    assert stops(1, [A, B, B], [SURE, SURE, SURE]) == [False, False, True]
    assert stops(1, [A, A, A], [SURE, UNSURE, SURE]) == [False, False, True]


def test_stability_k_means_k_plus_one_equal_drafts():
    assert stops(2, [A, A, A], [SURE] * 3) == [False, False, True]
    assert stops(2, [A, A, B, B, B], [SURE] * 5) == [False, False, False, False, True]
    assert stops(0, [A, B], [SURE, UNSURE]) == [True, False]


def test_rows_stop_on_their_own():
    rule = StableAndConfident(1, 0.005)
    rule(np.array([[1], [2]]), np.zeros((2, 1), np.float32))
    assert rule(np.array([[1], [3]]), np.zeros((2, 1), np.float32)).tolist() == [True, False]


def test_a_plateau_needs_a_repeated_draft():
    rule, flat = Plateau(0.005), [UNSURE, UNSURE * 0.5, UNSURE * 0.49, UNSURE * 0.49]
    assert [bool(rule(d, e)[0]) for d, e in zip([A, A, A, B], flat, strict=True)] == [False, False, True, False]
    assert bool(rule(B, SURE)[0])  # confident as well


def test_patience_lets_slots_settle_one_by_one():
    rule = Patience(2, 0.005)
    # The first slot is sure from the start; the second changes once and then lasts.
    drafts, unsure = [A, B, B, B], np.array([[0.0, 1.0]], np.float32)
    assert [bool(rule(draft, unsure)[0]) for draft in drafts] == [False, False, False, True]
    assert bool(Patience(2, 0.005)(A, SURE)[0])


@pytest.mark.parametrize("name", ["stable", "confident", "plateau", "patience"])
def test_every_rule_has_a_name_and_tells_rows_apart(name):
    rule = default_stop_rule(GenerationConfig(stop=name))
    draft, entropy = np.array([[1, 2], [3, 4]]), np.array([[0, 0], [1, 1]], np.float32)
    rule(draft, entropy)
    assert rule(draft + np.array([[0], [1]]), entropy).tolist() == [True, False]
