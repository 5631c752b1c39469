"""The prefix: keys and values of every committed token that some later query can still see.

Shapes   B rows, N key-value heads, P stored tokens, D head_dim
Source   transformers 5.23.0, DynamicCache: full layers keep all keys, sliding layers the last window - 1
Differs  arrays are never changed in place, so `copy` is free and a chat can go back to where a turn began

Memory per token, full layers only, is 2 × N × D × bytes; a sliding layer stops growing at window - 1 tokens.
"""

import mlx.core as mx

from .config import ModelConfig


class LayerCache:
    """Keys and values of one layer."""

    def __init__(self, window: int | None, keys=None, values=None):
        self.window = window  # None: keep all
        self.keys = keys  # (B, N, P, D)
        self.values = values

    def __len__(self):
        return 0 if self.keys is None else self.keys.shape[2]

    def joined(self, keys, values):
        """Stored keys and values followed by the given ones; nothing is stored."""
        if self.keys is None:
            return keys, values
        return mx.concatenate([self.keys, keys], axis=2), mx.concatenate([self.values, values], axis=2)

    def append(self, keys, values):
        """Like `joined`, and stored: all of it, or the last window - 1 tokens."""
        keys, values = self.joined(keys, values)
        first = 0 if self.window is None else max(0, keys.shape[2] - (self.window - 1))
        # A slice keeps the whole array alive; a contiguous one is a copy of its own.
        self.keys, self.values = (mx.contiguous(array[:, :, first:]) for array in (keys, values))
        return keys, values


class PrefixCache:
    """All layers of one batch. `length` counts the tokens encoded so far in a row, padding included."""

    def __init__(self, config: ModelConfig):
        window = config.sliding_window
        self.layers = [LayerCache(window if layer.is_sliding else None) for layer in config.layers]
        self.length = 0
        self.padding = None  # (B,) int32, pad tokens at the left of each row; None: no row has any

    @property
    def nbytes(self) -> int:
        """Bytes that the stored keys and values stand for."""
        return sum(c.keys.nbytes + c.values.nbytes for c in self.layers if c.keys is not None)

    @property
    def arrays(self) -> list[mx.array]:
        return [array for c in self.layers if c.keys is not None for array in (c.keys, c.values)]

    def select(self, rows) -> "PrefixCache":
        """The prefixes of some rows; copies them."""
        twin = self.copy()
        for c in twin.layers:
            if c.keys is not None:
                c.keys, c.values = c.keys[rows], c.values[rows]
        twin.padding = None if self.padding is None else self.padding[rows]
        return twin

    def copy(self) -> "PrefixCache":
        """The same prefix; encoding more into one leaves the other as it is. Costs no memory."""
        twin = object.__new__(PrefixCache)
        twin.layers = [LayerCache(c.window, c.keys, c.values) for c in self.layers]
        twin.length, twin.padding = self.length, self.padding
        return twin
