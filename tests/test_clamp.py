"""Known tokens: intact in every canvas and in the answer, spending nothing, stopping nothing."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dgemma.clamp import Clamp
from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.denoise import Step, denoise_blocks
from mlx_dgemma.events import BlockDone, StepDone
from mlx_dgemma.noise import NoiseStream
from mlx_dgemma.sampler import accept_mask
from mlx_dgemma.schedule import Patience, Plateau, StableAndConfident, mean_entropy
from mlx_dgemma.session import collect
from tests.test_sampler import accept_slowly

C, V, EOS, PAD = 6, 40, 1, 0


class RandomEngine:
    """Drafts, entropies and acceptances of chance; it keeps the canvas as an engine must."""

    canvas_length, vocab_size, flexible = C, V, False

    def __init__(self, seed=0):
        self.random, self.seen, self.asked, self.committed = np.random.RandomState(seed), [], [], []

    def use(self, config):
        pass

    def start(self, canvas):
        self.canvas = canvas

    def step(self, temperature, entropy_bound, uniforms, renoise, free):
        self.seen.append(self.canvas.copy())
        self.asked.append(temperature.copy())
        draft = self.random.randint(0, V, renoise.shape)
        accepted = (self.random.rand(*renoise.shape) < 0.5) & free
        self.canvas = np.where(accepted, draft, renoise)
        return Step(draft, self.canvas, accepted, self.random.rand(*renoise.shape).astype(np.float32))

    def commit(self, tokens):
        self.committed.append(tokens)


def run(clamp, engine=None, **settings):
    config = GenerationConfig(stop_token_ids=(EOS,), **{"max_new_tokens": 12, "max_denoising_steps": 4, **settings})
    engine = engine or RandomEngine()
    events = list(denoise_blocks(engine, config, NoiseStream(0), list(range(len(clamp.tokens))), clamp=clamp))
    blocks = [e.tokens for e in events if isinstance(e, BlockDone)]
    return np.concatenate(blocks, axis=1), [e for e in events if isinstance(e, StepDone)], engine, config


@given(st.data())
def test_known_tokens_are_intact_always(data):
    """Whatever the model does: in every canvas it sees, in every draft, and in the answer, stop ids included."""
    rows, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2 * C))
    random = np.random.RandomState(data.draw(st.integers(0, 1000)))
    tokens = random.randint(0, V, (rows, n)).astype(np.int32)
    known = random.rand(rows, n) < data.draw(st.sampled_from([0.2, 0.6, 1.0]))
    noisy = ~known & (random.rand(rows, n) < 0.7)
    clamp = Clamp(tokens, known, noisy)
    answer, steps, _, config = run(clamp, RandomEngine(random.randint(1000)))
    for event in steps:
        held = clamp.canvas(event.block * C, C)
        for row in np.flatnonzero(event.running):
            for canvas in (event.draft[row], event.canvas[row]):
                assert (canvas[held.known[row]] == held.tokens[row][held.known[row]]).all()
            assert (event.entropy[row][held.known[row]] == 0).all() and not event.accepted[row][held.known[row]].any()
        assert (event.known == held.known).all()
    # Behind the last known text a stop id ends the answer; in front of it nothing does.
    until = clamp.text_end((EOS, PAD))
    length = answer.shape[1]
    for row in range(rows):
        kept = known[row, :length] & (np.arange(n) < until[row])[:length]
        assert (answer[row, :n][:length][kept] == tokens[row, :length][kept]).all()
    kept, _ = collect(answer, config, until)
    assert all(len(row) >= end for row, end in zip(kept, until, strict=True))


def test_a_block_without_a_free_slot_takes_no_step():
    tokens = np.arange(2, 2 + C, dtype=np.int32)[None]
    answer, steps, engine, _ = run(Clamp(tokens, np.ones((1, C), bool), np.zeros((1, C), bool)))
    assert answer[0, :C].tolist() == tokens[0].tolist() and engine.committed[0].tolist() == tokens.tolist()
    assert {e.block for e in steps} == {1}


def test_the_canvas_starts_from_what_is_given():
    tokens = np.full((1, C), 7, np.int32)
    known, noisy = np.array([[1, 1, 0, 0, 0, 0]], bool), np.array([[0, 0, 0, 0, 1, 1]], bool)
    _, _, engine, _ = run(Clamp(tokens, known, noisy), max_new_tokens=C)
    noise = NoiseStream(0).canvas([0], 0, C, V)
    assert engine.seen[0].tolist() == np.where(noisy, noise, tokens).tolist()
    assert engine.seen[1][0, :2].tolist() == [7, 7] and engine.seen[1][0, 2:].tolist() != [7] * 4


def test_the_schedule_starts_at_the_share_of_noise():
    """Half noise: the temperature is that of a canvas whose other half is written already. Each row has its own."""
    tokens = np.full((2, C), 7, np.int32)
    noisy = np.array([[1] * C, [1, 1, 1, 0, 0, 0]], bool)
    _, _, engine, config = run(Clamp(tokens, ~noisy, noisy), max_new_tokens=C, t_min=0.4, t_max=0.8)
    N = config.max_denoising_steps
    assert np.allclose(engine.asked, [[0.4 + 0.4 * (N - n) / N, 0.4 + 0.4 * max(0, N / 2 - n) / N] for n in range(N)])


def test_known_slots_spend_no_entropy():
    for seed in range(20):
        random = np.random.default_rng(seed)
        entropy, free = random.random((3, 16)).astype(np.float32) ** 4, random.random((3, 16)) < 0.6
        got = np.array(accept_mask(mx.array(entropy), 0.1, mx.array(free)))
        for row in range(3):
            assert not got[row][~free[row]].any()
            assert got[row][free[row]].tolist() == accept_slowly(entropy[row][free[row]].tolist(), 0.1), f"{seed=}"


@pytest.mark.parametrize("rule", [StableAndConfident(1, 0.1), StableAndConfident(0, 0.1), Plateau(0.1)])
def test_known_slots_stop_nothing(rule):
    """Nine sure slots that are known, one that is not sure: the mean over all would be below the threshold."""
    draft, free = np.zeros((1, 10), int), np.arange(10)[None] == 4
    entropy = np.where(free, 0.5, 0).astype(np.float32)
    assert entropy.mean() < 0.1 and mean_entropy(entropy, free) == 0.5
    assert not rule(draft, entropy, free)[0]
    assert not rule(draft + free, entropy, free)[0]
    assert rule(draft + free, entropy * 0.1, free)[0]


def test_patience_waits_for_free_slots_alone():
    free = np.arange(4)[None] == 2
    rule = Patience(3, 0.1)
    unsure = np.where(free, 0.5, 0).astype(np.float32)
    drafts = [np.where(free, n, 9) for n in (1, 2, 2, 2, 2)]
    assert [bool(rule(draft, unsure, free)[0]) for draft in drafts] == [False, False, False, False, True]


def test_a_stop_id_in_a_hole_ends_nothing():
    """The known text behind it is part of the answer."""
    tokens = np.array([[7, EOS, 8, 9, EOS, PAD]], np.int32)
    known = np.array([[1, 0, 1, 1, 1, 1]], bool)
    clamp = Clamp(tokens, known, np.zeros_like(known))

    class Stopping(RandomEngine):
        def step(self, *args):
            return super().step(*args)._replace(draft=np.full((1, C), EOS))

    answer, _, _, config = run(clamp, Stopping())
    assert answer[0].tolist() == [7, EOS, 8, 9, EOS, PAD]
    assert collect(answer, config, clamp.text_end((EOS, PAD))) == ([[7, EOS, 8, 9, EOS]], [True])


def test_text_end():
    tokens, known = np.array([[5, 6, EOS, 7], [5, EOS, PAD, 7]]), np.array([[1, 1, 1, 0], [0, 1, 1, 0]], bool)
    assert Clamp(tokens, known, ~known).text_end((EOS, PAD)).tolist() == [2, 0]
    assert Clamp(tokens[:, :0], known[:, :0], known[:, :0]).text_end((EOS,)).tolist() == [0, 0]
