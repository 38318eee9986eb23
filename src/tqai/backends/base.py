"""The contract between the cache and whatever computes on its pages.

A backend encodes whole pages, attends on their codes, and decodes pages where somebody needs the
numbers. It owns the order of the bytes inside a page (see `core.page`) and nothing else: pages are
allocated by the cache. Arrays are of the backend's framework (torch, or MLX for "mlx"); this module
imports none of them.

To add a backend: one file (or folder) in `backends/` with a class that satisfies `Backend`, one line
in `backends.BACKENDS`, and it is picked up by `tests/conformance`, which runs it against core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tqai.core.page import PAGE_TOKENS, CanonicalPages, PageFormat

__all__ = ["Attended", "Backend", "ExactTokens", "History"]

Array = Any


class Attended(NamedTuple):
    """Result of attention over some tokens, fit for merging with attention over others.

    Attributes:
        out: `[batch, query_heads, new_tokens, value_head_dim]`, in the query's dtype.
        lse: float32 `[batch, query_heads, new_tokens]`, natural log of the sum of exponentials of
            the logits (scaled, soft-capped); -inf where a query sees nothing (`out` is 0 there).
    """

    out: Array
    lse: Array


class ExactTokens(NamedTuple):
    """Tokens kept in the model's dtype: `[batch, kv_heads, tokens, head_dim]`, any strides."""

    keys: Array
    values: Array


@dataclass(frozen=True)
class History:
    """The compressed tokens that one attention step reads: `pages` whole pages of every sequence.

    Neither the pages nor the addresses of a history change as long as it is used: a backend that is given
    the same object again may read them ahead of work that the stream has yet to finish.

    Attributes:
        page_format: sizes, codecs and offsets.
        slabs: uint8 arrays `[slab_pages, kv_heads, page_bytes]`; page ids number their rows through.
        slab_starts: page id of the first row of each slab, ascending.
        table: host int32 `[batch, pages]`, the page id of each 64 tokens of each sequence, in order.
        addresses: int64 array on the device `[batch, >= pages]` (may be wider, row stride as given):
            byte address of KV head 0 of each page; head h lies h * page_bytes further.
        first_token: so many tokens at the start of the first page are out of sight (a sliding
            window that begins inside a page), 0 to 63.
        counts: int32 on the device `[batch]`, how many of its `pages` each sequence has (0 to
            `pages`), or None where all have all. The table's entries beyond a sequence's count are
            0 and are never read; their tokens are out of sight whatever the mask says.
    """

    page_format: PageFormat
    slabs: Sequence[Array]
    slab_starts: Sequence[int]
    table: NDArray[np.int32]
    addresses: Array
    first_token: int = 0
    counts: Array | None = None

    @property
    def pages(self) -> int:
        """Pages per sequence."""
        return int(self.table.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens in sight per sequence."""
        return max(self.pages * PAGE_TOKENS - self.first_token, 0)


class Backend(Protocol):
    """What the cache asks of a backend. Implementations hold no state of a cache."""

    @property
    def name(self) -> str:
        """Name by which configuration and reports know it."""

    def refuses(self, page_format: PageFormat, device_type: str, dtype: str) -> str | None:
        """None if it serves these pages on this device ("cpu", "cuda", ...) and model dtype
        ("float32", "bfloat16", "float16"); else the reason in a few words, for people."""

    def encode(self, keys: Array, values: Array, page_format: PageFormat, out: Array) -> None:
        """Compress `keys` and `values` `[pages, kv_heads, 64, head_dim]` (any strides, float32,
        bfloat16 or float16) into `out`, uint8 `[pages, kv_heads, page_bytes]`, contiguous."""

    def decode(self, raw: Array, page_format: PageFormat, dtype: Any) -> ExactTokens:
        """Keys and values `[..., 64, head_dim]` of pages `raw`, uint8 `[..., page_bytes]`, in the
        original (un-rotated) space, as `dtype`; values beyond its range are clamped to it."""

    def attend(
        self,
        query: Array,
        history: History,
        sinks: ExactTokens | None,
        recent: ExactTokens,
        mask: Array | None,
        scaling: float,
        softcap: float | None = None,
    ) -> Attended:
        """Attention of `query` `[batch, query_heads, new_tokens, head_dim]` over, in this order,
        sinks, history and recent tokens; the last `new_tokens` of `recent` are the query's own.

        `query_heads` is a multiple of `kv_heads`; query head h reads KV head h // (query_heads //
        kv_heads). `mask` is None (all earlier tokens are seen, own tokens causally) or bool
        `[batch or 1, query_heads or 1, new_tokens, sinks + history + recent tokens]`, True where
        seen. What is masked never influences the result, not even as NaN. Logits are
        softcap * tanh(x / softcap) of x = scaling * <q, k> where `softcap` is given.
        Accumulates in float32 at least, and materializes no more than a bounded tile of history.
        """

    def to_canonical(self, raw: Array, page_format: PageFormat) -> CanonicalPages:
        """Pages `raw`, uint8 `[..., page_bytes]`, in canonical order as numpy arrays. Bit-exact."""

    def from_canonical(self, pages: CanonicalPages, page_format: PageFormat) -> NDArray[np.uint8]:
        """Inverse of `to_canonical`: numpy uint8 `[..., page_bytes]` in this backend's own order."""
