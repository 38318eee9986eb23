"""What the caches of one sequence and of a batch share: the contract of mlx-lm over a `TokenStore`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mlx_lm.models import cache as mlx_lm_cache

from tqai.backends.base import ExactTokens
from tqai.cache.memory import MemoryReport
from tqai.cache.page_format import page_format_for
from tqai.config import CacheConfig
from tqai.core.codec import SCALE_BYTES
from tqai.core.page import PAGE_TOKENS
from tqai.integrations.mlx_lm.attention import is_replaced, standard_mask
from tqai.integrations.mlx_lm.handles import handles_of
from tqai.integrations.mlx_lm.settings import served
from tqai.integrations.mlx_lm.step import Step
from tqai.integrations.mlx_lm.store import TokenStore

__all__ = ["Compressed"]

Array = Any

COUNTS = ("seen", "counts", "first_pages", "sink_counts", "window_counts")


class Compressed(mlx_lm_cache._BaseCache):
    """What all four classes share. `modules` are those of the model that takes handles; () for arrays."""

    store: TokenStore
    modules: tuple[str, ...]

    def _adopt(
        self, config: CacheConfig | None, modules: Sequence[str], window: int | None, batch: int
    ) -> None:
        self.store = TokenStore(served(config), window, batch)
        self.modules = tuple(modules)

    def update_and_fetch(self, keys: Array, values: Array) -> tuple[Any, Any]:
        """Take `[batch, kv_heads, new, head_dim]` in. Returns handles where the model's modules take
        them, else the decompressed arrays `[batch, kv_heads, tokens, head_dim]`."""
        return self._given(self.store.append(keys, values))

    def keys_and_values(self) -> tuple[Any, Any]:
        """Everything held, as `update_and_fetch` returns it."""
        view = self.store.view()
        if view is None:
            return None, None
        return self._given(view)

    @property
    def keys(self) -> Array | None:
        """All keys in sight, decompressed for the caller (transient); None before the first token."""
        view = self.store.view()
        return None if view is None else view.materialize().keys

    @property
    def values(self) -> Array | None:
        """All values in sight, decompressed for the caller (transient); None before the first token."""
        view = self.store.view()
        return None if view is None else view.materialize().values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of a step with `N` new tokens: None, "causal", or bool over the tokens in sight."""
        columns = self.store.columns(N, self._padding(N)[0])
        window = window_size if window_size is not None else self.store.sliding_window
        if columns.is_causal(window):
            if N == 1:
                return None
            if not return_array:
                return "causal"
        mask = columns.mask(window)
        if columns.uniform:
            return mask[0, 0]
        return standard_mask(mask) if N == 1 and window == self.store.sliding_window else mask

    def _padding(self, new: int) -> tuple[list[int], list[int]]:
        return [0] * self.store.batch, [new] * self.store.batch

    def _given(self, step: Step) -> tuple[Any, Any]:
        on_codes = self.store.config.cache_strategy in ("auto", "residual") and is_replaced(self.modules)
        return handles_of(step) if on_codes else tuple(step.materialize())

    @property
    def meta_state(self) -> str:
        """Settings, counts and window of the cache, as JSON."""
        store = self.store
        about: dict[str, Any] = {name: getattr(store, name) for name in COUNTS}
        about["settings"] = store.config.to_dict()
        about["sliding_window"] = store.sliding_window
        about["modules"] = list(self.modules)
        if store.page_format is not None:
            about["head_dims"] = [store.page_format.key.spec.head_dim, store.page_format.value.spec.head_dim]
        return json.dumps(about, sort_keys=True)

    @meta_state.setter
    def meta_state(self, about: str) -> None:
        """For `from_state`; the state holds it already."""

    @property
    def state(self) -> tuple[Any, ...]:
        """`meta_state`, then window keys and values, sink keys and values (None where there are none),
        then the slabs."""
        store = self.store
        window = store.window or (None, None)
        return (self.meta_state, *window, *(store.sinks or (None, None)), *store.slabs)

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        about = json.loads(state[0])
        config = served(CacheConfig.from_dict(about["settings"]))
        self.modules = tuple(about["modules"])
        self.store = TokenStore(config, about["sliding_window"], len(about["seen"]))
        for name in COUNTS:
            setattr(self.store, name, about[name])
        if state[1] is not None:
            self.store.page_format = page_format_for(config, *about["head_dims"])
            self.store.window = ExactTokens(state[1], state[2])
            self.store.sinks = None if state[3] is None else ExactTokens(state[3], state[4])
            self.store.slabs = list(state[5:])
        self._restore()

    def _restore(self) -> None:
        """Set what is not in the state."""

    @classmethod
    def from_state(cls, state: Sequence[Any], meta_state: Any = None) -> Any:
        """The cache of a state. (`meta_state` was a second argument in older releases of mlx-lm.)"""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def is_trimmable(self) -> bool:
        """Whether the newest tokens can be taken back: always, but for a sliding window that is full."""
        window = self.store.sliding_window
        return window is None or max(self.store.seen) < window

    def trim(self, n: int) -> int:
        """Take the `n` newest tokens back (as many as there are); returns how many that were."""
        n = min(max(self.store.seen), n)
        self.store.trim(n)
        return n

    def size(self) -> int:
        """Tokens in sight."""
        seen, window = max(self.store.seen), self.store.sliding_window
        return seen if window is None else min(seen, window)

    def empty(self) -> bool:
        return self.store.window is None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""
        return self.store.nbytes

    def memory(self) -> MemoryReport:
        """Bytes held and bits per value; see `MemoryReport`. Tokens of a batch are those of its longest."""
        store = self.store
        if store.window is None or store.page_format is None:
            return MemoryReport()
        page_format, heads = store.page_format, store.window.keys.shape[1]
        pages = sum(store.counts) * heads
        row_bytes = page_format.key.row_bytes + page_format.value.row_bytes
        codes_bytes = pages * PAGE_TOKENS * row_bytes
        scales_bytes = pages * PAGE_TOKENS * 2 * SCALE_BYTES
        held = [
            sinks + count * PAGE_TOKENS + window
            for sinks, count, window in zip(store.sink_counts, store.counts, store.window_counts, strict=True)
        ]
        dims = page_format.key.spec.head_dim + page_format.value.spec.head_dim
        return MemoryReport(
            tokens=max(held),
            values=sum(held) * heads * dims,
            codes_bytes=codes_bytes,
            scales_bytes=scales_bytes,
            window_bytes=sum(x.nbytes for x in [*store.window, *(store.sinks or ())]),
            slack_bytes=sum(slab.nbytes for slab in store.slabs) - codes_bytes - scales_bytes,
            backend="mlx",
            backend_reason="a model of mlx-lm",
        )
