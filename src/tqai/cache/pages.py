"""The page pool of one layer: which bytes hold which 64 tokens of which sequence.

Pages live in slabs, uint8 `[slab_pages, kv_heads, page_bytes]`, that are never moved or resized:
growth adds a slab, so appending copies nothing. A page id numbers the rows of all slabs through. The
table `[batch, pages]` lists each sequence's pages in order; sequences may share pages (beams after a
reorder do), because a page never changes once it is written. Pages that no row refers to are reused.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqai.backends.base import Backend, History
from tqai.backends.torch_ops.attention import gather_pages
from tqai.core.page import PageFormat

__all__ = ["PagePool"]

SLACK_SHARE = 128
"""A new slab holds at least 1/128 of the pages held so far: growth takes logarithmically many slabs,
and at most about 0.8 % of the pool is allocated ahead, nothing up to 128 pages."""


class PagePool:
    """Pages of one layer for a batch of sequences of equal length.

    Attributes:
        table: int32 `[batch, pages]` on the host.
    """

    def __init__(self, page_format: PageFormat, batch: int, kv_heads: int, device: torch.device) -> None:
        self.page_format = page_format
        self.kv_heads = kv_heads
        self.device = device
        self.table: NDArray[np.int32] = np.empty((batch, 0), dtype=np.int32)
        self._slabs: list[Tensor] = []
        self._slab_starts: list[int] = []
        self._capacity = 0
        self._free: list[int] = []
        self._stale = False
        self._history: History | None = None

    @property
    def pages(self) -> int:
        """Pages per sequence."""
        return int(self.table.shape[1])

    @property
    def capacity(self) -> int:
        """Pages that the slabs hold, used or not."""
        return self._capacity

    @property
    def used(self) -> int:
        """Distinct pages in use."""
        return int(np.unique(self.table).size)

    @property
    def table_bytes(self) -> int:
        """Bytes of the page table and, once a step has read it, of the address table."""
        return self.table.nbytes + (0 if self._history is None else self._history.addresses.nbytes)

    @property
    def slabs(self) -> tuple[Tensor, ...]:
        """The slabs, oldest first."""
        return tuple(self._slabs)

    def recycle(self) -> None:
        """Make the pages that no sequence refers to any more fit for reuse. Called when a step begins:
        until then the step before may still read pages that it has dropped."""
        if self._stale:
            used = np.zeros(self._capacity, dtype=bool)
            used[self.table.reshape(-1)] = True
            self._free = np.flatnonzero(~used).tolist()
            self._stale = False

    def append(self, raw_pages: int) -> tuple[NDArray[np.int32], Tensor]:
        """Reserve `raw_pages` new pages for every sequence.

        Returns the ids int32 `[batch, raw_pages]` and a buffer uint8 `[batch * raw_pages, kv_heads,
        page_bytes]` to encode into, row by row in the order of the ids. `commit` makes them visible.
        """
        count = self.table.shape[0] * raw_pages
        if len(self._free) < count:
            self._grow(count - len(self._free))
        ids = np.array(self._free[:count], dtype=np.int32)
        slab, at = self._slab_of(int(ids[0]))
        if int(ids[-1]) - int(ids[0]) == count - 1 and int(ids[-1]) - at < slab.shape[0]:
            buffer = slab[int(ids[0]) - at : int(ids[0]) - at + count]
        else:
            buffer = slab.new_empty((count, self.kv_heads, self.page_format.page_bytes))
        return ids.reshape(-1, raw_pages), buffer

    def commit(self, ids: NDArray[np.int32], buffer: Tensor) -> None:
        """Append the pages that `append` reserved, after `buffer` has been filled."""
        flat = ids.reshape(-1)
        slab, at = self._slab_of(int(flat[0]))
        in_place = buffer.untyped_storage().data_ptr() == slab.untyped_storage().data_ptr()
        if not in_place:
            for row, page in enumerate(flat):
                slab, at = self._slab_of(int(page))
                slab[int(page) - at].copy_(buffer[row])
        del self._free[: flat.size]
        self.table = np.concatenate([self.table, ids], axis=1)
        self._history = None

    def page(self, column: int) -> Tensor:
        """Raw page number `column` of every sequence, uint8 `[batch, kv_heads, page_bytes]`, a copy."""
        return gather_pages(self.history(), column, column + 1)[:, 0].clone()

    def raw(self) -> Tensor:
        """All pages in order, uint8 `[batch, pages, kv_heads, page_bytes]`, a copy (for saving)."""
        return gather_pages(self.history(), 0, self.pages).clone()

    def keep(self, start: int, stop: int) -> None:
        """Keep the pages start..stop-1 of every sequence; the others are free from the next `recycle` on."""
        if start > 0 or stop < self.pages:
            self._set_table(self.table[:, start:stop])

    def select(self, rows: NDArray[np.integer]) -> None:
        """Make sequence `rows[i]` the new sequence i. Pages are shared, not copied."""
        self._set_table(self.table[rows])

    def history(self, first_page: int = 0, first_token: int = 0) -> History:
        """What an attention step reads: the pages from `first_page` on, less `first_token` tokens.
        It stays true while later steps append."""
        if self._history is None:
            self._history = History(
                self.page_format, tuple(self._slabs), tuple(self._slab_starts), self.table, self._addresses()
            )
        if first_page == 0 and first_token == 0:
            return self._history
        return replace(
            self._history,
            table=self.table[:, first_page:],
            addresses=self._history.addresses[:, first_page:],
            first_token=first_token,
        )

    def convert(self, old: Backend, new: Backend) -> None:
        """Rewrite every page from the byte order of one backend into that of another, in place."""
        for slab in self._slabs:
            pages = old.to_canonical(slab, self.page_format)
            slab.copy_(torch.from_numpy(new.from_canonical(pages, self.page_format)))

    def __getstate__(self) -> dict[str, object]:
        # addresses are true only for the slabs they were taken from, not for a copy of them
        return {**self.__dict__, "_history": None}

    def _addresses(self) -> Tensor:
        addresses = np.empty(self.table.shape, dtype=np.int64)
        row_bytes = self.kv_heads * self.page_format.page_bytes
        for slab, at in zip(self._slabs, self._slab_starts, strict=True):
            inside = (self.table >= at) & (self.table < at + slab.shape[0])
            addresses[inside] = slab.data_ptr() + (self.table[inside].astype(np.int64) - at) * row_bytes
        return torch.from_numpy(addresses).to(self.device)

    def _set_table(self, table: NDArray[np.int32]) -> None:
        self.table = np.ascontiguousarray(table)
        self._stale = True
        self._history = None

    def _grow(self, pages: int) -> None:
        pages = max(pages, -(-self._capacity // SLACK_SHARE))
        shape = (pages, self.kv_heads, self.page_format.page_bytes)
        self._slabs.append(torch.empty(shape, dtype=torch.uint8, device=self.device))
        self._slab_starts.append(self._capacity)
        self._free.extend(range(self._capacity, self._capacity + pages))
        self._capacity += pages

    def _slab_of(self, page: int) -> tuple[Tensor, int]:
        index = int(np.searchsorted(self._slab_starts, page, side="right")) - 1
        return self._slabs[index], self._slab_starts[index]
