"""Stores of several sequences put together into one."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from tqai.backends.base import ExactTokens
from tqai.integrations.mlx_lm.exact import widened
from tqai.integrations.mlx_lm.store import TokenStore

__all__ = ["combined"]


def combined(parts: Sequence[TokenStore]) -> TokenStore:
    """The sequences of all stores, in order, in one store."""
    out = TokenStore(parts[0].config, parts[0].sliding_window, 0)
    for name in ("seen", "counts", "first_pages", "sink_counts", "window_counts"):
        setattr(out, name, [number for part in parts for number in getattr(part, name)])
    filled = next((part for part in parts if part.window is not None), None)
    if filled is None:
        return out
    out.page_format = filled.page_format
    assert filled.window is not None and filled.page_format is not None
    like: ExactTokens = filled.window

    def stacked(kind: str, width: int, left: bool) -> ExactTokens:
        sides = []
        for side in range(2):
            blocks = []
            for part in parts:
                held = getattr(part, kind)
                _, heads, _, dim = like[side].shape
                block = mx.zeros((part.batch, heads, 0, dim), like[side].dtype)
                blocks.append(widened(block if held is None else held[side], width, left))
            sides.append(mx.concatenate(blocks))
        return ExactTokens(*sides)

    out.window = stacked("window", max(out.window_counts), left=True)
    if max(out.sink_counts):
        out.sinks = stacked("sinks", max(out.sink_counts), left=False)
    heads, page_bytes = like.keys.shape[1], filled.page_format.page_bytes
    pages = max(out.counts)
    for number, start in enumerate(range(0, pages, out.slab_pages)):
        width = min(pages - start, out.slab_pages)
        blocks = []
        for part in parts:
            empty = mx.zeros((part.batch, heads, 0, page_bytes), mx.uint8)
            blocks.append(widened(part.slabs[number] if number < len(part.slabs) else empty, width, False))
        out.slabs.append(mx.concatenate(blocks))
    return out
