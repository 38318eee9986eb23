"""How 64 tokens become one page of a layer, and attention on pages: `CodedPages` is a backend over a page
format, `exact_pages.ExactPages` keeps keys and values in the model's dtype.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tqai.backends import load, resolve
from tqai.backends.base import Attended, ExactTokens, History
from tqai.backends.torch_ops.attention import attend as attend_exact
from tqai.cache.layer import page_format_for
from tqai.config import CacheConfig
from tqai.errors import BackendError
from tqai.server.engine.exact_pages import ExactPages
from tqai.server.engine.model import LayerShape
from tqai.server.engine.page_table import DeviceRows, PageTable, within_rows

__all__ = ["CodedPages", "DeviceRows", "ExactPages", "PageCodes", "PageTable", "page_codes_for"]

Array = Any
logger = logging.getLogger("tqai.server")
CONVERTED_PAGES = 256
"""Pages that change their byte order at a time."""


class PageCodes(Protocol):
    """Pages of one layer. The slab is uint8 `[pages, kv_heads, page_bytes]`.

    `is_lossy`: a token reads differently from its page than exactly.
    """

    page_bytes: int
    is_lossy: bool

    @property
    def name(self) -> str:
        """What computes on them."""

    @property
    def reads_lengths(self) -> bool:
        """Whether `attend_rows` waits for nothing and can be captured in a CUDA graph."""

    def encoded(self, keys: Tensor, values: Tensor) -> Tensor:
        """Pages uint8 `[pages, kv_heads, page_bytes]` of `[pages, kv_heads, 64, head_dim]`.

        Raises:
            BackendError: it failed; `store` goes on with another backend.
        """

    def store(self, keys: Tensor, values: Tensor, slab: Tensor, ids: Tensor) -> None:
        """Encode `[pages, kv_heads, 64, head_dim]` into the pages `ids` of the slab."""

    def unpacked(self, slab: Tensor, ids: Tensor, dtype: torch.dtype) -> ExactTokens:
        """Keys and values `[1, kv_heads, 64 * len(ids), head_dim]` of the pages `ids`, side by side."""

    def attend_rows(
        self,
        query: Tensor,
        slab: Tensor,
        rows: DeviceRows,
        addresses: Tensor,
        exact: ExactTokens,
        scaling: float,
        softcap: float | None,
    ) -> Attended:
        """Attention of one new token per row over its pages and its exact tokens, itself included.
        `addresses` int64 `[rows, room]` are those of KV head 0 of the pages in `rows.table`."""

    def attend(
        self,
        query: Tensor,
        slab: Tensor,
        table: PageTable,
        sinks: ExactTokens | None,
        recent: ExactTokens,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Attended:
        """As `Backend.attend`, over the pages of `table` in `slab`."""


class CodedPages:
    """Compressed pages. A backend that fails at run time is replaced, with a warning, by the torch backend;
    the codes are kept."""

    is_lossy = True

    def __init__(
        self, config: CacheConfig, shape: LayerShape, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.page_format = page_format_for(config, shape.key_dim, shape.value_dim)
        dtype_name = str(dtype).removeprefix("torch.")
        self.backend = resolve(self.page_format, device.type, dtype_name, config.backend).backend
        self.page_bytes = self.page_format.page_bytes

    @property
    def name(self) -> str:
        """Of the backend."""
        return self.backend.name

    @property
    def reads_lengths(self) -> bool:
        """See `PageCodes.reads_lengths`."""
        return self.name == "cuda"

    def encoded(self, keys: Tensor, values: Tensor) -> Tensor:
        """See `PageCodes.encoded`."""
        out = torch.empty((*keys.shape[:2], self.page_bytes), dtype=torch.uint8, device=keys.device)
        self.backend.encode(keys, values, self.page_format, out)
        return out

    def store(self, keys: Tensor, values: Tensor, slab: Tensor, ids: Tensor) -> None:
        """See `PageCodes.store`."""
        try:
            out = self.encoded(keys, values)
        except BackendError as error:
            self._fall_back(error, slab)
            out = self.encoded(keys, values)
        slab.index_copy_(0, ids, out)

    def unpacked(self, slab: Tensor, ids: Tensor, dtype: torch.dtype) -> ExactTokens:
        """See `PageCodes.unpacked`."""

        # heads first while the pages are small, so that what is decoded lies side by side
        def decode() -> ExactTokens:
            raw = slab.index_select(0, ids).transpose(0, 1).contiguous()
            return self.backend.decode(raw, self.page_format, dtype)

        try:
            found = decode()
        except BackendError as error:
            self._fall_back(error, slab)
            found = decode()
        return ExactTokens(*(part.flatten(1, 2)[None] for part in found))

    def attend_rows(
        self,
        query: Tensor,
        slab: Tensor,
        rows: DeviceRows,
        addresses: Tensor,
        exact: ExactTokens,
        scaling: float,
        softcap: float | None,
    ) -> Attended:
        """See `PageCodes.attend_rows`."""
        if self.reads_lengths:
            from tqai.backends.cuda.attention import Exact, attend_pages

            room, recent = addresses.shape[1], Exact(*exact, rows.exact_counts)
            query = query if query.stride(-1) == 1 else query.contiguous()
            out, lse = attend_pages(
                query,
                self.page_format,
                addresses,
                room,
                scaling,
                page_counts=rows.page_counts,
                recent=recent,
                softcap=softcap,
            )
            return Attended(out, lse)
        table, counts = rows.host_table.astype(np.int32), rows.page_counts
        history = History(self.page_format, (slab,), (0,), table, addresses, 0, counts)
        mask = within_rows(rows, exact.keys.shape[2])
        return self.backend.attend(query, history, None, exact, mask, scaling, softcap)

    def attend(
        self,
        query: Tensor,
        slab: Tensor,
        table: PageTable,
        sinks: ExactTokens | None,
        recent: ExactTokens,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Attended:
        """See `PageCodes.attend`."""
        if not table.pages:
            return attend_exact(query, None, sinks, recent, mask, scaling, softcap)
        addresses = table.on_device * (slab.shape[1] * self.page_bytes) + slab.data_ptr()
        counts = None if table.dense else table.counts
        history = History(self.page_format, (slab,), (0,), table.ids, addresses, 0, counts)
        arguments = (query, history, sinks, recent, mask, scaling, softcap)
        try:
            return self.backend.attend(*arguments)
        except BackendError as error:
            self._fall_back(error, slab)
            return self.backend.attend(*arguments)

    def _fall_back(self, error: BackendError, slab: Tensor) -> None:
        failed, torch_backend = self.backend, load("torch")
        if failed is torch_backend:
            raise error
        logger.warning("backend %s failed (%s); a layer goes on with torch, slower", failed.name, error)
        for part in slab.split(CONVERTED_PAGES):
            pages = failed.to_canonical(part, self.page_format)
            part.copy_(torch.from_numpy(torch_backend.from_canonical(pages, self.page_format)))
        self.backend = torch_backend


def page_codes_for(
    config: CacheConfig | None,
    shape: LayerShape,
    dtype: torch.dtype,
    device: torch.device,
    with_lse: bool = False,
) -> PageCodes:
    """The page codes of a layer; uncompressed where `config` is None."""
    if config is None:
        return ExactPages(shape, dtype, with_lse)
    return CodedPages(config, shape, dtype, device)
