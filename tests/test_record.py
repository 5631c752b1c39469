"""The recorder: what went in comes out, hostile text stays text, a file appears complete or not at all."""

import base64
import json
import os
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.errors import DgemmaError
from mlx_dgemma.events import BlockDone, Done, Stats, StepDone
from mlx_dgemma.files import check_writable
from mlx_dgemma.record import Recorder, settled_steps

SETTINGS = GenerationConfig(max_new_tokens=1024)
HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>\u2028\u2029\ud800\x00]]>&lt;"


class Words:
    """A tokenizer whose token n reads `texts[n]`, or " wn"; below 5 are special ones."""

    def __init__(self, **texts):
        self.texts = {int(name[1:]): text for name, text in texts.items()}
        self.vocabulary = SimpleNamespace(token=lambda token: f"<special {token}>")

    def pieces(self, tokens):
        return ["" if token < 5 else self.texts.get(token, f" w{token}") for token in tokens]


def some_steps(block, n_steps, C, vocabulary, rng, known=None):
    """Steps of a canvas that settles slot by slot, as a block loop yields them for two rows."""
    order, draft = rng.permutation(C), None
    for step in range(n_steps):
        accepted = order < C * (step + 1) // n_steps
        guess = rng.integers(5, vocabulary, C)
        draft = guess if draft is None else np.where(accepted | (rng.random(C) < 0.7), draft, guess)
        canvas = np.where(accepted, draft, rng.integers(5, vocabulary, C))
        entropy = np.where(accepted, 1e-4, rng.random(C) * 5).astype(np.float32)
        both = [np.stack([x, x[::-1]]) for x in (draft.astype(np.int32), canvas.astype(np.int32), accepted, entropy)]
        known_both = None if known is None else np.stack([known, known])
        yield StepDone(block, step, np.array([0.8, 0.8]), *both, np.array([True, True]), known_both)


def record(recorder, blocks, done=True):
    tokens = []
    for block, steps in enumerate(blocks):
        for event in steps:
            recorder.take(event)
        recorder.take(BlockDone(block, event.draft, np.array([event.step + 1] * 2), 0.1))
        tokens += event.draft[0].tolist()
    if done:
        recorder.take(Done(["", ""], [tokens, tokens], [False, False], Stats(prompt_tokens=1, seconds=1.5)))
    return recorder


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)[1])


def test_what_went_in_comes_out():
    rng = np.random.default_rng(0)
    known = np.arange(16) < 3
    blocks = [list(some_steps(block, 5, 16, 90, rng, known if block == 0 else None)) for block in range(2)]
    recorder = Recorder(Words(), SETTINGS, prompt="p", model="google/x", seed=3, title="t")
    data = data_of(record(recorder, blocks).page())
    assert [data[name] for name in ("format", "version", "prompt", "model", "seed", "title")] == [
        "dgemma-replay", 1, "p", "google/x", 3, "t"]  # fmt: skip
    assert data["settings"]["max_new_tokens"] == 1024
    ids = [entry[0] for entry in data["tokens"]]
    assert all(text == f" w{token}" for token, text in data["tokens"])
    for block, events in zip(data["blocks"], blocks, strict=True):
        assert block["slots"] == 16 and [ids[place] for place in block["tokens"]] == events[-1].draft[0].tolist()
        draft = [None] * 16
        for step, event in zip(block["steps"], events, strict=True):
            canvas = patch(draft, step["draft"]).copy()
            assert [ids[place] for place in draft] == event.draft[0].tolist()
            assert [ids[place] for place in patch(canvas, step["canvas"])] == event.canvas[0].tolist()
            entropy = np.frombuffer(base64.b64decode(step["entropy"]), "<f2")
            np.testing.assert_allclose(entropy, event.entropy[0], rtol=1e-3)
            is_known = known if event.known is not None else np.zeros(16, bool)
            assert [state == "0" for state in step["states"]] == is_known.tolist()
            assert [state in "12" for state in step["states"]] == (event.accepted[0] & ~is_known).tolist()
            assert step["temperature"] == 0.8 and step["end"] == 16
    assert data["totals"] == {
        "steps": 10, "tokens": 32, "known": 3, "tokens_per_forward": 2.9, "stopped": False, "seconds": 1.5}  # fmt: skip


def patch(tokens, changes):
    for slot, place in zip(changes[::2], changes[1::2], strict=True):
        tokens[slot] = place
    return tokens


def test_settled_steps_match_the_loop():
    rng = np.random.default_rng(1)
    for n_steps in (1, 2, 7):
        drafts = [rng.integers(0, 3, 12) for _ in range(n_steps)]
        want = [min(s for s in range(n_steps) if all(d[i] == drafts[-1][i] for d in drafts[s:])) for i in range(12)]
        assert settled_steps(drafts).tolist() == want


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.seen = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes).get("id")))

    def handle_comment(self, text):
        self.seen.append(("comment", text))


def test_hostile_text_is_data():
    def page(text):
        recorder = Recorder(Words(_7=text), SETTINGS, prompt=text, model=text, title=text)
        return record(recorder, [some_steps(0, 2, 8, 8, np.random.default_rng(0))]).page()

    assert Tags(page(HOSTILE)).seen == Tags(page("harmless")).seen
    assert page(HOSTILE).isascii() == page("harmless").isascii()
    data = data_of(page(HOSTILE))
    assert data["prompt"] == data["title"] == data["model"] == HOSTILE
    assert [7, HOSTILE] in data["tokens"]


def test_a_page_needs_nothing_else():
    page = Recorder(Words(), SETTINGS).page()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'") and "unsafe-eval" not in policy
    assert "script-src 'sha256-" in policy and "SCRIPT_HASH" not in page
    assert set(re.findall(r"https?://[^\"'` ]*", page)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched


def test_a_thousand_tokens_of_the_26b_stay_below_2_mb():
    rng = np.random.default_rng(0)
    blocks = [some_steps(block, 48, 256, 262_144, rng) for block in range(4)]
    size = len(record(Recorder(Words(), SETTINGS), blocks).page())
    assert size < 2e6, f"{size / 192:.0f} bytes per step"


def test_a_row_that_is_not_running_is_skipped():
    recorder = Recorder(Words(), SETTINGS)
    first, second = some_steps(0, 2, 8, 90, np.random.default_rng(0))
    second.running[0] = False
    recorder.take(first)
    recorder.take(second)
    assert len(data_of(recorder.page())["blocks"][0]["steps"]) == 1


def test_blocks_without_steps():
    """A row that finished before adds nothing; a canvas that is known throughout adds its text."""
    recorder = Recorder(Words(), SETTINGS)
    recorder.take(BlockDone(0, np.array([[7, 8, 1, 0]]), np.array([0]), 0.1))
    recorder.take(BlockDone(1, np.zeros((1, 4), int), np.array([0]), 0.1))
    data = data_of(recorder.page())
    assert [(block["end"], block["steps"]) for block in data["blocks"]] == [(2, [])]
    assert data["totals"]["known"] == 3 and data["totals"]["tokens_per_forward"] is None
    assert data["tokens"][2] == [1, "", "<special 1>"]


def test_an_interrupted_run_and_a_cut_one():
    blocks = [some_steps(0, 3, 8, 90, np.random.default_rng(0)), some_steps(1, 3, 8, 90, np.random.default_rng(1))]
    data = data_of(record(Recorder(Words(), SETTINGS.replace(max_new_tokens=10)), blocks, done=False).page())
    assert [block["end"] for block in data["blocks"]] == [8, 2]
    assert (data["totals"]["tokens"], data["totals"]["stopped"], data["totals"]["seconds"]) == (10, None, None)


def test_a_models_folder_is_named_and_not_where_it_lies(tmp_path):
    folder = tmp_path / "dgemma-q4"
    folder.mkdir()
    page = Recorder(Words(), SETTINGS, model=str(folder)).page()
    assert data_of(page)["model"] == "dgemma-q4" and str(tmp_path) not in page


def test_a_file_appears_complete_or_not_at_all(tmp_path, monkeypatch):
    path, link = tmp_path / "a.html", tmp_path / "link.html"
    link.symlink_to(path)
    recorder = Recorder(Words(), SETTINGS)
    check_writable(path)
    assert list(tmp_path.iterdir()) == [link]  # the trial leaves nothing
    recorder.write(link)
    assert link.is_symlink() and path.read_text() == recorder.page()

    def full(*_):
        raise OSError(28, "No space left on device")

    path.write_text("older")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DgemmaError, match=r"a.html: cannot be written \(No space left on device\), expected a name"):
        recorder.write(path)
    assert path.read_text() == "older" and sorted(tmp_path.iterdir()) == [path, link]


def test_a_path_that_cannot_be_written_is_refused_before(tmp_path):
    cases = {
        tmp_path
        / "missing"
        / "a.html": r"a.html: cannot be written \(No such file or directory\).*make the folder first",
        tmp_path: "is not a file, expected a file's name",
        "/dev/null": "/dev/null: is not a file",  # a rename would replace the device
        tmp_path / ("a" * 300): "cannot be written",
    }
    for path, message in cases.items():
        with pytest.raises(DgemmaError, match=message) as caught:
            check_writable(path)
        assert "\n" not in str(caught.value)
