"""Caches of mlx-lm for a batch of sequences of different lengths, with and without a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from tqai.config import CacheConfig
from tqai.integrations.mlx_lm.caches import TurboQuantKVCache, TurboQuantRotatingKVCache
from tqai.integrations.mlx_lm.combining import combined
from tqai.integrations.mlx_lm.compressed import Compressed

__all__ = ["TurboQuantBatchKVCache", "TurboQuantBatchRotatingKVCache"]

Array = Any


class TurboQuantBatchKVCache(Compressed):
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
        self.store = combined([self.store, other.store])
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
        self.store = combined([cache.store for cache in caches])


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
