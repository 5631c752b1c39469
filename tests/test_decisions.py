"""Choices from one forward pass: what the canvas holds, how scores become probabilities, how far to believe them."""

from pathlib import Path

import numpy as np
import pytest

import mlx_dgemma
from mlx_dgemma.config import GenerationConfig, read_config
from mlx_dgemma.decisions import decide, decide_template, probabilities, reliability, surroundings
from mlx_dgemma.engine import MlxEngine
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.tokenizer import Tokenizer

DEMO = Path(__file__).parent.parent / "demo" / "checkpoint"
EOS, TURN = 1, 106


class FavouringEngine:
    """Gives the tokens of `favoured` a logit of their own, everything else 0."""

    canvas_length, vocab_size = 64, 1024

    def __init__(self, favoured, canvases=None):
        self.favoured, self.canvases = favoured, [] if canvases is None else canvases

    def prefill(self, tokens):
        self.prefix = tokens

    def spread(self, rows):
        return FavouringEngine(self.favoured, self.canvases)

    def use(self, settings):
        pass

    def start(self, canvas):
        self.canvas = canvas
        self.canvases.append(canvas)

    def logits(self, temperature, tokens):
        row = np.array([self.favoured.get(int(token), 0.0) for token in tokens], np.float32)
        return np.broadcast_to(row, (*self.canvas.shape, len(tokens)))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(DEMO, read_config(DEMO))


def test_the_canvas_holds_the_text_and_noise_in_the_slot(tokenizer):
    engine = FavouringEngine({})
    found = decide(engine, tokenizer, '{"city": "', ["Paris", "Rome", "a☃b"], '"}')
    canvas, around = engine.canvases[0], surroundings(tokenizer, '{"city": "', ["Paris", "Rome", "a☃b"], '"}')
    lengths = sorted({len(own) for own in around.choices})
    assert canvas.shape == (len(lengths), 64) and len(lengths) > 1 and not found.single
    for row, length in zip(canvas, lengths, strict=True):
        n = len(around.before) + length
        assert row[: len(around.before)].tolist() == around.before
        assert row[n : n + len(around.after)].tolist() == around.after
        assert row[n + len(around.after)] == TURN and set(row[n + len(around.after) + 1 :].tolist()) == {EOS}


def test_surroundings_put_every_choice_together_again(tokenizer):
    for before, choices, after in (
        ("a: ", ["1", "12", "2"], "."),
        ("", ["yes", "no"], ""),
        ("x ", ["the", "then"], " y"),
    ):
        around = surroundings(tokenizer, before, choices, after)
        for choice, own in zip(choices, around.choices, strict=True):
            assert own and around.before + own + around.after == tokenizer.encode(before + choice + after)


def test_probabilities_are_the_softmax_of_the_choices_tokens(tokenizer):
    digits = [tokenizer.encode(digit)[0] for digit in "123"]
    engine = FavouringEngine({digits[0]: 1.0, digits[1]: 3.0})
    found = decide(engine, tokenizer, "n", ["1", "2", "3"], "")
    want = np.exp([1.0, 3.0, 0.0])
    np.testing.assert_allclose(found.probabilities, want / want.sum(), atol=1e-7)
    assert found.best == "2" and found.single
    softer = decide(engine, tokenizer, "n", ["1", "2", "3"], "", temperature=2)
    np.testing.assert_allclose(softer.probabilities, probabilities(np.array([1.0, 3.0, 0.0]), 2), atol=1e-7)


def test_a_template_of_choices_is_decided_from_the_left(tokenizer):
    two = tokenizer.encode("2")[0]
    made = []

    def make():
        made.append(FavouringEngine({two: 2.0}))
        return made[-1]

    text, decisions = decide_template(make, tokenizer, [2, 3], "a <|choice:1,2|> b <|choice:1,2|>!")
    assert text == "a 2 b 2!" and [d.best for d in decisions] == ["2", "2"]
    assert len(made) == 1 and made[0].prefix.tolist() == [[2, 3]]
    known, (first, second) = tokenizer.encode("a 2 b "), made[0].canvases
    assert second[0, : len(known)].tolist() == known
    assert TURN in second[0] and set(first[0, -30:].tolist()) != {EOS}  # only the last slot's text ends
    with pytest.raises(DgemmaError, match="slot of kind 'integer'"):
        decide_template(make, tokenizer, [2], "<|choice:1,2|><|integer|>")


@pytest.mark.parametrize(
    "choices, before, options, message",
    [
        (["a"], "", {}, "at least two"), (["a", "a"], "", {}, "different"), (["a", ""], "", {}, "different"),
        (["a", "b"], "", {"temperature": 0}, "above 0"), (["a", "b"], "0" * 70, {}, "at most 64, one canvas"),
    ],
)  # fmt: skip
def test_errors(tokenizer, choices, before, options, message):
    with pytest.raises(DgemmaError, match=message):
        decide(FavouringEngine({}), tokenizer, before, choices, "", **options)


def test_reliability_by_hand():
    found = reliability(np.array([0.95, 0.85, 0.95, 0.15, 1.0]), np.array([True, False, True, False, False]))
    assert [(b.low, b.n) for b in found.bins] == [(0.1, 1), (0.8, 1), (0.9, 3)]
    assert found.bins[2].accuracy == pytest.approx(2 / 3) and found.bins[2].confidence == pytest.approx(2.9 / 3)
    assert found.ece == pytest.approx((0.15 + 0.85 + abs(2.9 - 2)) / 5) and found.n == 5
    assert reliability(np.zeros(0), np.zeros(0, bool)) == ([], 0, 0)


def test_the_demo_model_reads_a_sentence():
    model, tokenizer = mlx_dgemma.load(DEMO)
    prompt = tokenizer.chat([{"role": "user", "content": "As JSON:\nTom, 7, lives in Oslo and works as a pilot."}])
    template = '{"name": "Tom", "age": 7, "city": "<|choice:Paris,Oslo,Rome|>", "job": "<|choice:pilot,nurse|>"}'
    text, decisions = decide_template(lambda: MlxEngine(model), tokenizer, prompt, template, GenerationConfig())
    assert text == '{"name": "Tom", "age": 7, "city": "Oslo", "job": "pilot"}'
    assert all(d.probabilities.max() > 0.9 for d in decisions)
