"""The constrained engine under the block loop: text is always whole, whatever the model wants to say."""

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from demo.tasks import held_out
from mlx_dgemma import sampler, structure
from mlx_dgemma.automaton import compile_regex, lift
from mlx_dgemma.clamp import Clamp
from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.constrained import ConstrainedEngine, accept_mask
from mlx_dgemma.denoise import denoise_blocks
from mlx_dgemma.engine import MlxEngine
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.events import BlockDone, StepDone
from mlx_dgemma.language import Language
from mlx_dgemma.noise import NoiseStream
from mlx_dgemma.session import Session, collect

TEXTS = [None, None, b"a", b"b", b"ab", b"c", b"bb", None]
PAD, EOS, TURN = 0, 1, 7
SETTINGS = GenerationConfig(stop_token_ids=(EOS, TURN), pad_token_id=PAD, max_denoising_steps=6, max_new_tokens=8)


class RandomEngine:
    """A model that wants something else at every step."""

    canvas_length, vocab_size, flexible = 4, len(TEXTS), True

    def __init__(self, seed, scale=5.0):
        self.rng, self.scale, self.committed, self.puts = np.random.default_rng(seed), scale, [], []

    def use(self, config):
        pass

    def start(self, canvas):
        self.shape = canvas.shape

    def select(self, rows, length):
        self.shape = len(rows), length

    def commit(self, tokens):
        self.committed.append(tokens)

    def logits(self, temperature, tokens):
        assert temperature.shape == self.shape[:1] and temperature.dtype == np.float32
        return (self.scale * self.rng.normal(size=(*self.shape, len(tokens)))).astype(np.float32)

    def put(self, canvas, shares, tokens):
        assert canvas.shape == self.shape and shares.shape == (*self.shape, len(tokens))
        np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
        self.puts.append(canvas)


def language_of(regex):
    return Language(lift(compile_regex(regex), TEXTS), (EOS, TURN), (PAD, EOS))


def texts_of(engine, n_rows, seed=0, clamp=None, **changes):
    settings = SETTINGS.replace(**changes)
    events = list(denoise_blocks(engine, settings, NoiseStream(seed), list(range(n_rows)), clamp=clamp))
    blocks = [event for event in events if isinstance(event, BlockDone)]
    tokens, stopped = collect(np.concatenate([block.tokens for block in blocks], axis=1), settings)
    texts = [b"".join(TEXTS[t] for t in row if TEXTS[t] is not None).decode() for row in tokens]
    return texts, stopped, events


@pytest.mark.parametrize("regex", ["(ab)+c?|bb", "a(b|c)*", "abababc"])
@pytest.mark.parametrize("changes", [{}, {"max_new_tokens": 6}, {"max_new_tokens": 4}, {"drop_tail": True}])
def test_every_text_is_whole(regex, changes):
    language = language_of(regex)
    for seed in range(10):
        engine = ConstrainedEngine(RandomEngine(seed), language)
        texts, _, events = texts_of(engine, 3, seed, **changes)
        assert all(re.fullmatch(regex, text) for text in texts), f"{seed=} {texts}"
        assert all(np.isfinite(e.entropy).all() for e in events if isinstance(e, StepDone))


def test_each_row_has_its_language():
    regexes = ["a+", "(bb)+", "c(ab)*"]
    for seed in range(5):
        engine = ConstrainedEngine(RandomEngine(seed), [language_of(regex) for regex in regexes])
        texts, _, _ = texts_of(engine, 3, seed)
        assert all(re.fullmatch(regex, text) for regex, text in zip(regexes, texts, strict=True)), texts
    with pytest.raises(DgemmaError, match="3 structures for 2 prompts"):
        texts_of(engine, 2)


def test_text_that_fills_the_answer_needs_no_stop_id():
    texts, stopped, _ = texts_of(ConstrainedEngine(RandomEngine(0), language_of("a{8}")), 1)
    assert texts == ["aaaaaaaa"] and stopped == [False]


def test_too_few_tokens_are_refused_before_any_step():
    engine = ConstrainedEngine(RandomEngine(0), language_of("a{9}"))
    with pytest.raises(DgemmaError, match="has 9 tokens, expected at most max_new_tokens = 8"):
        texts_of(engine, 1)
    assert engine.engine.puts == []


def test_known_tokens_stand_and_others_fit_them():
    known = np.array([[False, True, False, False, False, True]])
    clamp = Clamp(np.array([[0, 5, 0, 0, 0, 3]], np.int32), known, ~known)
    for seed in range(5):
        engine = ConstrainedEngine(RandomEngine(seed), language_of("(a|b|c)*"))
        texts, _, events = texts_of(engine, 1, seed, clamp)
        first = next(event for event in events if isinstance(event, BlockDone))
        assert first.tokens[0, 1] == 5 and "c" in texts[0]
        steps = [event for event in events if isinstance(event, StepDone) and event.block == 0]
        assert not any(event.accepted[0, 1] for event in steps) and all(event.canvas[0, 1] == 5 for event in steps)
    with pytest.raises(DgemmaError, match="agrees with the 1 known"):
        texts_of(ConstrainedEngine(RandomEngine(0), language_of("(a|b)*")), 1, 0, clamp)


def test_a_copy_begins_anew():
    class Copied(RandomEngine):
        def copy(self):
            return Copied(1)

    engine = ConstrainedEngine(Copied(0), language_of("abc"))
    assert texts_of(engine, 1)[0] == texts_of(engine, 1)[0] == texts_of(engine.copy(), 1)[0] == ["abc"]
    assert engine.canvas_length == 4  # all else is the inner engine's


def test_acceptance_is_the_samplers():
    rng = np.random.default_rng(0)
    for _ in range(20):
        entropy = rng.random((3, 16)).astype(np.float32) * rng.integers(0, 2, (3, 16)).astype(np.float32)
        free = rng.random((3, 16)) < 0.8
        want = sampler.accept_mask(mx.array(entropy), 0.9, mx.array(free))
        assert (accept_mask(entropy, 0.9, free) == np.array(want)).all()


def test_the_demo_model_writes_records_that_parse():
    model, tokenizer = mlx_dgemma.load(Path(__file__).parent.parent / "demo" / "checkpoint")
    properties = {"name": {"type": "string"}, "age": {"type": "integer"}, "job": {"enum": ["nurse", "pilot"]}}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    settings = model.generation_config.replace(max_new_tokens=40, max_denoising_steps=4)
    language = structure.compile(structure.json_schema(json.dumps(schema)), tokenizer, settings)
    session = Session(lambda: ConstrainedEngine(MlxEngine(model), language), model.config, tokenizer)
    # What the model was never asked for: it has to give up keys that it knows.
    prompts = [instance.prompt for instance in held_out("json", 4)]
    *_, done = session.stream([[{"role": "user", "content": prompt}] for prompt in prompts], settings)
    for text in done.texts:
        record = json.loads(text)
        assert list(record) == list(properties) and record["job"] in ("nurse", "pilot"), text
