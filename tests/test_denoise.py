"""The block loop on an engine made of a script: what is stopped, padded, committed and reported."""

import numpy as np
import pytest

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.denoise import Step, canvas_lengths, close_canvas, denoise_blocks
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.events import BlockDone, StepDone
from mlx_dgemma.noise import NoiseStream
from mlx_dgemma.session import collect, left_padded

EOS, PAD = 1, 0


class ScriptedEngine:
    """Row r drafts scripts[block][r] once it has taken `delay[r]` steps, something else before."""

    canvas_length, vocab_size = 4, 50

    again = False  # a second `start` belongs to the same block

    def __init__(self, scripts, delay, flexible=False):
        self.scripts, self.delay, self.flexible = np.array(scripts), np.array(delay), flexible
        self.block, self.taken, self.committed, self.temperatures, self.shapes = -1, 0, [], [], []

    def use(self, config):
        self.config = config

    def start(self, canvas):
        if self.taken == 0 or not self.again:
            self.block, self.taken = self.block + 1, 0
        self.rows, self.length = np.arange(len(canvas)), canvas.shape[1]

    def select(self, rows, length):
        self.rows, self.length = self.rows[rows], length

    def step(self, temperature, entropy_bound, uniforms, renoise, free):
        assert uniforms.shape == renoise.shape == (len(self.rows), self.length)
        self.taken += 1
        self.temperatures.append(temperature[0])
        self.shapes.append(uniforms.shape)
        ready = (self.taken >= self.delay)[self.rows]
        script = self.scripts[self.block][self.rows][:, : self.length]
        draft = np.where(ready[:, None], script, 40 + self.taken)
        entropy = np.where(ready[:, None], 0.0, 1.0) * np.ones(draft.shape, np.float32)
        return Step(draft, renoise, np.ones(draft.shape, bool), entropy)

    def commit(self, tokens):
        self.committed.append(tokens.tolist())


def run(engine, n_rows=1, **settings):
    settings = {"max_new_tokens": 12, "max_denoising_steps": 6, **settings}
    config = GenerationConfig(stop_token_ids=(EOS,), **settings)
    events = list(denoise_blocks(engine, config, NoiseStream(0), list(range(n_rows))))
    return [e for e in events if isinstance(e, BlockDone)], [e for e in events if isinstance(e, StepDone)]


def test_blocks_follow_until_a_stop_id():
    engine = ScriptedEngine([[[5, 6, 7, 8]], [[9, EOS, 7, 7]]], delay=[1])
    blocks, steps = run(engine)
    assert [b.tokens.tolist() for b in blocks] == [[[5, 6, 7, 8]], [[9, EOS, PAD, PAD]]]
    assert engine.committed == [[[5, 6, 7, 8]]]  # the last canvas is never encoded
    assert [b.steps.tolist() for b in blocks] == [[2], [2]]  # one draft and its repetition
    assert [(s.block, s.step) for s in steps] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_max_tokens_counts_canvases_up():
    engine = ScriptedEngine([[[5, 5, 5, 5]]] * 9, delay=[1])
    blocks, _ = run(engine, max_new_tokens=9)
    assert len(blocks) == 3
    tokens = np.concatenate([b.tokens for b in blocks], axis=1)
    assert collect(tokens, GenerationConfig(max_new_tokens=9)) == ([[5] * 9], [False])


def test_the_step_cap_commits_the_last_draft():
    engine = ScriptedEngine([[[5, EOS, 5, 5]]], delay=[99])
    blocks, _ = run(engine, max_new_tokens=4)
    assert blocks[0].tokens.tolist() == [[46, 46, 46, 46]] and blocks[0].steps.tolist() == [6]
    assert engine.temperatures[0] == 0.8 and np.isclose(engine.temperatures[-1], 0.4 + 0.4 / 6)


def test_rows_finish_separately():
    scripts = [[[5, EOS, 9, 9], [6, 6, 6, 6]], [[8, 8, 8, 8], [7, EOS, 8, 8]]]
    blocks, steps = run(ScriptedEngine(scripts, delay=[1, 3]), n_rows=2)
    assert blocks[0].tokens.tolist() == [[5, EOS, PAD, PAD], [6, 6, 6, 6]]
    assert blocks[1].tokens.tolist() == [[PAD] * 4, [7, EOS, PAD, PAD]]
    assert blocks[0].steps.tolist() == [2, 4] and blocks[1].steps.tolist() == [0, 4]
    # A settled row keeps its draft and its canvas while the other goes on.
    first = [s for s in steps if s.block == 0]
    assert [s.running.tolist() for s in first] == [[True, True], [True, True], [False, True], [False, True]]
    assert (first[3].canvas[0] == first[1].canvas[0]).all()


def test_pad_follows_the_first_stop_id():
    config = GenerationConfig(stop_token_ids=(EOS, 3))
    draft = np.array([[4, 3, EOS, 4], [4, 4, 4, 4]])
    tokens, stopped = close_canvas(draft, np.array([False, False]), config)
    assert tokens.tolist() == [[4, 3, PAD, PAD], [4, 4, 4, 4]] and stopped.tolist() == [True, False]


def test_left_padding():
    tokens, padding = left_padded([[7, 8, 9], [6]], PAD)
    assert tokens.tolist() == [[7, 8, 9], [PAD, PAD, 6]] and padding.tolist() == [0, 2]


def test_settled_rows_are_left_out_and_nothing_changes():
    scripts, delay = [[[7, 8, 9, EOS]] * 4, [[3, 4, EOS, 5]] * 4], [1, 1, 1, 4]
    whole, left_out = ScriptedEngine(scripts, delay), ScriptedEngine(scripts, delay, flexible=True)
    a, b = run(whole, 4), run(left_out, 4)
    assert set(whole.shapes) == {(4, 4)}
    assert left_out.shapes == [(4, 4)] * 2 + [(1, 4)] * 3  # three rows settle after two steps, the last after five
    for x, y in zip(a[0], b[0], strict=True):
        assert (x.tokens == y.tokens).all() and (x.steps == y.steps).all()
    for x, y in zip(a[1], b[1], strict=True):
        assert (x.draft == y.draft).all() and (x.canvas == y.canvas).all() and (x.running == y.running).all()


def test_rows_finished_in_an_earlier_block_are_not_computed():
    engine = ScriptedEngine([[[7, EOS, 9, 9], [7, 7, 7, 7]], [[3, 4, 5, EOS]] * 2], [1, 1], flexible=True)
    blocks, _ = run(engine, 2)
    assert engine.shapes == [(2, 4)] * 2 + [(1, 4)] * 2
    assert blocks[1].tokens.tolist() == [[PAD] * 4, [3, 4, 5, EOS]]


def test_the_tail_behind_a_settled_end_is_left_out():
    engine = ScriptedEngine([[[EOS, 8, 9, 9], [7, EOS, 9, 9]]], [1, 1], flexible=True)
    blocks, _ = run(engine, 2, drop_tail=True, stability_threshold=3)
    assert engine.shapes == [(2, 4)] * 2 + [(2, 2)] * 2
    assert blocks[0].tokens.tolist() == [[EOS, PAD, PAD, PAD], [7, EOS, PAD, PAD]]
    stiff = ScriptedEngine([[[EOS, 8, 9, 9], [7, EOS, 9, 9]]], [1, 1])
    assert run(stiff, 2, drop_tail=True, stability_threshold=3)[0][0].tokens.tolist() == blocks[0].tokens.tolist()
    assert set(stiff.shapes) == {(2, 4)}


def test_a_tail_is_kept_while_the_end_moves_or_is_unsure():
    engine = ScriptedEngine([[[EOS, 8, 9, 9], [7, 8, 9, 9]]], [1, 1], flexible=True)  # the second row has no end
    run(engine, 2, drop_tail=True, max_new_tokens=4, stability_threshold=3)
    assert set(engine.shapes) == {(2, 4)}


def test_canvases_grow_from_the_first_one():
    config = GenerationConfig(max_new_tokens=150, first_canvas=16)
    assert canvas_lengths(config, 64) == [16, 32, 64, 64]
    assert canvas_lengths(config, 64, flexible=False) == [64, 64, 64]
    assert canvas_lengths(config.replace(first_canvas=64), 64) == [64, 64, 64]
    for wrong in (48, 128):
        with pytest.raises(DgemmaError, match=f"first_canvas is {wrong}, expected a divisor of the model's canvas"):
            canvas_lengths(config.replace(first_canvas=wrong), 64)


def test_the_schedule_is_apart_from_the_cap():
    engine = ScriptedEngine([[[7, 7, 7, 7]]], [9])
    run(engine, max_new_tokens=4, max_denoising_steps=5, schedule_steps=2)
    assert engine.temperatures == pytest.approx([0.8, 0.6, 0.4, 0.4, 0.4])


class MovingEnd(ScriptedEngine):
    """An end token that stands still for two steps and then moves back."""

    again = True

    def step(self, *args):
        step = super().step(*args)
        if self.taken > 2:
            late = np.array([[7, 8, 9, EOS]])[:, : self.length]
            return step._replace(draft=late, entropy=np.zeros(late.shape, np.float32))
        return step


def test_a_tail_comes_back_when_its_end_moves():
    engine = MovingEnd([[[7, EOS, 41, 42]]], [1], flexible=True)
    blocks, _ = run(engine, drop_tail=True, max_new_tokens=4, stability_threshold=2, max_denoising_steps=12)
    assert (1, 2) in engine.shapes and engine.shapes[-1] == (1, 4)
    assert blocks[0].tokens.tolist() == [[7, 8, 9, EOS]]


class UnsureTail(ScriptedEngine):
    def step(self, *args):
        step = super().step(*args)
        entropy = np.where(np.arange(self.length) < 2, 0.0, 3.0) * np.ones(step.draft.shape, np.float32)
        return step._replace(entropy=entropy.astype(np.float32))


def test_a_tail_that_was_cut_does_not_keep_a_block_from_ending():
    engine = UnsureTail([[[7, EOS, 41, 42]]], [1], flexible=True)
    blocks, steps = run(engine, drop_tail=True, max_new_tokens=4, stop="confident")
    assert blocks[0].steps.tolist() == [3] and blocks[0].tokens.tolist() == [[7, EOS, PAD, PAD]]
    assert engine.shapes == [(1, 4), (1, 4), (1, 2)] and steps[-1].entropy.sum() == 0


def test_few_shapes_occur():
    rng = np.random.default_rng(0)
    engine = ScriptedEngine([[[7, 8, 9, EOS]] * 40], rng.integers(1, 30, 40), flexible=True)
    run(engine, 40, max_new_tokens=4, max_denoising_steps=40)
    assert len(set(engine.shapes)) <= 7  # 40 rows, halved and halved again
