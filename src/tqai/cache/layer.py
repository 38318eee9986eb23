"""`CompressedLayer`: the tokens of one attention layer, and what happens to them as they age.

    newest tokens -> window (exact, model dtype) -> page of 64 tokens (codes) -> stays, or is dropped
                                                                                by a sliding window
    first tokens  -> sinks  (exact, model dtype), where `sink_tokens` asks for them

The state after N tokens depends on N alone, not on how they were chunked: with S sinks and a window
of at least W tokens, floor((N - S - W) / 64) pages are compressed (none while that is negative). Only
offsets depend on the chunks: they are frozen from the pages that are compressed first (`cache.offsets`).
From then on everything the layer holds is without them, exact tokens too; steps add them again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tqai.backends import resolve
from tqai.backends.base import ExactTokens
from tqai.cache.balance import factors, query_energy
from tqai.cache.checks import check_tokens
from tqai.cache.first_prefill import BitPlan
from tqai.cache.offsets import Offsets, estimate
from tqai.cache.page_format import page_format_for
from tqai.cache.pages import PagePool
from tqai.cache.reading import LayerReading
from tqai.cache.step import Serving, Step
from tqai.cache.window import Window, joined
from tqai.config import CacheConfig
from tqai.core.page import PAGE_TOKENS
from tqai.errors import BackendError, ConfigError, InputError

__all__ = ["CompressedLayer", "page_format_for"]

logger = logging.getLogger("tqai")


class CompressedLayer(LayerReading):
    """Keys and values of one layer for a batch of sequences of equal length (padding included).

    Attributes:
        length: tokens seen so far, dropped ones included.
        record_past: a sliding layer keeps everything until the next `crop` (assisted decoding).
        soft_capped: the model soft-caps its logits, so that keys may have no offset: the cap is not
            blind to a shift. To be set before the first token.
        offsets: what has been taken off everything held, and by what keys were multiplied; None before the
            first page, and without both.
        expects_queries: every step's query will be shown (`see_query`), before the next step. To be set
            before the first token; without it `balance` does nothing.
    """

    def __init__(self, config: CacheConfig, layer: int = 0, sliding_window: int | None = None) -> None:
        self.config = config.for_layer(layer)
        self.layer = layer
        self.sliding_window = sliding_window
        self.record_past = False
        self.soft_capped = False
        self.expects_queries = False
        self._plan: BitPlan | None = None
        self.reset()

    def reset(self) -> None:
        """Forget every token and release the memory."""
        self.length = 0
        self.sinks: ExactTokens | None = None
        self.window: Window | None = None
        self.pool: PagePool | None = None
        self.offsets: Offsets | None = None
        self._energy: Tensor | None = None
        self.serving: Serving | None = None
        self._decoded: ExactTokens | None = None
        if self._plan is not None:
            self._plan.forget()

    def follow(self, plan: BitPlan) -> None:
        """Take the bits from `plan`; until it has decided, tokens stay exact."""
        self._plan = plan
        self.config = replace(self.config, bits_budget=None)

    @property
    def plan(self) -> BitPlan | None:
        """The plan that decides this layer's bits, or None."""
        return self._plan

    @property
    def waits(self) -> bool:
        """Whether there is a page's worth of tokens that waits for the plan or for a query."""
        if self.window is None or not (self._is_planned or self.wants_query):
            return False
        return self._fills_a_page(len(self.window))

    @property
    def wants_query(self) -> bool:
        """Whether the next query is to be shown: the first pages wait for it."""
        if self.config.balance == "off" or not self.expects_queries or self._energy is not None:
            return False
        return self.pool is not None and not self.pool.pages

    @property
    def _is_planned(self) -> bool:
        return self._plan is not None and self._plan.pending

    def see_query(self, query: Tensor) -> None:
        """`query` `[batch, query_heads, new_tokens, head_dim]` attends to the newest step."""
        if self.waits and self.wants_query:
            assert self.pool is not None
            self._energy = query_energy(query, self.pool.kv_heads)
            if not self._is_planned:
                self._release()

    def _release(self) -> None:
        """Compress what has waited."""
        assert self.window is not None
        held = self.window.tokens
        self.window = self._empty_window(*held)
        self.settle(held, in_window=False)

    @property
    def window_tokens(self) -> ExactTokens:
        """The tokens in the window."""
        assert self.window is not None
        return self.window.tokens

    def adopt_bits(self, bits_k: int, bits_v: int) -> None:
        """Compress with these bits from now on; only while there are no pages."""
        self.config = replace(self.config, bits_k=bits_k, bits_v=bits_v)
        if self.window is None or self.pool is None:
            return
        self.prepare(*self.window.tokens, self.window)
        if not self.wants_query:
            self._release()

    @property
    def sink_tokens(self) -> int:
        """Sinks that this layer keeps. A sliding layer keeps none: they would soon be out of sight."""
        return 0 if self.sliding_window is not None else self.config.sink_tokens

    @property
    def held_tokens(self) -> int:
        """Tokens held per sequence: `length` less what a sliding window has dropped."""
        if self.window is None or self.pool is None:
            return 0
        sinks = self.sinks.keys.shape[2] if self.sinks is not None else 0
        return int(sinks) + self.pool.pages * PAGE_TOKENS + len(self.window)

    def prepare(self, keys: Tensor, values: Tensor, window: Window | None = None) -> None:
        """Fix shapes, dtype, device, codecs and backend from the first keys and values; `window` may bring
        those that came before.

        Raises:
            ConfigError: the configuration does not fit them.
            UnsupportedError: no backend serves them.
        """
        wanted = self.config.device
        if wanted is not None and _device_type(wanted) != keys.device.type:
            raise ConfigError(f"device={wanted!r}: the model computes its keys on {str(keys.device)!r}")
        page_format = page_format_for(self.config, keys.shape[3], values.shape[3])
        dtype = str(keys.dtype).removeprefix("torch.")
        self.serving = Serving(resolve(page_format, keys.device.type, dtype, self.config.backend))
        self.pool = PagePool(page_format, keys.shape[0], keys.shape[1], keys.device)
        self.window = window if window is not None else self._empty_window(keys, values)

    def _empty_window(self, keys: Tensor, values: Tensor) -> Window:
        return Window(keys, values, self.config.window_tokens + PAGE_TOKENS)

    def append(self, keys: Tensor, values: Tensor) -> Step:
        """Take new tokens in, `[batch, kv_heads, new_tokens, head_dim]`; returns what they may attend to.

        Raises:
            InputError: shapes or dtypes differ from each other or from the tokens held.
            NonFiniteError: NaN or inf, where `check_finite` says to look. Nothing is changed then.
        """
        held = None if self.window is None else ExactTokens(self.window.keys, self.window.values)
        check_tokens(keys, values, held, self.config.check_finite, self.layer, self.length)
        if self._plan is not None and self._is_planned and self.waits:
            self._plan.overdue()
        if self.waits:
            self.expects_queries = False  # none was shown for the step before
            self._release()
        if self.window is None or self.pool is None:
            self.prepare(keys, values)
        assert self.window is not None and self.pool is not None
        self.pool.recycle()
        pages = self.pool.pages
        history_from = self._out_of_sight(self.length) - (self.length - self.held_tokens)
        history = None
        if pages * PAGE_TOKENS > history_from:
            history = self.pool.history(*divmod(history_from, PAGE_TOKENS))
        fits = self.window.append(keys, values, self.offsets)
        new = ExactTokens(keys, values)
        if not fits and self.offsets is not None:
            new = self.offsets.taken_off(new)
        recent = self.window.tokens if fits else joined(self.window.tokens, new)
        trimmed = max(history_from - pages * PAGE_TOKENS, 0)
        in_sight = ExactTokens(*(part[:, :, trimmed:] for part in recent)) if trimmed else recent
        assert self.serving is not None
        step = Step(self.serving, self.sinks, history, in_sight, keys.shape[2], self.offsets)
        self.length += keys.shape[2]
        self.settle(recent, fits)
        return step

    def crop(self, count: int) -> None:
        """Take the `count` newest tokens back. A page cut in two is decompressed into the window.

        Raises:
            InputError: more tokens than are held, or a sliding window has dropped what would be needed.
        """
        if self.window is None or self.pool is None:
            if count:
                raise InputError(f"cannot take {count} tokens back from an empty layer {self.layer}")
            return
        dropped = self.length - self.held_tokens
        if not 0 <= count <= self.length:
            raise InputError(f"cannot take {count} tokens back: layer {self.layer} has seen {self.length}")
        if self._out_of_sight(self.length - count) < dropped:
            raise InputError(
                f"cannot take {count} tokens back: layer {self.layer} has seen {self.length} and its "
                f"sliding window has dropped {dropped}; call activate_past_recording() before such steps"
            )
        self.length -= count
        from_window = min(count, len(self.window))
        self.window.drop_newest(from_window)
        count -= from_window
        if count:
            self._decoded = None
            kept = self.pool.pages * PAGE_TOKENS - count
            if kept >= 0:
                pages, rest = divmod(kept, PAGE_TOKENS)
                if rest:
                    raw = self.pool.page(pages)
                    keys, values = self.backend.decode(raw, self.pool.page_format, self.window.keys.dtype)
                    self.window.replace(keys[:, :, :rest], values[:, :, :rest])
                self.pool.keep(0, pages)
            else:
                self.pool.keep(0, 0)
                assert self.sinks is not None
                left = self.sinks.keys.shape[2] + kept
                self.sinks = ExactTokens(self.sinks.keys[:, :, :left], self.sinks.values[:, :, :left])
                self.sinks = self.sinks if left else None
        self._drop_out_of_sight(force=True)
        if self.offsets is not None and not self.pool.pages:
            self._move_exact(self.offsets.put_back)
            self.offsets = None

    def select(self, rows: Tensor) -> None:
        """Make sequence `rows[i]` (int64) the new sequence i: reorder, repeat or leave out."""
        if self.window is None or self.pool is None:
            return
        rows = rows.to(self.window.keys.device)
        self.window.select(rows)
        self.pool.select(rows.cpu().numpy())
        if self.sinks is not None:
            self.sinks = ExactTokens(*(part.index_select(0, rows) for part in self.sinks))
        if self.offsets is not None:
            self.offsets = self.offsets.select(rows)
        if self._energy is not None:
            self._energy = self._energy.index_select(0, rows)
        self._decoded = None

    def _out_of_sight(self, length: int) -> int:
        """How many of the first `length` tokens a next query cannot see."""
        return 0 if self.sliding_window is None else max(length - self.sliding_window + 1, 0)

    def settle(self, recent: ExactTokens, in_window: bool) -> None:
        """Move tokens from `recent` (window and new ones) to sinks and pages; keep the rest exact.

        Args:
            recent: `[batch, kv_heads, tokens, head_dim]` of the model's dtype, all tokens that are neither
                sinks nor in pages; those that may be compressed are its oldest.
            in_window: they lie in `window`, which then keeps the rest where it is.
        """
        assert self.window is not None and self.pool is not None
        count, spent = recent.keys.shape[2], 0
        if self._is_planned or (self.wants_query and self._fills_a_page(count)):
            self._wait(recent, in_window)
            return
        have = 0 if self.sinks is None else self.sinks.keys.shape[2]
        if have < self.sink_tokens and not self.pool.pages:
            spent = min(self.sink_tokens - have, count)
            fresh = ExactTokens(*(part[:, :, :spent].clone() for part in recent))
            self.sinks = fresh if self.sinks is None else joined(self.sinks, fresh)
        pages = max(count - spent - self.config.window_tokens, 0) // PAGE_TOKENS
        if not self.record_past:
            unseen = self._out_of_sight(self.length) - (self.length - (count - spent))
            dead = min(max(unseen, 0) // PAGE_TOKENS, pages)
            if dead:
                self.pool.keep(self.pool.pages, self.pool.pages)
                spent, pages = spent + dead * PAGE_TOKENS, pages - dead
        if pages:
            stop = spent + pages * PAGE_TOKENS
            if self.offsets is None and not self.pool.pages:
                recent = self._freeze_offsets(recent, spent, stop)
            self._compress(recent.keys[:, :, spent:stop], recent.values[:, :, spent:stop], pages)
            spent = stop
        if in_window:
            self.window.drop_oldest(spent)
        else:
            self.window.replace(recent.keys[:, :, spent:], recent.values[:, :, spent:])
        self._drop_out_of_sight(force=False)

    def _fills_a_page(self, count: int) -> bool:
        to_come = self.sink_tokens - (0 if self.sinks is None else self.sinks.keys.shape[2])
        return count >= PAGE_TOKENS + self.config.window_tokens + to_come

    def _wait(self, recent: ExactTokens, in_window: bool) -> None:
        """Keep `recent` exact while the bits are open, or the first query is to come."""
        assert self.window is not None
        if not in_window:
            self.window = Window(*recent, capacity=recent.keys.shape[2] + PAGE_TOKENS)
            self.window.replace(*recent)
        if self._plan is not None and self._is_planned and self.waits:
            self._plan.filled(self)

    def _freeze_offsets(self, recent: ExactTokens, start: int, stop: int) -> ExactTokens:
        """Take offsets, estimated from tokens start..stop-1 of `recent`, off everything held, and balance
        the keys; returns `recent` so. The step under way keeps the tensors that it has."""
        paged = ExactTokens(*(part[:, :, start:stop] for part in recent))
        if self.config.offsets != "off":
            self.offsets = estimate(paged, self.config.offsets, of_keys=not self.soft_capped)
        if self._energy is not None:
            plain = paged if self.offsets is None else self.offsets.taken_off(paged)
            by = factors(plain.keys, self._energy)
            if by is not None:
                self.offsets = replace(self.offsets or Offsets(None, None), factors=by)
        if self.offsets is None:
            return recent
        self._move_exact(self.offsets.taken_off)
        return self.offsets.taken_off(recent)

    def _move_exact(self, moved: Callable[[ExactTokens], ExactTokens]) -> None:
        """Put `moved(tokens)` in the place of window and sinks, in new tensors."""
        assert self.window is not None
        self.window.move(moved)
        if self.sinks is not None:
            self.sinks = moved(self.sinks)

    def _compress(self, keys: Tensor, values: Tensor, pages: int) -> None:
        assert self.pool is not None
        ids, buffer = self.pool.append(pages)

        def by_page(tokens: Tensor) -> Tensor:
            return tokens.unflatten(2, (pages, PAGE_TOKENS)).transpose(1, 2).flatten(0, 1)

        try:
            self.backend.encode(by_page(keys), by_page(values), self.pool.page_format, buffer)
        except BackendError as error:
            self._fall_back(error)
            self.backend.encode(by_page(keys), by_page(values), self.pool.page_format, buffer)
        self.pool.commit(ids, buffer)

    def _drop_out_of_sight(self, force: bool) -> None:
        if self.sliding_window is None or (self.record_past and not force):
            return
        assert self.pool is not None
        unseen = self._out_of_sight(self.length) - (self.length - self.held_tokens)
        self.pool.keep(min(unseen // PAGE_TOKENS, self.pool.pages), self.pool.pages)
        self._decoded = None


def _device_type(name: str) -> str:
    try:
        return torch.device(name).type
    except RuntimeError as error:
        raise ConfigError(
            f"device={name!r} is no device of torch: allowed are such as 'cpu' and 'cuda:0'"
        ) from error
