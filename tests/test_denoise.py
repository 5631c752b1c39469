"""The block loop on an engine made of a script: what is stopped, padded, committed and reported."""

import numpy as np

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.denoise import Step, close_canvas, denoise_blocks
from mlx_dgemma.events import BlockDone, StepDone
from mlx_dgemma.noise import NoiseStream
from mlx_dgemma.session import collect, left_padded

EOS, PAD = 1, 0


class ScriptedEngine:
    """Row r drafts scripts[block][r] once it has taken `delay[r]` steps, something else before."""

    canvas_length, vocab_size = 4, 50

    def __init__(self, scripts, delay):
        self.scripts, self.delay = np.array(scripts), np.array(delay)
        self.block, self.taken, self.committed, self.temperatures = -1, 0, [], []

    def start(self, canvas):
        self.block, self.taken = self.block + 1, 0

    def step(self, temperature, entropy_bound, uniforms, renoise):
        self.taken += 1
        self.temperatures.append(temperature)
        ready = self.taken >= self.delay
        draft = np.where(ready[:, None], self.scripts[self.block], 40 + self.taken)
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
