"""The exact newest tokens of one layer, in a buffer of fixed size.

    keys, values  [batch, kv_heads, capacity, head_dim]
                  | spent | tokens in the window | room |
                          ^ start                ^ stop

Tokens enter at `stop`. When pages are compressed the oldest tokens are spent: `start` moves on, and
the rest moves to the front only when room is needed, so a view of the window taken in one step stays
true until the next.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tqai.backends.base import ExactTokens
from tqai.cache.offsets import Offsets

__all__ = ["Window", "joined"]


class Window:
    """At most `capacity` exact tokens of every sequence."""

    def __init__(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        """An empty window for tokens like `keys` and `values` `[batch, kv_heads, any, head_dim]`."""
        self.capacity = capacity
        self.keys = keys.new_empty((*keys.shape[:2], capacity, keys.shape[3]))
        self.values = values.new_empty((*values.shape[:2], capacity, values.shape[3]))
        self.start = 0
        self.stop = 0

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def tokens(self) -> ExactTokens:
        """The tokens in the window, oldest first: views, true until the next call that changes it."""
        return ExactTokens(self.keys[:, :, self.start : self.stop], self.values[:, :, self.start : self.stop])

    def append(self, keys: Tensor, values: Tensor, offsets: Offsets | None = None) -> bool:
        """Add tokens, less `offsets`, if they fit; False, with nothing changed, if they do not."""
        count = keys.shape[2]
        if len(self) + count > self.capacity:
            return False
        if self.stop + count > self.capacity:
            self._move_to_front()
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
        if not self.append(keys, values):
            raise ValueError(f"{keys.shape[2]} tokens do not fit a window of {self.capacity}")

    def drop_oldest(self, count: int) -> None:
        """Spend the `count` oldest tokens."""
        self.start += count

    def drop_newest(self, count: int) -> None:
        """Take the `count` newest tokens back."""
        self.stop -= count

    def select(self, rows: Tensor) -> None:
        """Make sequence `rows[i]` the new sequence i."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def move(self, moved: Callable[[ExactTokens], ExactTokens]) -> None:
        """Hold `moved(tokens)`, of the same shape, instead of the tokens. Views of the window that were
        taken before stay as they are: the buffers are new."""
        tokens = moved(self.tokens)
        self.keys, self.values = torch.empty_like(self.keys), torch.empty_like(self.values)
        self.replace(*tokens)

    def _move_to_front(self) -> None:
        held = len(self)
        if held and self.start:
            keys, values = self.tokens
            # source and target may overlap
            self.keys[:, :, :held] = keys.clone()
            self.values[:, :, :held] = values.clone()
        self.start, self.stop = 0, held


def joined(first: ExactTokens, second: ExactTokens) -> ExactTokens:
    """Tokens of `first`, then of `second`; `second` itself where `first` is empty."""
    if first.keys.shape[2] == 0:
        return second
    return ExactTokens(
        torch.cat([first.keys, second.keys], dim=2), torch.cat([first.values, second.values], dim=2)
    )
