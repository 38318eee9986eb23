"""`Columns`: which column of a step holds which token of which sequence, and the masks that follow.

See the drawing in `store`. A position is the number of a token in its sequence, from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from tqai.core.page import PAGE_TOKENS

__all__ = ["Columns"]

Array = Any

NOWHERE = 1 << 30
"""Position of a column that holds nothing: no query comes after it."""


@dataclass(frozen=True)
class Columns:
    """The columns of a step. Tuples have one entry per sequence.

    Attributes:
        seen: tokens before the step.
        sink_counts, page_counts, window_counts: how much of each kind each sequence holds.
        first_pages: pages dropped before the first page held.
        sinks, pages, window, new: columns of each kind (pages in pages).
        first: so many of the new tokens are padding.
    """

    seen: tuple[int, ...]
    sink_counts: tuple[int, ...]
    page_counts: tuple[int, ...]
    first_pages: tuple[int, ...]
    window_counts: tuple[int, ...]
    sinks: int
    pages: int
    window: int
    new: int
    first: tuple[int, ...]
    sliding_window: int | None

    @property
    def count(self) -> int:
        """All columns."""
        return self.sinks + self.pages * PAGE_TOKENS + self.window + self.new

    @cached_property
    def uniform(self) -> bool:
        """Whether all sequences are alike and no column is empty."""
        held = zip(
            self.seen,
            self.sink_counts,
            self.page_counts,
            self.first_pages,
            self.window_counts,
            self.first,
            strict=True,
        )
        first = (self.seen[0], self.sinks, self.pages, self.first_pages[0], self.window, 0)
        return all(row == first for row in held)

    @property
    def hidden(self) -> int:
        """Columns at the front that are out of sight of every query, where all sequences are alike."""
        if self.sliding_window is None or not self.uniform:
            return 0
        return max(self.seen[0] - self.sliding_window + 1 - self._held_from, 0)

    @property
    def _held_from(self) -> int:
        return self.seen[0] - (self.count - self.new)

    def is_causal(self, window: int | None) -> bool:
        """Whether a plain causal mask over the columns in sight is right for a sliding window of `window`
        tokens (None: no window)."""
        if not self.uniform:
            return False
        return window is None or self.count - self.hidden <= window

    def mask(self, window: int | None) -> Array:
        """Bool `[batch or 1, 1, new, columns in sight]`: what each new token may see."""
        window = window if window is not None else self.sliding_window
        if self.uniform:
            keys = mx.arange(self._held_from + self.hidden, self.seen[0] + self.new)
            queries = mx.arange(self.seen[0], self.seen[0] + self.new)[:, None]
            return _visible(keys, queries, window)[None, None]
        keys = mx.array(self._positions())[:, None, None, :]
        starts = np.array(self.seen) - np.array(self.first)
        queries = mx.array((starts[:, None] + np.arange(self.new)).astype(np.int32))[:, None, :, None]
        return _visible(keys, queries, window)

    def page_range(self) -> tuple[list[int], list[int]]:
        """First and last + 1 column among the pages' tokens that a single new token of each sequence sees."""
        starts = []
        for seen, dropped in zip(self.seen, self.first_pages, strict=True):
            unseen = 0 if self.sliding_window is None else max(seen - self.sliding_window + 1, 0)
            starts.append(max(unseen - dropped * PAGE_TOKENS, 0))
        stops = [count * PAGE_TOKENS for count in self.page_counts]
        return [min(a, b) for a, b in zip(starts, stops, strict=True)], stops

    def _positions(self) -> NDArray[np.int32]:
        """Position of every column of every sequence, `[batch, columns]`."""
        out = np.full((len(self.seen), self.count), NOWHERE, dtype=np.int32)
        window_at = self.sinks + self.pages * PAGE_TOKENS
        for row, seen in enumerate(self.seen):
            sinks = self.sink_counts[row]
            out[row, :sinks] = np.arange(sinks)
            tokens = self.page_counts[row] * PAGE_TOKENS
            start = sinks + self.first_pages[row] * PAGE_TOKENS
            out[row, self.sinks : self.sinks + tokens] = np.arange(start, start + tokens)
            held = self.window_counts[row]
            stop = window_at + self.window
            out[row, stop - held : stop] = np.arange(seen - held, seen)
            first = self.first[row]
            out[row, stop + first :] = np.arange(seen, seen + self.new - first)
        return out


def _visible(keys: Array, queries: Array, window: int | None) -> Array:
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)
