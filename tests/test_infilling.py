"""Holes are filled and everything else stays: for any text, whatever the model does, on both engines."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dgemma import infilling
from mlx_dgemma.api import make_session
from mlx_dgemma.config import GenerationConfig, parse_config
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.events import StepDone
from mlx_dgemma.infilling import Filled, fill, parse
from mlx_dgemma.layout import Hole, encode_text, lay_out
from mlx_dgemma.session import Session
from tests.test_clamp import RandomEngine
from tests.test_layout import TEXTS
from tests.tiny import VOCAB, tiny_config

C = 16
CONFIG = GenerationConfig(stop_token_ids=(1, 106, 50), max_denoising_steps=2)


class AnyModel(RandomEngine):
    """Says anything at all, stop ids more often than chance has it; remembers its prefix."""

    canvas_length, vocab_size = C, VOCAB
    cache_bytes = 0

    def prefill(self, tokens, padding=None):
        self.prefix = tokens.tolist()

    def spread(self, rows):
        return self

    def peak_memory(self):
        return 0

    def step(self, *args):
        found = super().step(*args)
        ends = self.random.rand(*found.draft.shape) < 0.2
        return found._replace(draft=np.where(ends, self.random.choice([0, 1, 106, 100]), found.draft % VOCAB))


def any_session(tokenizer, seed=0, canvas_length=C):
    """A session, and the engines that it made."""
    made = []

    def make_engine():
        made.append(AnyModel(seed))
        made[-1].canvas_length = canvas_length
        return made[-1]

    return Session(make_engine, parse_config(tiny_config(canvas_length=canvas_length)), tokenizer), made


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return tiny_model[1]


def last(events) -> Filled:
    *_, event = events
    return event


# Markers


def test_parse():
    assert parse("a<|hole|>b") == ["a", Hole(), "b"]
    assert parse("<|hole:12|>") == ["", Hole(12), ""]
    assert parse("ab<|hole|>cd<|hole:03|><|hole|>") == ["ab", Hole(), "cd", Hole(3), "", Hole(), ""]
    assert parse("é<|hole|>語\r\n") == ["é", Hole(), "語\r\n"]


@pytest.mark.parametrize("around", ["th{}e", "🙂{}語", "<{}|>", "\r\n{}\r\n", "the {} and", "{}"])
def test_a_marker_is_found_whatever_stands_beside_it(tokenizer, around):
    """Tokens would hide it: "th" and "e" merge, "🙂" is four bytes, "<" may begin another token."""
    text = around.format("<|hole:2|>")
    filled = last(fill(any_session(tokenizer)[0], parse(text), CONFIG))
    before, behind = around.split("{}")
    assert filled.text == before + filled.holes[0] + behind and filled.lengths == [2]


@pytest.mark.parametrize("text", ["", "a", "<hole>", "<|hole|", "<|HOLE|>"])
def test_a_text_without_a_hole(text):
    with pytest.raises(DgemmaError, match=r"found no hole in the text, expected <\|hole\|> or <\|hole:N\|>"):
        parse(text)


@pytest.mark.parametrize("marker", ["<|hole:|>", "<|hole:0|>", "<|hole:-1|>", "<|hole:x|>", "<|hole:9999999|>"])
def test_a_marker_without_a_length_that_can_be(marker):
    with pytest.raises(
        DgemmaError, match=re.escape(f"found {marker!r}, expected <|hole:N|> with N tokens, at least 1")
    ):
        parse(f"a{marker}b")


# Known text


@given(
    texts=st.lists(TEXTS, min_size=2, max_size=4),
    lengths=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_known_text_comes_back_whatever_the_model_says(tokenizer, texts, lengths, seed):
    parts = [texts[0]]
    for text, length in zip(texts[1:], lengths, strict=False):
        parts += [Hole(length), text]
    session, _ = any_session(tokenizer, seed, canvas_length=48)
    try:
        *events, filled = fill(session, parts, CONFIG, seed=seed)
    except DgemmaError as error:
        assert "the canvas has 48" in str(error)
        return
    holes = iter(filled.holes)
    assert filled.text == "".join(part if isinstance(part, str) else next(holes) for part in parts)
    assert filled.text.encode().startswith(texts[0].encode()) and filled.text.encode().endswith(texts[-1].encode())
    # A hole has what the model said last. A stop id, in a hole or in what looks like one, takes nothing from it, unless
    # no text follows.
    draft = [e for e in events if isinstance(e, StepDone)][-1].draft[0]
    said = lay_out(parts, filled.lengths, tokenizer, CONFIG, 48).texts(draft, tokenizer)
    for i, (hole, text) in enumerate(zip(filled.holes, said, strict=True)):
        assert hole == text or not "".join(texts[i + 1 :])


@pytest.mark.parametrize("special", ["<eos>", "<turn|>", "<|turn>", "<pad>", "<|tool_response>"])
def test_a_special_token_in_known_text_ends_nothing(tokenizer, special):
    """Encoded as what it looks like, it would end the answer in front of the second hole, which would be empty."""

    class Saying(AnyModel):
        def step(self, *args):
            found = super().step(*args)
            return found._replace(draft=np.full_like(found.draft, tokenizer.encode("on")[0]))

    session = Session(Saying, parse_config(tiny_config(canvas_length=32)), tokenizer)
    Saying.canvas_length = 32
    filled = last(fill(session, [f"in {special}", Hole(1), special, Hole(2), ""], CONFIG))
    assert filled.text == f"in {special}on{special}onon"


def test_a_stop_id_in_a_hole_takes_nothing_from_the_next_one(tokenizer):
    on = tokenizer.encode("on")[0]

    class Stopping(AnyModel):
        def step(self, *args):
            found = super().step(*args)
            return found._replace(draft=np.where(np.arange(C) == 0, 1, np.full_like(found.draft, on)))

    session = Session(Stopping, parse_config(tiny_config()), tokenizer)
    assert last(fill(session, [Hole(2), "and", Hole(2), "in"], CONFIG)).holes == ["on", "onon"]
    assert last(fill(session, ["and", Hole(2)], CONFIG)).holes == [""]  # nothing follows: it is the end


def test_a_suffix_longer_than_the_canvas_goes_on_in_the_users_turn(tokenizer):
    session, made = any_session(tokenizer)
    suffix = "xyz and the rest"
    filled = last(fill(session, ["in ", Hole(10), suffix], CONFIG, prompt="say"))
    assert filled.text == "in " + filled.holes[0] + suffix
    canvas = made[0].seen[0][0]
    shown = tokenizer.decode(canvas[10:].tolist())
    assert suffix.startswith(shown) and len(encode_text(shown, tokenizer)) == 6
    turn = tokenizer.decode(made[0].prefix[0])
    assert f"say\nThe text goes on:\n{suffix[len(shown) :].rstrip()}" in turn and turn.endswith("in ")


@pytest.mark.parametrize("parts", [[Hole(2), "on"], ["on", Hole(2)], ["", Hole(2), ""], [Hole(1), Hole(2)], [Hole(16)]])
def test_holes_at_the_edges(tokenizer, parts):
    filled = last(fill(any_session(tokenizer)[0], parts, CONFIG))
    holes = iter(filled.holes)
    assert filled.text == "".join(part if isinstance(part, str) else next(holes) for part in parts)


# Lengths


def test_lengths_that_do_not_fit(tokenizer):
    """Those that fit are tried; where none does the reason is given."""
    session, _ = any_session(tokenizer)
    assert last(fill(session, ["in", Hole(), "xyzx"], CONFIG, lengths=(14, 16, 40))).lengths[0] in (14, 16)
    with pytest.raises(DgemmaError, match="the hole takes 20 tokens, the canvas has 16; make it shorter"):
        list(fill(session, ["in", Hole(), ""], CONFIG, lengths=(20, 30)))
    with pytest.raises(DgemmaError, match="found .* as lengths to try, expected some of at least 1"):
        list(fill(session, ["in", Hole(), ""], CONFIG, lengths=()))
    # A later hole gives way: one slot of 16 is enough for it.
    assert last(fill(session, [Hole(), "xyz" * 4, Hole()], CONFIG)).lengths in (
        [1, 1],
        [1, 2],
        [1, 3],
        [2, 1],
        [2, 2],
        [3, 1],
    )
    with pytest.raises(DgemmaError, match="the holes take 2 tokens and the text between them 15 tokens"):
        list(fill(session, [Hole(), "xyz" * 5, Hole()], CONFIG))


def test_a_length_finds_what_it_finds_alone(tiny_model, monkeypatch):
    model, tokenizer = tiny_model
    seen = []
    doubts = infilling._doubts

    def watched(run, candidates, drafts, config):
        found = doubts(run, candidates, drafts, config)
        seen.append(
            {x[0]: (draft.tolist(), doubt) for x, draft, doubt in zip(candidates, drafts, found[0], strict=True)}
        )
        return found

    monkeypatch.setattr(infilling, "_doubts", watched)
    for lengths in ((2, 3, 5, 8), (5,), (5, 3)):
        list(fill(make_session(model, tokenizer), ["the ", Hole(), " and"], model.generation_config, lengths=lengths))
    together, *apart = seen
    for found in apart:
        for length, (draft, doubt) in found.items():
            assert draft == together[length][0] and doubt == pytest.approx(together[length][1], rel=1e-4)


def test_the_canvas_is_whole_whatever_the_settings(tiny_model, monkeypatch):
    """A first canvas of 8 would end in the middle of the hole, a dropped tail in front of a later one."""
    model, tokenizer = tiny_model
    parts = ["the ", Hole(3), " and the red", Hole(3), " on"]
    plain, changed = (
        last(fill(make_session(model, tokenizer), parts, model.generation_config.replace(**kwargs)))
        for kwargs in ({}, {"first_canvas": 8, "drop_tail": True})
    )
    assert plain.text == changed.text and len(plain.holes) == 2
    asked, session = [], any_session(tokenizer)[0]
    stream = session.stream
    monkeypatch.setattr(session, "stream", lambda prompts, config, *args, **kwargs: (
        asked.append(config), stream(prompts, config, *args, **kwargs))[1])  # fmt: skip
    list(fill(session, ["in", Hole(2), "on"], CONFIG.replace(drop_tail=True)))
    assert asked and not any(config.drop_tail for config in asked)


# Engines


def test_same_seed_same_text(tiny_model):
    model, tokenizer = tiny_model
    texts = [
        last(fill(make_session(model, tokenizer), ["the ", Hole(6), "sand"], model.generation_config, seed=seed)).text
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("hole", [Hole(), Hole(old="name.upper()")])
def test_mlx_and_ggml_fill_the_same(demo_sessions, hole):
    parts = [
        'def result(name):\n    """Return the last 2 letters of name in lower case."""\n    return ',
        hole,
        "[-2:]\n",
    ]
    (mlx, config), (ggml, _) = demo_sessions
    config = config.replace(max_denoising_steps=6)
    found = [last(fill(session, parts, config, lengths=(3, 5), noise=0.5)) for session in (mlx, ggml)]
    assert found[0].text == found[1].text and found[0].lengths == found[1].lengths
    assert found[0].done.stats.steps == found[1].done.stats.steps


@pytest.fixture(scope="module")
def demo_sessions(tmp_path_factory):
    """The demo checkpoint in float32 on MLX and on ggml, and its settings."""
    pytest.importorskip("xllamacpp")
    import mlx.core as mx

    import mlx_dgemma
    from convert import convert
    from gguf_export import Runner
    from gguf_export.engine import make_session as make_ggml_session

    model, tokenizer = mlx_dgemma.load("demo/checkpoint", mx.float32)
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert("demo/checkpoint", path, to="gguf", recipe="F32")
    runner = Runner(path, "cpu")
    ggml = make_ggml_session(runner, runner.tokenizer())
    return (make_session(model, tokenizer), model.generation_config), (ggml, runner.generation_config)


@pytest.mark.parametrize("given", [{"length": 0}, {"length": -5}, {"noise": 2.0}, {"noise": float("nan")}])
def test_lengths_and_noise_out_of_range(tiny_model, given):
    session = make_session(*tiny_model)
    parts = ["a", Hole(given.get("length", 2)), "b"]
    with pytest.raises(DgemmaError, match="expected (at least 1|a share between 0 and 1)"):
        list(fill(session, parts, tiny_model[0].generation_config, noise=given.get("noise", 1.0)))


def test_a_session_that_keeps_its_prefix_fills_too(tiny_model):
    texts = [
        list(fill(make_session(*tiny_model, keep_prefix=keep), ["a", Hole(2), "b"], tiny_model[0].generation_config))[
            -1
        ]
        for keep in (False, True)
    ]
    assert texts[0].text == texts[1].text
