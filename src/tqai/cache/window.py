"""The exact newest tokens of one layer, in a buffer that is little larger than they are.

    keys, values  [batch, kv_heads, rows, head_dim]
                  | spent | tokens in the window | room |
                          ^ start                ^ stop

Tokens enter at `stop`. When pages are compressed the oldest tokens are spent: `start` moves on. Where the
room is used up the tokens move to a new buffer, of as many rows as they need and up to `ROOM_TOKENS` more:
every byte held counts, and a buffer of fixed size would hold 32 empty rows on average. So a view of the
window taken in one step stays true. `fix` makes one buffer of `capacity` rows and keeps it, for kernels that
were told its address.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tqai.backends.base import ExactTokens
from tqai.cache.offsets import Offsets

__all__ = ["ROOM_TOKENS", "Window", "joined"]

ROOM_TOKENS = 8
"""Rows of room in a new buffer: tokens are copied once in 8 steps for it."""


class Window:
    """At most `capacity` exact tokens of every sequence.

    Attributes:
        keys, values: the buffers; their rows are the bytes held.
        capacity: most tokens.
    """

    def __init__(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        """An empty window for tokens like `keys` and `values` `[batch, kv_heads, any, head_dim]`."""
        self.capacity = capacity
        self.keys = keys.new_empty((*keys.shape[:2], 0, keys.shape[3]))
        self.values = values.new_empty((*values.shape[:2], 0, values.shape[3]))
        self.start = 0
        self.stop = 0
        self._fixed = False

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> int:
        """Tokens that the buffers have room for, spent ones included."""
        return int(self.keys.shape[2])

    @property
    def tokens(self) -> ExactTokens:
        """The tokens in the window, oldest first: views, true until the next call that changes it."""
        return ExactTokens(self.keys[:, :, self.start : self.stop], self.values[:, :, self.start : self.stop])

    def append(self, keys: Tensor, values: Tensor, offsets: Offsets | None = None) -> bool:
        """Add tokens, less `offsets`, if they fit; False, with nothing changed, if they do not."""
        count = keys.shape[2]
        if len(self) + count > self.capacity:
            return False
        if self.stop + count > self.rows:
            self._make_room(count)
        place = slice(self.stop, self.stop + count)
        if offsets is not None:
            target = ExactTokens(self.keys[:, :, place], self.values[:, :, place])
            offsets.take_off_into(target, ExactTokens(keys, values))
        else:
            self.keys[:, :, place] = keys
            self.values[:, :, place] = values
        self.stop += count
        return True

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold these tokens (at most `capacity`) and no others."""
        self.start = self.stop = 0
        if not self._fixed:
            self._allocate(0)
        if not self.append(keys, values):
            raise ValueError(f"{keys.shape[2]} tokens do not fit a window of {self.capacity}")

    def drop_oldest(self, count: int) -> None:
        """Spend the `count` oldest tokens."""
        self.start += count
        if self.start and not self._fixed:
            self._copy_into_new(len(self))

    def drop_newest(self, count: int) -> None:
        """Take the `count` newest tokens back."""
        self.stop -= count
        if self.rows > self.stop + ROOM_TOKENS and not self._fixed:
            self._make_room(0)

    def select(self, rows: Tensor) -> None:
        """Make sequence `rows[i]` the new sequence i."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def move(self, moved: Callable[[ExactTokens], ExactTokens]) -> None:
        """Hold `moved(tokens)`, of the same shape, instead of the tokens. Views of the window that were
        taken before stay as they are: the buffers are new."""
        tokens = moved(self.tokens)
        self._allocate(self.rows if self._fixed else 0)
        self.replace(*tokens)

    def fix(self) -> None:
        """Have `capacity` rows, the tokens in front, and never again another buffer, but for `move` and
        `select`."""
        if not self._fixed:
            self._fixed = True
            self._copy_into_new(self.capacity)
        self.move_to_front()

    def move_to_front(self) -> None:
        """Make all spent rows room, within the buffer."""
        held = len(self)
        if held and self.start:
            keys, values = self.tokens
            # source and target may overlap
            self.keys[:, :, :held] = keys.clone()
            self.values[:, :, :held] = values.clone()
        self.start, self.stop = 0, held

    def _make_room(self, count: int) -> None:
        if self._fixed:
            self.move_to_front()
        else:
            self._copy_into_new(min(len(self) + max(count, ROOM_TOKENS), self.capacity))

    def _copy_into_new(self, rows: int) -> None:
        keys, values = self.tokens
        held = len(self)
        self._allocate(rows)
        self.keys[:, :, :held] = keys
        self.values[:, :, :held] = values
        self.start, self.stop = 0, held

    def _allocate(self, rows: int) -> None:
        shape = (*self.keys.shape[:2], rows)
        self.keys = self.keys.new_empty((*shape, self.keys.shape[3]))
        self.values = self.values.new_empty((*shape, self.values.shape[3]))


def joined(first: ExactTokens, second: ExactTokens) -> ExactTokens:
    """Tokens of `first`, then of `second`; `second` itself where `first` is empty."""
    if first.keys.shape[2] == 0:
        return second
    return ExactTokens(
        torch.cat([first.keys, second.keys], dim=2), torch.cat([first.values, second.values], dim=2)
    )
