"""How 64 tokens become one page of a layer, and attention on pages.

`CodedPages` is a backend over a page format. `ExactPages` keeps keys and values in the model's dtype, as
the uncompressed mode that the compressed one is compared with:

    page  [kv_heads][ 64 keys | 64 values ]      in the dtype of the model
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tqai.backends import load, resolve
from tqai.backends.base import Attended, ExactTokens, History
from tqai.backends.torch_ops.attention import attend as attend_exact
from tqai.cache.layer import page_format_for
from tqai.config import CacheConfig
from tqai.core.page import PAGE_TOKENS
from tqai.errors import BackendError
from tqai.server.engine.model import LayerShape

__all__ = ["CodedPages", "ExactPages", "PageCodes", "PageTable", "page_codes_for"]

Array = Any
logger = logging.getLogger("tqai.server")
CONVERTED_PAGES = 256
"""Pages that change their byte order at a time."""


class PageTable:
    """The pages that the sequences of one step see, alike for every layer.

    Attributes:
        ids: host int32 `[batch, pages]`, 0 beyond a sequence's count.
        on_device: the same as int64 on the device.
        counts: int32 on the device `[batch]`.
        dense: every sequence has all pages.
    """

    def __init__(self, rows: list[list[int]], device: torch.device, at_least: int = 0) -> None:
        pages = max((len(row) for row in rows), default=0)
        pages = max(pages, at_least)
        self.ids = np.zeros((len(rows), pages), dtype=np.int32)
        for index, row in enumerate(rows):
            self.ids[index, : len(row)] = row
        lengths = [len(row) for row in rows]
        self.on_device = torch.from_numpy(self.ids.astype(np.int64)).to(device)
        self.counts = torch.tensor(lengths, dtype=torch.int32).to(device)
        self.dense = all(length == pages for length in lengths)

    @property
    def pages(self) -> int:
        """Pages of the longest sequence."""
        return int(self.ids.shape[1])


class PageCodes(Protocol):
    """Pages of one layer. The slab is uint8 `[pages, kv_heads, page_bytes]`."""

    page_bytes: int

    @property
    def name(self) -> str:
        """What computes on them."""

    def store(self, keys: Tensor, values: Tensor, slab: Tensor, ids: Tensor) -> None:
        """Encode `[pages, kv_heads, 64, head_dim]` into the pages `ids` of the slab."""

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

    def store(self, keys: Tensor, values: Tensor, slab: Tensor, ids: Tensor) -> None:
        """See `PageCodes.store`."""
        out = torch.empty((*keys.shape[:2], self.page_bytes), dtype=torch.uint8, device=keys.device)
        try:
            self.backend.encode(keys, values, self.page_format, out)
        except BackendError as error:
            self._fall_back(error, slab)
            self.backend.encode(keys, values, self.page_format, out)
        slab.index_copy_(0, ids, out)

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


class ExactPages:
    """Pages in the model's dtype. A step gathers the pages of a layer into one tensor."""

    name = "exact"

    def __init__(self, shape: LayerShape, dtype: torch.dtype, with_lse: bool = False) -> None:
        """`with_lse`: the log-sum-exp is wanted too."""
        self.shape, self.dtype, self.with_lse = shape, dtype, with_lse
        self.page_bytes = PAGE_TOKENS * (shape.key_dim + shape.value_dim) * dtype.itemsize

    def store(self, keys: Tensor, values: Tensor, slab: Tensor, ids: Tensor) -> None:
        """See `PageCodes.store`."""
        parts = [part.flatten(2).contiguous() for part in (keys, values)]
        slab.index_copy_(0, ids, torch.cat(parts, dim=-1).view(torch.uint8))

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
        """See `PageCodes.attend`; the log-sum-exp is 0 unless `with_lse`."""
        first = 0 if sinks is None else sinks.keys.shape[2]
        own, new_tokens = recent.keys.shape[2], query.shape[2]
        raw = slab.view(self.dtype)[table.on_device.reshape(-1)]
        raw = raw.unflatten(0, table.ids.shape).transpose(1, 2)
        cut = PAGE_TOKENS * self.shape.key_dim
        keys = raw[..., :cut].unflatten(-1, (PAGE_TOKENS, -1)).flatten(2, 3)
        values = raw[..., cut:].unflatten(-1, (PAGE_TOKENS, -1)).flatten(2, 3)
        lead = [] if sinks is None else [sinks]
        keys = torch.cat([*(part.keys for part in lead), keys, recent.keys], dim=2)
        values = torch.cat([*(part.values for part in lead), values, recent.values], dim=2)
        column = torch.arange(table.pages * PAGE_TOKENS, device=query.device)
        present = column < table.counts[:, None] * PAGE_TOKENS
        present = F.pad(present, (first, own), value=True)[:, None, None]
        if mask is None:
            mask = torch.ones((new_tokens, keys.shape[2]), dtype=torch.bool, device=query.device)
            mask = mask.tril(keys.shape[2] - new_tokens)
        mask = mask & present
        if softcap is not None or self.with_lse:
            return attend_exact(query, None, None, ExactTokens(keys, values), mask, scaling, softcap)
        # weight 0 times NaN is NaN, and rows that are not in use may hold anything
        values = torch.where(mask.any(dim=2)[..., None], values, 0.0)
        keys = torch.where(mask.any(dim=2)[..., None], keys, 0.0)
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != keys.shape[1]
        )
        return Attended(out, query.new_zeros(query.shape[:3], dtype=torch.float32))


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
