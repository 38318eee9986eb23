"""`PromptCache`: what `patch` returns for a model of mlx-lm, a prompt cache with a memory report."""

from __future__ import annotations

from os import PathLike
from typing import Any

from tqai.cache.memory import MemoryReport

__all__ = ["PromptCache"]


class PromptCache(list[Any]):
    """One cache per layer, to be passed as `prompt_cache` to the functions of mlx-lm."""

    def memory(self) -> MemoryReport:
        """Bytes held and bits per value, all layers added up; layers that are not compressed count as
        `other_bytes`."""
        return MemoryReport.sum(report for cache in self for report in _reports(cache))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held, of every layer."""
        return sum(cache.nbytes for cache in self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the cache to a file that every backend of tqai reads; see `saving.save_cache`."""
        from tqai.integrations.mlx_lm.saving import save_cache

        save_cache(path, self)


def _reports(cache: Any) -> list[MemoryReport]:
    if hasattr(cache, "memory"):
        return [cache.memory()]
    if hasattr(cache, "caches"):
        return [report for part in cache.caches for report in _reports(part)]
    try:
        return [MemoryReport(other_bytes=cache.nbytes)]
    except (NotImplementedError, AttributeError):
        return []
