"""Which rows and slots of a batch a step still computes: work that cannot change the text is left out.

Shapes   B rows, C canvas slots; of them R rows and L slots are in play
Source   rows of a batch are independent, and noise depends on row, step and slot alone (noise.py)
Differs  transformers computes every row and slot until the last row has settled

Leaving out settled rows changes nothing. Leaving out the tail behind a settled end token does: other slots no longer
see it, and how long the tail is depends on all rows of the batch. So that is a setting (`drop_tail`), in no preset.
"""

import numpy as np

from .config import GenerationConfig

PARTS = 8  # a canvas shrinks by eighths, so that few shapes occur


class InPlay:
    """Drives one block's steps of an engine and keeps what is no longer computed as it was."""

    def __init__(self, engine, canvas: np.ndarray, free: np.ndarray, config: GenerationConfig):
        self.engine, self.free, self.config = engine, free, config
        self.rows, self.length = np.arange(len(canvas)), canvas.shape[1]
        self.ends = np.full(len(canvas), -1)  # where each row's draft ended after the step before; -1: nowhere
        self.last = None  # arrays of the whole canvas, once there was a step
        self.canvas = canvas
        engine.start(canvas)

    def step(self, temperature: np.ndarray, uniforms: np.ndarray, renoise: np.ndarray):
        """A step of what is in play, as arrays of the whole canvas; what stands behind a cut counts as sure."""
        here = np.ix_(self.rows, np.arange(self.length))
        found = self.engine.step(
            temperature[self.rows], self.config.entropy_bound, uniforms[here], renoise[here], self.free[here]
        )
        if len(self.rows) * self.length < self.canvas.size:
            # Rows that were left out before the first step show their noise; nobody reads it.
            nothing = np.zeros(self.canvas.shape)
            old = self.last or (self.canvas, self.canvas, nothing, nothing)
            whole = [np.array(array, part.dtype) for array, part in zip(old, found, strict=True)]
            for array, part in zip(whole, found, strict=True):
                array[here] = part
            draft, _, _, entropy = whole
            entropy[self.rows, self.length :] = 0
            endless = self.rows[~np.isin(draft[here], self.config.stop_token_ids).any(axis=-1)]
            draft[endless, self.length :] = self.config.pad_token_id  # what stands there belonged to another end
            found = type(found)(*whole)
        self.last = found
        return found

    def narrow(self, running: np.ndarray) -> None:
        """Leave out rows that have settled, and the tail of the others where the settings allow it. running (B,)"""
        if not self.engine.flexible or not running.any():
            return
        rows, length = self.rows, self.length
        # Half as many rows, or fewer: every change of shape costs something.
        if 2 * running.sum() <= len(rows):
            rows = np.flatnonzero(running)
        if self.config.drop_tail and self.last is not None:
            length = self._needed(running)
        if length > self.length:  # an end that seemed settled is gone: the whole canvas again, without beliefs
            self.engine.start(self.last.canvas)
            self.rows, self.length = np.arange(len(running)), self.canvas.shape[1]
        elif len(rows) < len(self.rows) or length < self.length:
            self.engine.select(np.searchsorted(self.rows, rows), length)
            self.rows, self.length = rows, length

    def _needed(self, running):
        """Slots up to the last end token that stands twice in the same place and is sure, in eighths of the canvas."""
        draft, entropy, C = self.last.draft, self.last.entropy, self.canvas.shape[1]
        is_stop = np.isin(draft[:, : self.length], self.config.stop_token_ids)
        ends = np.where(is_stop.any(-1), is_stop.argmax(-1), -1)
        sure = np.take_along_axis(entropy, np.maximum(ends, 0)[:, None], 1)[:, 0] < self.config.confidence_threshold
        settled, self.ends = (ends >= 0) & (ends == self.ends) & sure, ends
        if (ends[running] < 0).any():
            return C
        if not settled[running].all():
            return self.length
        part = -(-C // PARTS)
        return min(self.length, -(-(int(ends[running].max()) + 1) // part) * part)
