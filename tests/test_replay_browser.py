"""A recorded page in a real browser: its text at every step, keys, tooltip, and that hostile text stays text.

Needs a Chromium or Chrome, which is no dependency of the project: without one these tests are skipped. On Debian
`apt-get install chromium`; DGEMMA_BROWSER names another one.
"""

import time

import numpy as np
import pytest

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.events import BlockDone, Done, Stats, StepDone
from mlx_dgemma.record import Recorder
from tests.browser import Browser, find_browser
from tests.test_record import HOSTILE, Words, record, some_steps

pytestmark = pytest.mark.skipif(find_browser() is None, reason="found no Chromium or Chrome (or set DGEMMA_BROWSER)")

STOP = 1
# fmt: off
# Two canvases of five slots. Slot 0 of the first is given; slot 3 holds hostile text once it has settled.
STEPS = [  # block, draft, canvas, accepted, entropy
    (0, [10, 20, 21, 22, 23], [10, 20, 60, 61, 62], [0, 1, 0, 0, 0], [0, 0.01, 1.5, 2, 3]),
    (0, [10, 20, 31, 99, 23], [10, 20, 31, 99, 63], [0, 1, 1, 1, 0], [0, 0.01, 0.125, 0.2, 3]),
    (0, [10, 20, 31, 99, 33], [10, 20, 31, 99, 33], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]),
    (1, [40, STOP, 0, 0, 0], [40, STOP, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]),
]
# fmt: on
FIRST, FINISHED = " w10 w20 w21 w22 w23", f" w10 w20 w31{HOSTILE} w33 w40"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """file:// address of a recording of STEPS."""
    recorder = Recorder(Words(_99=HOSTILE), GenerationConfig(), prompt=HOSTILE, model=HOSTILE, title=HOSTILE)
    for n, (block, draft, canvas, accepted, entropy) in enumerate(STEPS):
        draft, canvas = np.array([draft]), np.array([canvas])
        known = np.array([[block == 0, 0, 0, 0, 0]], bool)
        accepted, entropy = np.array([accepted], bool), np.array([entropy], np.float32)
        recorder.take(
            StepDone(block, n % 3, np.array([0.8]), draft, canvas, accepted, entropy, np.array([True]), known)
        )
        if n >= 2:
            recorder.take(BlockDone(block, draft, np.array([3 - 2 * block]), 0.1))
    tokens = [10, 20, 31, 99, 33, 40]
    recorder.take(Done([""], [tokens], [True], Stats(prompt_tokens=1, seconds=0.5)))
    path = tmp_path_factory.mktemp("replay") / "replay.html"
    recorder.write(path)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(find_browser(), tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def replay(browser, page):
    browser.look(1200, 800)
    browser.open(page)
    yield browser
    # Whatever a test did: no script but the page's ran, nothing was fetched, nothing was complained about.
    assert browser.complaints() == []
    assert browser.requests() == [page]


def text(browser):
    return browser.js(
        "[...document.querySelectorAll('.block:not([hidden]) .slot:not([hidden])')].map(s => s.textContent).join('')"
    )


def states(browser):
    return browser.js("[...document.querySelectorAll('.block:not([hidden]) .slot')].map(s => s.classList[1])")


def where(browser):
    return browser.js("document.getElementById('where').textContent")


def clean(text):
    """As the page shows it: lone surrogates and control characters have no shape."""
    return text.replace("\x00", "·")


def test_scrubbing_shows_each_steps_text(replay):
    assert text(replay) == FIRST and where(replay) == "Block 1 of 2, step 1 of 3"
    assert states(replay) == ["known", "accepted", "noisy", "noisy", "noisy"]
    # Of the four slots that are not given one has settled.
    values = replay.js("document.getElementById('values').innerText")
    assert " ".join(values.split()) == "mean entropy 1.63 nats 25 % settled"
    scrub = "(s => { s.value = %d; s.dispatchEvent(new Event('input')); })(document.getElementById('step'))"
    replay.js(scrub % 1)
    assert states(replay) == ["known", "accepted", "changed", "changed", "noisy"]
    # Committed text stays above the next canvas, whose tail behind the end is hidden.
    replay.js(scrub % 3)
    assert text(replay) == clean(FINISHED) + "<special 1>···" and where(replay) == "Block 2 of 2, step 1 of 1"
    replay.js(scrub % 4)
    assert text(replay) == clean(FINISHED) and where(replay) == "Finished text"
    assert replay.js("document.getElementById('step').max") == "4"


def test_keys(replay):
    for key, place in [
        ("ArrowRight", "Block 1 of 2, step 2 of 3"),
        ("ArrowLeft", "Block 1 of 2, step 1 of 3"),
        ("ArrowLeft", "Block 1 of 2, step 1 of 3"),
        ("End", "Finished text"),
        ("Home", "Block 1 of 2, step 1 of 3"),
    ]:
        replay.press(key)
        assert where(replay) == place, key
    replay.js("document.getElementById('step').focus()")
    replay.press("ArrowRight")  # on the slider too, and once
    assert where(replay) == "Block 1 of 2, step 2 of 3"
    replay.press("n")
    assert text(replay) == clean(f" w10 w20 w31{HOSTILE} w63")
    replay.press("h")
    assert not replay.js("document.getElementById('text').classList.contains('heat')")


def test_space_plays_to_the_end_and_pauses(replay):
    replay.js("document.getElementById('speed').value = '10'")
    replay.press(" ")
    assert replay.js("document.getElementById('play').textContent") == "Pause"
    replay.press(" ")
    assert replay.js("document.getElementById('play').textContent") == "Play"
    replay.press(" ")
    replay.js("""new Promise(done => setInterval(() =>
        document.getElementById('play').textContent === 'Play' && done(), 20))""")
    assert where(replay) == "Finished text"
    replay.point("#play", click=True)  # and again from the start
    replay.press(" ")
    assert where(replay).startswith("Block 1")


def tip(browser):
    if browser.js("document.getElementById('tip').hidden"):
        return None
    rows = "[...document.querySelectorAll('#tip dt')].map(t => [t.textContent, t.nextSibling.textContent])"
    return {"": browser.js("document.querySelector('#tip p').textContent"), **dict(browser.js(rows))}


def test_the_tooltip_of_a_token(replay):
    assert tip(replay) is None
    replay.point(".slot:nth-child(3)")
    assert tip(replay) == {
        "": "␣w21",
        "token": "21",
        "state": "noisy: a random token takes its place",
        "canvas": "␣w60",
        "entropy": "1.5 nats",
        "settled": "in step 2 of 3",
        "slot": "3, block 1",
    }
    replay.press("ArrowRight")  # it follows the steps
    assert tip(replay)[""] == "␣w31" and tip(replay)["entropy"] == "0.125 nats" and "canvas" not in tip(replay)
    replay.press("ArrowLeft", shift=True)
    replay.press("ArrowLeft", shift=True)
    # The browser may handle a key after it has acknowledged it.
    deadline = time.monotonic() + 10
    while tip(replay)["state"] != "known: given, and never renoised" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert tip(replay)["state"] == "known: given, and never renoised" and "entropy" not in tip(replay)
    replay.press("Escape")
    assert tip(replay) is None


def test_hostile_text_makes_no_element(replay):
    replay.press("End")
    elements = replay.js("document.querySelectorAll('img, iframe, object').length")
    scripts = replay.js("document.scripts.length")
    assert (elements, scripts) == (0, 2)
    shown = clean(HOSTILE)
    assert replay.js("document.querySelectorAll('.slot')[3].textContent") == shown
    assert replay.js("document.querySelectorAll('.slot')[3].children.length") == 0
    assert replay.js("document.querySelector('#prompt p').textContent") == HOSTILE
    assert replay.js("document.getElementById('title').textContent") == HOSTILE


def test_a_policy_stands_behind_the_text_nodes(browser, page):
    """Even markup that got into the page would run nothing and fetch nothing."""
    browser.open(page)
    browser.js("""document.body.insertAdjacentHTML('beforeend',
        '<img src="data:," onerror="window.ran = 1"><img src="https://localhost/x.png">')""")
    browser.js("new Promise(r => setTimeout(r, 200))")
    assert browser.js("window.ran") is None
    blocked = [event["params"]["entry"]["text"] for event in browser.complaints()]
    assert len(blocked) == 2 and all("Content Security Policy" in text for text in blocked)


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_sticks_out(replay, width):
    replay.look(width, 740, prefers_color_scheme="dark", prefers_reduced_motion="reduce")
    assert replay.js("document.documentElement.scrollWidth") == width
    assert replay.js("getComputedStyle(document.querySelector('.slot')).transitionDuration") == "0s"


def test_a_long_text_is_followed(browser, tmp_path):
    """The canvas at hand stands above the controls, whichever block it is."""
    recorder, rng = Recorder(Words(), GenerationConfig(max_new_tokens=1024)), np.random.default_rng(0)
    path = tmp_path / "long.html"
    record(recorder, [some_steps(block, 2, 256, 10**5, rng) for block in range(3)]).write(path)
    browser.look(390, 844)
    browser.open(path.as_uri())
    assert browser.js("scrollY") == 0
    for step, block in ((2, 1), (4, 2), (1, 0)):
        browser.js(f"go({step})")
        top = browser.js(f"document.querySelectorAll('.block')[{block}].getClientRects()[0].top")
        assert 0 <= top < 0.6 * browser.js("document.querySelector('.controls').getBoundingClientRect().top")


def test_a_recording_without_steps_opens(browser, tmp_path):
    path = tmp_path / "empty.html"
    Recorder(Words(), GenerationConfig()).write(path)
    browser.open(path.as_uri())
    browser.press("ArrowRight")
    assert where(browser) == "Finished text" and browser.complaints() == []
