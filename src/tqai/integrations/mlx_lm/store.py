"""`TokenStore`: the tokens of one attention layer for sequences that may differ in length.

    newest tokens -> window (exact, model dtype) -> page of 64 tokens (codes) -> stays, or is dropped
                                                                                by a sliding window
    first tokens  -> sinks  (exact, model dtype), where `sink_tokens` asks for them

What is compressed when is as in `tqai.cache.layer`, so that a cache saved there goes on here: the state
of a sequence after N tokens depends on N alone. Columns of a batch, drawn for two sequences:

    sinks      pages, from the left        window, to the right    new
    | s s s |  | p0 | p1 | p2 | p3 |  |        w w w w w |  | n |
    | s s s |  | p0 | p1 | -- | -- |  |            w w w |  | n |        -- holds nothing

Arrays of MLX cannot be changed under a reader, so a step that was handed out stays true.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from tqai.backends.base import ExactTokens
from tqai.backends.mlx.metal.launch import encode_pages
from tqai.backends.mlx.pages import decode_pages
from tqai.cache.page_format import page_format_for
from tqai.config import CacheConfig
from tqai.core.page import PAGE_TOKENS, PageFormat
from tqai.errors import InputError, NonFiniteError
from tqai.integrations.mlx_lm.columns import Columns
from tqai.integrations.mlx_lm.exact import joined, owned, widened
from tqai.integrations.mlx_lm.step import Step

__all__ = ["SLAB_PAGES", "TokenStore"]

Array = Any

SLAB_PAGES = 64
"""Pages per slab. A new page copies the last slab and no other."""


class TokenStore:
    """Keys and values of one layer.

    Attributes:
        seen: tokens seen so far of each sequence, dropped ones included; [] before the first.
        counts: pages of each sequence.
        first_pages: pages that a sliding window has dropped, of each sequence.
        sink_counts, window_counts: exact tokens of each sequence.
        slabs: uint8 `[batch, kv_heads, <= SLAB_PAGES, page_bytes]` each (one of any size with a
            sliding window).
    """

    def __init__(self, config: CacheConfig, sliding_window: int | None = None, batch: int = 1) -> None:
        self.config = config
        self.sliding_window = sliding_window
        self.page_format: PageFormat | None = None
        self.sinks: ExactTokens | None = None
        self.window: ExactTokens | None = None
        self.slabs: list[Array] = []
        self.seen = [0] * batch
        self.counts = [0] * batch
        self.first_pages = [0] * batch
        self.sink_counts = [0] * batch
        self.window_counts = [0] * batch

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.seen)

    @property
    def sink_tokens(self) -> int:
        """Sinks that this layer keeps. A sliding layer keeps none: they would soon be out of sight."""
        return 0 if self.sliding_window is not None else self.config.sink_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""
        return sum(array.nbytes for array in self.arrays())

    def arrays(self) -> list[Array]:
        """All arrays held."""
        return [*self.slabs, *(self.window or ()), *(self.sinks or ())]

    def columns(self, new: int, first: Sequence[int] | None = None) -> Columns:
        """Where a step with `new` more tokens finds what; `first` new ones are padding."""
        return Columns(
            seen=tuple(self.seen),
            sink_counts=tuple(self.sink_counts),
            page_counts=tuple(self.counts),
            first_pages=tuple(self.first_pages),
            window_counts=tuple(self.window_counts),
            sinks=0 if self.sinks is None else self.sinks.keys.shape[2],
            pages=sum(slab.shape[2] for slab in self.slabs),
            window=0 if self.window is None else self.window.keys.shape[2],
            new=new,
            first=tuple(first or [0] * self.batch),
            sliding_window=self.sliding_window,
        )

    def append(
        self,
        keys: Array,
        values: Array,
        first: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
    ) -> Step:
        """Take `[batch, kv_heads, new, head_dim]` in; returns what these tokens may attend to.

        Of sequence b only the tokens first[b]..stop[b]-1 are real, the others are padding.

        Raises:
            InputError: shapes or dtypes differ from each other or from the tokens held.
            NonFiniteError: NaN or inf, where `check_finite=True` says to look. Nothing is changed then.
        """
        self._check(keys, values)
        new = keys.shape[2]
        columns = self.columns(new, first)
        first = list(first or [0] * self.batch)
        stop = list(stop or [new] * self.batch)
        if self.page_format is None:
            self.page_format = page_format_for(self.config, keys.shape[3], values.shape[3])
        recent = ExactTokens(keys, values)
        if self.window is not None:
            recent = joined([self.window, recent])
        step = Step(self.page_format, self.sinks, tuple(self.slabs), recent, columns)
        uniform = columns.uniform and first == [0] * self.batch and stop == [new] * self.batch
        rows = [slice(None)] if uniform else [slice(row, row + 1) for row in range(self.batch)]
        self._settle(recent, columns.window, rows, first, stop)
        return step

    def view(self) -> Step | None:
        """Everything held, as a step without own tokens; None before the first."""
        if self.window is None or self.page_format is None:
            return None
        return Step(self.page_format, self.sinks, tuple(self.slabs), self.window, self.columns(0))

    def trim(self, count: int) -> None:
        """Take the `count` newest tokens of every sequence back (as many as each has). A page cut in
        two is decompressed into the window.

        Raises:
            InputError: a sliding window has dropped tokens that would come into sight again.
        """
        for row in range(self.batch):
            left = max(self.seen[row] - count, 0)
            held_from = self.first_pages[row] * PAGE_TOKENS
            if self._out_of_sight(left) < held_from:
                raise InputError(
                    f"cannot take {count} tokens back: the sliding window has dropped the first {held_from}"
                )
        if self.window is None:
            return
        if self.batch > 1 and not self.columns(0).uniform:
            from tqai.integrations.mlx_lm.combining import combined

            parts = [self.extracted(row) for row in range(self.batch)]
            for part in parts:
                part.trim(count)
            self._become(combined(parts))
            return
        count = min(count, self.seen[0])
        sinks, pages, window = self.sink_counts[0], self.counts[0], self.window_counts[0]
        self._set_all("seen", self.seen[0] - count)
        if count <= window:
            self.window = owned(self.window, 0, window - count)
            self._set_all("window_counts", window - count)
            return
        kept = pages * PAGE_TOKENS + window - count
        whole, rest = divmod(max(kept, 0), PAGE_TOKENS)
        tail = ExactTokens(*(x[:, :, :0] for x in self.window))
        if rest:
            assert self.page_format is not None
            raw = self.slabs[whole // self.slab_pages][:, :, whole % self.slab_pages]
            decoded = decode_pages(raw, self.page_format, self.window.keys.dtype)
            tail = owned(decoded, 0, rest)
        self.window = tail
        self._set_all("window_counts", rest)
        self._keep_pages(whole)
        self._set_all("counts", whole)
        if kept < 0 and self.sinks is not None:
            self.sinks = owned(self.sinks, 0, sinks + kept) if sinks + kept else None
            self._set_all("sink_counts", sinks + kept)

    def selected(self, rows: Sequence[int]) -> TokenStore:
        """A store whose sequence i is this one's sequence `rows[i]`, in arrays of its own."""
        out = TokenStore(self.config, self.sliding_window, 0)
        for name in ("seen", "counts", "first_pages", "sink_counts", "window_counts"):
            setattr(out, name, [getattr(self, name)[row] for row in rows])
        if self.window is None or not any(out.seen):
            return out
        out.page_format = self.page_format
        index = mx.array(list(rows), dtype=mx.int32)
        width = self.window.keys.shape[2]
        out.window = owned(self.window, width - max(out.window_counts), width, index)
        if self.sinks is not None and max(out.sink_counts):
            out.sinks = owned(self.sinks, 0, max(out.sink_counts), index)
        for start in range(0, max(out.counts), self.slab_pages):
            slab = self.slabs[start // self.slab_pages][index]
            out.slabs.append(mx.contiguous(slab[:, :, : max(out.counts) - start]))
        return out

    def extracted(self, row: int) -> TokenStore:
        """Sequence `row` alone, in arrays of its own."""
        return self.selected([row])

    @property
    def slab_pages(self) -> int:
        """Pages per slab, at most."""
        # pages leave a sliding window at the front, which would move them from slab to slab
        return SLAB_PAGES if self.sliding_window is None else 1 << 30

    def _out_of_sight(self, length: int) -> int:
        """How many of the first `length` tokens a next query cannot see."""
        return 0 if self.sliding_window is None else max(length - self.sliding_window + 1, 0)

    def _settle(
        self, recent: ExactTokens, window: int, rows: list[slice], first: list[int], stop: list[int]
    ) -> None:
        """Move tokens from `recent` (window and new ones) to sinks and pages; keep the rest exact.

        All sequences of one of `rows` are alike and are moved together.
        """
        sinks: list[ExactTokens] = []
        rests: list[ExactTokens] = []
        fresh: list[tuple[slice, int, Array]] = []
        for which in rows:
            row = which.start or 0
            held = self.window_counts[row]
            start = window - held if held else window + first[row]
            count = max(window + stop[row] - start, 0)
            tokens = ExactTokens(*(x[which, :, start : start + count] for x in recent))
            self._add(which, "seen", count - held)
            spent = 0
            if self.sink_counts[row] < self.sink_tokens and not self.counts[row]:
                spent = min(self.sink_tokens - self.sink_counts[row], count)
                sinks.append(ExactTokens(*(x[:, :, :spent] for x in tokens)))
                self._add(which, "sink_counts", spent)
            else:
                sinks.append(ExactTokens(*(x[:, :, :0] for x in tokens)))
            pages = max(count - spent - self.config.window_tokens, 0) // PAGE_TOKENS
            unseen = self._out_of_sight(self.seen[row]) - (self.seen[row] - (count - spent))
            dead = min(max(unseen, 0) // PAGE_TOKENS, pages)
            if dead:  # then the pages before them are out of sight as well
                self._add(which, "first_pages", self.counts[row] + dead)
                self._add(which, "counts", -self.counts[row])
                spent, pages = spent + dead * PAGE_TOKENS, pages - dead
            if pages:
                paged = [x[:, :, spent : spent + pages * PAGE_TOKENS] for x in tokens]
                raw = self._encoded(ExactTokens(*paged), pages)
                fresh.append((which, self.counts[row], raw))
                self._add(which, "counts", pages)
                spent += pages * PAGE_TOKENS
            rests.append(ExactTokens(*(x[:, :, spent:] for x in tokens)))
            self._add(which, "window_counts", count - spent - held)
        self._add_sinks(sinks)
        self._place(fresh)
        self._drop_out_of_sight()
        width = max(self.window_counts)
        sides = [[widened(rest[side], width, left=True) for rest in rests] for side in range(2)]
        self.window = ExactTokens(
            *(mx.contiguous(parts[0] if len(parts) == 1 else mx.concatenate(parts)) for parts in sides)
        )

    def _encoded(self, tokens: ExactTokens, pages: int) -> Array:
        """Page records `[rows, kv_heads, pages, page_bytes]` of 64 times `pages` tokens."""
        assert self.page_format is not None
        keys, values = (x.reshape(*x.shape[:2], pages, PAGE_TOKENS, x.shape[-1]) for x in tokens)
        return encode_pages(keys, values, self.page_format)

    def _add_sinks(self, sinks: list[ExactTokens]) -> None:
        if not max(self.sink_counts):
            return
        width = max(self.sink_counts)
        sides = []
        for side in range(2):
            new = []
            for row, part in enumerate(sinks):
                which = slice(None) if len(sinks) == 1 else slice(row, row + 1)
                held = [] if self.sinks is None else [self.sinks[side][which]]
                if held and part[side].shape[2]:
                    held = [held[0][:, :, : self.sink_counts[row] - part[side].shape[2]]]
                new.append(widened(mx.concatenate([*held, part[side]], axis=2), width, left=False))
            sides.append(mx.contiguous(new[0] if len(new) == 1 else mx.concatenate(new)))
        self.sinks = ExactTokens(*sides)

    def _place(self, fresh: list[tuple[slice, int, Array]]) -> None:
        """Put new page records behind the pages that their sequences had."""
        self._keep_pages(max(self.counts))
        size = self.slab_pages
        for which, at, raw in fresh:
            done = 0
            while done < raw.shape[2]:
                number, column = divmod(at + done, size)
                count = min(raw.shape[2] - done, size - column)
                part = raw[:, :, done : done + count]
                if number == len(self.slabs):
                    self.slabs.append(mx.zeros((self.batch, raw.shape[1], 0, raw.shape[3]), mx.uint8))
                slab = self.slabs[number]
                if which == slice(None):
                    self.slabs[number] = mx.concatenate([slab[:, :, :column], part], axis=2)
                else:
                    slab = widened(slab, max(column + count, slab.shape[2]), left=False)
                    at_row = mx.array([which.start, column])
                    self.slabs[number] = mx.slice_update(slab, part, at_row, axes=(0, 2))
                done += count

    def _keep_pages(self, pages: int) -> None:
        """Leave out columns of slabs that no sequence has any more."""
        size = self.slab_pages
        del self.slabs[-(-pages // size) :]
        if self.slabs and len(self.slabs) * size > pages and size * (len(self.slabs) - 1) < pages:
            width = pages - size * (len(self.slabs) - 1)
            if self.slabs[-1].shape[2] > width:
                self.slabs[-1] = mx.contiguous(self.slabs[-1][:, :, :width])

    def _drop_out_of_sight(self) -> None:
        if self.sliding_window is None or not self.slabs:
            return
        drops = []
        for row in range(self.batch):
            unseen = self._out_of_sight(self.seen[row]) - self.first_pages[row] * PAGE_TOKENS
            drops.append(min(max(unseen, 0) // PAGE_TOKENS, self.counts[row]))
        if not any(drops):
            return
        slab, pages = self.slabs[0], max(c - d for c, d in zip(self.counts, drops, strict=True))
        if len(set(drops)) == 1:
            slab = mx.contiguous(slab[:, :, drops[0] :][:, :, :pages])
        else:
            index = mx.array(drops)[:, None] + mx.arange(pages)
            index = mx.minimum(index, slab.shape[2] - 1)[:, None, :, None]
            slab = mx.take_along_axis(slab, index, axis=2)
        self.slabs = [slab] if pages else []
        self.first_pages = [at + drop for at, drop in zip(self.first_pages, drops, strict=True)]
        self.counts = [count - drop for count, drop in zip(self.counts, drops, strict=True)]

    def _check(self, keys: Array, values: Array) -> None:
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise InputError(
                f"keys {list(keys.shape)} and values {list(values.shape)}: expected "
                "[batch, kv_heads, tokens, head_dim], alike but for head_dim"
            )
        if self.window is not None:
            for name, new, held in zip(("keys", "values"), (keys, values), self.window, strict=True):
                same_shape = new.shape[:2] == held.shape[:2] and new.shape[3] == held.shape[3]
                if not same_shape or new.dtype != held.dtype:
                    raise InputError(
                        f"{name} {list(new.shape)} {new.dtype} do not continue a cache that holds "
                        f"[{held.shape[0]}, {held.shape[1]}, tokens, {held.shape[3]}] {held.dtype}"
                    )
        elif keys.shape[0] != self.batch:
            if any(self.seen) or self.batch != 1:
                raise InputError(f"keys {list(keys.shape)}: expected a batch of {self.batch}")
            self._become(TokenStore(self.config, self.sliding_window, keys.shape[0]))
        if self.config.check_finite:
            for name, new in (("keys", keys), ("values", values)):
                if not math.isfinite(float(mx.abs(new.astype(mx.float32)).max())):
                    raise NonFiniteError(
                        f"{name} hold NaN or inf in the tokens after {max(self.seen)}; "
                        "check_finite=False lets them pass and keeps them in their own token"
                    )

    def _become(self, other: TokenStore) -> None:
        self.__dict__.update(other.__dict__)

    def _set_all(self, name: str, number: int) -> None:
        setattr(self, name, [number] * self.batch)

    def _add(self, which: slice, name: str, number: int) -> None:
        numbers = getattr(self, name)
        for row in range(*which.indices(self.batch)):
            numbers[row] += number
