"""The live view: four states that differ on every terminal, and a text end that hides nothing known."""

import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.events import StepDone
from mlx_dgemma.slots import ACCEPTED, CHANGED, KNOWN, NOISY, slot_states, text_end

PAD, STOP = 0, 1
SETTINGS = GenerationConfig()

# κ known, α accepted, χ changed, ν noisy: two steps of one canvas, drawn by the view itself.
SHOW = """
import numpy as np, sys
from types import SimpleNamespace
from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.events import BlockDone, Done, Stats, StepDone
from mlx_dgemma.view import View

class Letters:
    def pieces(self, tokens):
        return [chr(t) if t > 200 else "" for t in tokens]
    def reply(self, tokens):
        return SimpleNamespace(text="".join(self.pieces(tokens)), thought="")

def step(n, text):
    flags = [np.array([[c in chosen for c in "καχν"]]) for chosen in ("αχ", "κ")]
    draft = np.array([[*map(ord, text)]], np.int32)
    return StepDone(0, n, 0.8, draft, draft, flags[0], np.zeros((1, 4)), np.array([True]), flags[1])

with View(Letters(), GenerationConfig()) as view:
    view.draw(step(0, "καων"))
    view.draw(step(1, "καχν"))
    view.draw(BlockDone(0, np.array([[*map(ord, "καχν")]], np.int32), np.array([2]), 0.1))
    view.draw(Done(["καχν"], [[*map(ord, "καχν")]], [False], Stats(prompt_tokens=1)))
"""


def shown_on(terminal, columns=100, **environment):
    """Everything SHOW writes on a pseudo-terminal of that name."""
    control, end = pty.openpty()
    hidden = {"NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW],
        stdin=subprocess.DEVNULL,
        stdout=end,
        stderr=end,
        env={**inherited, "TERM": terminal, "COLUMNS": str(columns), "LINES": "24", "PYTHONUTF8": "1", **environment},
    )
    os.close(end)
    output = b""
    while True:
        try:
            piece = os.read(control, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not piece:
            break
        output += piece
    os.close(control)
    assert process.wait(timeout=60) == 0, output
    return output.decode()


def styles(output):
    """Each letter's SGR code where it was drawn last on the canvas, and each legend word's."""
    canvas = output[output.index("step 1") : output.rindex("noisy") + 5]
    pattern = r"(?:\x1b\[([\d;]+)m)?((?<!% )(?:known|accepted|changed|noisy)|[καχν])"
    return {found[2]: (found[1] or "").removeprefix("0") for found in re.finditer(pattern, canvas)}


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}], ids=["colours", "NO_COLOR"])
def test_the_four_states_differ_and_the_legend_shows_them(environment):
    seen = styles(shown_on("xterm", **environment))
    assert len({seen[letter] for letter in "καχν"}) == 4, seen
    # The legend's words look like what they name.
    names = {"κ": "known", "α": "accepted", "χ": "changed", "ν": "noisy"}
    assert {letter: seen[letter] for letter in names} == {letter: seen[name] for letter, name in names.items()}
    if environment:
        assert seen["χ"] == "4" and seen["κ"] == "1" and seen["ν"] == "2"  # underlined, bold, dim


def test_a_dumb_terminal_gets_the_text_alone():
    for terminal in ("dumb", "unknown"):
        assert shown_on(terminal) == "καχν\r\n"


def test_the_status_line_says_what_is_accepted():
    output = shown_on("xterm")
    # Of the three slots that are not known two are accepted.
    assert "block 1, step 2 | 67 % accepted" in output
    narrow = shown_on("xterm", columns=40)
    assert "67 % accepted" in narrow and "noisy" not in narrow


def a_step(draft, accepted, known=None):
    draft, accepted = np.array([draft], np.int32), np.array([accepted], bool)
    known = None if known is None else np.array([known], bool)
    return StepDone(0, 0, 0.8, draft, draft, accepted, np.zeros(draft.shape), np.array([True]), known)


def test_states_of_a_canvas():
    event = a_step([7, 8, 9, 5], [0, 1, 1, 0], known=[1, 0, 0, 0])
    assert slot_states(event, np.array([7, 8, 8, 8])).tolist() == [KNOWN, ACCEPTED, CHANGED, NOISY]
    # A block's first step has nothing to differ from; an event that says nothing of known slots has none.
    assert slot_states(a_step([7, 8], [1, 0]), None).tolist() == [ACCEPTED, NOISY]


@pytest.mark.parametrize(
    ("tokens", "known", "end"),
    [
        ([7, STOP, 8, STOP, 9], [0, 0, 0, 0, 0], 1),  # nothing known: the first stop id
        ([7, STOP, 8, STOP, 9], [0, 0, 1, 0, 0], 3),  # known text behind it
        ([7, STOP, 8, 9, 9], [0, 0, 1, 0, 0], 5),  # no end yet
        ([7, STOP, PAD, STOP, 9], [0, 0, 1, 1, 0], 1),  # a known end is no text
        ([7, 8], [0, 0], 2),
        ([7, STOP, 8, STOP, PAD], None, 3),  # a finished block: only pad follows the end
        ([STOP, PAD], None, 0),
    ],
)
def test_where_a_text_ends(tokens, known, end):
    known = None if known is None else np.array(known, bool)
    assert text_end(np.array(tokens), SETTINGS, known) == end
