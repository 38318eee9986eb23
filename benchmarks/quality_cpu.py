"""What makes the study fast on a CPU, and changes no code of any cache.

Chunks of 32 queries on codes cost more than attention to tensors does. Caches of tqai decompress each page
once and keep the copy (`cache_strategy="incremental"`), so that a pass costs little more than that of an
uncompressed cache; what a token reads is what its codes say, to rounding. Queries, which such a cache does
not see and `balance` wants, are shown to it here.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CPU_SETTINGS", "show_queries"]

CPU_SETTINGS = {"cache_strategy": "incremental"}


def show_queries() -> None:
    """Let layers that decompress see the queries too, as those do that attend on the codes."""
    from tqai.integrations.transformers import attention, layers

    newest: dict[int, Any] = {}
    update, attend = layers._Compressed.update, attention.tqai_attention

    def noting_update(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.store.expects_queries = True
        out = update(self, *args, **kwargs)
        newest[self.store.layer] = self.store
        return out

    def showing_attention(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        store = newest.pop(getattr(module, "layer_idx", -1), None)
        if store is not None and store.wants_query:
            store.see_query(query)
        return attend(module, query, *args, **kwargs)

    layers._Compressed.update = noting_update  # type: ignore[method-assign]
    attention.tqai_attention = showing_attention
