"""What a person is shown of a canvas: the state of each slot, and where its text ends.

Shapes   C canvas slots of one row
Differs  known and changed are not words of the sampler: it accepts a slot or renoises it
"""

import numpy as np

from .config import GenerationConfig
from .events import StepDone

# fmt: off
STATES = {
    "known":    "given, and never renoised",
    "accepted": "keeps its token this step",
    "changed":  "accepted, and not the draft of the step before",
    "noisy":    "a random token takes its place",
}
# fmt: on
KNOWN, ACCEPTED, CHANGED, NOISY = range(len(STATES))


def slot_states(event: StepDone, before: np.ndarray | None, row: int = 0) -> np.ndarray:
    """The state of each slot after a step, as an index into STATES. (C,)

    before (C,): the draft of the step before, None at a block's first.
    """
    draft, accepted = event.draft[row], event.accepted[row].astype(bool)
    changed = accepted & (draft != (draft if before is None else before))
    return np.select([known_slots(event, row), changed, accepted], [KNOWN, CHANGED, ACCEPTED], NOISY)


def known_slots(event: StepDone, row: int = 0) -> np.ndarray:
    """Slots whose token was given. (C,) bool"""
    return np.zeros(event.draft.shape[1], bool) if event.known is None else event.known[row]


def text_end(tokens: np.ndarray, settings: GenerationConfig, known: np.ndarray | None = None) -> int:
    """The slot of the stop id that ends the text of `tokens` (C,), or C. A stop id in front of known text ends nothing.

    known (C,): where it is None the tokens are a finished block's, in which only pad follows the end.
    """
    no_text = np.isin(tokens, (*settings.stop_token_ids, settings.pad_token_id))
    text = np.flatnonzero(~no_text if known is None else known & ~no_text)
    first = text[-1] + 1 if text.size else 0
    stops = np.flatnonzero(np.isin(tokens[first:], settings.stop_token_ids))
    return int(first + stops[0]) if stops.size else len(tokens)
