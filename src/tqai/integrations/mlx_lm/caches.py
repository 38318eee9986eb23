"""Caches of mlx-lm for one sequence whose keys and values are compressed, with and without a window.

They have no attribute `bits` and no `to_quantized`: mlx-lm would send them to its affine quantized
attention, or convert them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqai.config import CacheConfig
from tqai.errors import UnsupportedError
from tqai.integrations.mlx_lm.compressed import Compressed

__all__ = ["TurboQuantKVCache", "TurboQuantRotatingKVCache"]


class TurboQuantKVCache(Compressed):
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
        from tqai.integrations.mlx_lm.batch_caches import TurboQuantBatchKVCache

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
        from tqai.integrations.mlx_lm.batch_caches import TurboQuantBatchRotatingKVCache

        return TurboQuantBatchRotatingKVCache.merge(caches)
