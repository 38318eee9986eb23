"""Caches of mlx-lm whose keys and values are compressed: one sequence, a batch, and sliding windows.

They have no attribute `bits` and no `to_quantized`: mlx-lm would send them to its affine quantized
attention, or convert them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from tqai.backends.base import ExactTokens
from tqai.cache.memory import MemoryReport
from tqai.cache.page_format import page_format_for
from tqai.config import CacheConfig
from tqai.core.codec import SCALE_BYTES
from tqai.core.page import PAGE_TOKENS
from tqai.errors import UnsupportedError
from tqai.integrations.mlx_lm.attention import is_replaced, standard_mask
from tqai.integrations.mlx_lm.handles import handles_of
from tqai.integrations.mlx_lm.settings import served
from tqai.integrations.mlx_lm.store import Step, TokenStore

__all__ = [
    "TurboQuantBatchKVCache",
    "TurboQuantBatchRotatingKVCache",
    "TurboQuantKVCache",
    "TurboQuantRotatingKVCache",
]

Array = Any

COUNTS = ("seen", "counts", "first_pages", "sink_counts", "window_counts")


class _Compressed(mlx_lm_cache._BaseCache):
    """What all four share. `modules` are those of the model that takes handles; () for arrays."""

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


class TurboQuantKVCache(_Compressed):
    """A compressed cache for one sequence (or several of equal length); in place of `KVCache`.

    Args:
        config: how to compress; None for the default.
        modules: names of the model's modules whose attention takes handles (`patch` knows them); with
            none, `update_and_fetch` returns decompressed arrays, which every model takes.
    """

    def __init__(self, config: CacheConfig | None = None, modules: Sequence[str] = ()) -> None:
        self._adopt(config, modules, None, 1)

    @property
    def offset(self) -> int:
        """Tokens seen: the position of the next one."""
        return self.store.seen[0]

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Any:
        """A batch of these caches."""
        return TurboQuantBatchKVCache.merge(caches)


class TurboQuantRotatingKVCache(TurboQuantKVCache):
    """A compressed cache with a sliding window of `max_size` tokens; in place of `RotatingKVCache`.

    Pages that are out of sight are dropped, so up to 63 tokens more than the window are held.
    """

    def __init__(
        self, max_size: int, keep: int = 0, config: CacheConfig | None = None, modules: Sequence[str] = ()
    ) -> None:
        if keep:
            raise UnsupportedError(
                f"keep={keep}: a compressed sliding window keeps no first tokens, allowed is 0"
            )
        self._adopt(config, modules, max_size, 1)

    @property
    def max_size(self) -> int:
        """Tokens of the sliding window."""
        assert self.store.sliding_window is not None
        return self.store.sliding_window

    @property
    def keep(self) -> int:
        return 0

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Any:
        """A batch of these caches."""
        return TurboQuantBatchRotatingKVCache.merge(caches)


class TurboQuantBatchKVCache(_Compressed):
    """Compressed caches of sequences of different lengths; in place of `BatchKVCache`.

    mlx-lm pads on the left; here every sequence has pages of its own tokens alone, so padding is
    neither stored nor attended to. `left_padding[i]` first tokens of sequence i are left out.
    """

    def __init__(
        self,
        left_padding: Sequence[int],
        config: CacheConfig | None = None,
        modules: Sequence[str] = (),
    ) -> None:
        self._adopt(config, modules, None, len(left_padding))
        self._restore()
        self._left = list(left_padding)

    def _restore(self) -> None:
        self._left = [0] * self.store.batch
        self._ends: list[int] | None = None
        self._offset: tuple[tuple[int, ...], Array] | None = None

    @property
    def offset(self) -> Array:
        """int32 `[batch]`: the position of the next token of each sequence."""
        now = tuple(seen - left for seen, left in zip(self.store.seen, self._left, strict=True))
        if self._offset is None or self._offset[0] != now:
            self._offset = (now, mx.array(now, dtype=mx.int32))
        return self._offset[1]

    @property
    def left_padding(self) -> Array:
        """int32 `[batch]`: tokens that are still to be left out."""
        return mx.array(self._left, dtype=mx.int32)

    def update_and_fetch(self, keys: Array, values: Array) -> tuple[Any, Any]:
        """As of one sequence; padding is left out of the cache."""
        new = keys.shape[2]
        first, stop = self._padding(new)
        step = self.store.append(keys, values, first, stop)
        self._left = [max(left - new, 0) for left in self._left]
        if self._ends is not None:
            self._ends = [max(end - new, 0) for end in self._ends]
        return self._given(step)

    def _padding(self, new: int) -> tuple[list[int], list[int]]:
        first = [min(left, new) for left in self._left]
        ends = self._ends if self._ends is not None else [new] * self.store.batch
        return first, [max(min(end, new), at) for end, at in zip(ends, first, strict=True)]

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce padding of the tokens that follow, until `finalize`.

        Raises:
            ValueError: left padding for a cache that holds tokens.
        """
        if left_padding is not None:
            if not self.empty():
                raise ValueError("left padding can only be added to an empty cache")
            self._left = [a + b for a, b in zip(self._left, left_padding, strict=True)]
        if right_padding is not None and max(right_padding) > 0:
            assert lengths is not None
            self._ends = [a + b for a, b in zip(self._left, lengths, strict=True)]

    def finalize(self) -> None:
        """The padded tokens have all come."""
        self._ends = None

    def filter(self, batch_indices: Any) -> None:
        """Keep these sequences (indices; a list or an array)."""
        rows = _indices(batch_indices)
        self.store = self.store.selected(rows)
        self._left = [self._left[row] for row in rows]
        self._ends = None if self._ends is None else [self._ends[row] for row in rows]

    def extend(self, other: TurboQuantBatchKVCache) -> None:
        """Add the sequences of another batch behind these."""
        self.store = TokenStore.combined([self.store, other.store])
        self._left = self._left + other._left

    def extract(self, idx: int) -> TurboQuantKVCache:
        """The cache of one sequence."""
        cache = TurboQuantKVCache(self.store.config, self.modules)
        cache.store = self.store.extracted(int(idx))
        return cache

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> TurboQuantBatchKVCache:
        """A batch of single caches.

        Raises:
            ValueError: they were made with different settings.
        """
        cache = cls([0] * len(caches), caches[0].store.config, caches[0].modules)
        cache._merge(caches)
        return cache

    def _merge(self, caches: Sequence[Any]) -> None:
        first = caches[0].store
        for cache in caches:
            if cache.store.config != first.config or cache.store.sliding_window != first.sliding_window:
                raise ValueError("caches of different settings cannot be merged into one batch")
        self.store = TokenStore.combined([cache.store for cache in caches])


class TurboQuantBatchRotatingKVCache(TurboQuantBatchKVCache):
    """Compressed sliding windows of sequences of different lengths; in place of `BatchRotatingKVCache`."""

    def __init__(
        self,
        max_size: int,
        left_padding: Sequence[int],
        config: CacheConfig | None = None,
        modules: Sequence[str] = (),
    ) -> None:
        self._adopt(config, modules, max_size, len(left_padding))
        self._restore()
        self._left = list(left_padding)

    @property
    def max_size(self) -> int:
        """Tokens of the sliding window."""
        assert self.store.sliding_window is not None
        return self.store.sliding_window

    def extract(self, idx: int) -> TurboQuantRotatingKVCache:
        """The cache of one sequence."""
        cache = TurboQuantRotatingKVCache(self.max_size, 0, self.store.config, self.modules)
        cache.store = self.store.extracted(int(idx))
        return cache

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> TurboQuantBatchRotatingKVCache:
        """A batch of single caches.

        Raises:
            ValueError: they were made with different settings or windows.
        """
        cache = cls(caches[0].max_size, [0] * len(caches), caches[0].store.config, caches[0].modules)
        cache._merge(caches)
        return cache


def _indices(batch_indices: Any) -> list[int]:
    given = batch_indices.tolist() if hasattr(batch_indices, "tolist") else batch_indices
    return [int(row) for row in given]


# load_prompt_cache looks classes up among the globals of its own module
for _class in (
    TurboQuantKVCache,
    TurboQuantRotatingKVCache,
    TurboQuantBatchKVCache,
    TurboQuantBatchRotatingKVCache,
):
    setattr(mlx_lm_cache, _class.__name__, _class)
