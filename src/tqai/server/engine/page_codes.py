"""How 64 tokens become one page of a layer, and attention on pages.

`CodedPages` is a backend over a page format. `ExactPages` keeps keys and values in the model's dtype, as
the uncompressed mode that the compressed one is compared with:

    page  [kv_heads][ 64 keys | 64 values ]      in the dtype of the model
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tqai.backends import load, resolve
from tqai.backends.base import Attended, ExactTokens, History
from tqai.backends.torch_ops.attention import attend as attend_exact
from tqai.cache.layer import page_format_for
from tqai.config import CacheConfig
from tqai.core.page import PAGE_TOKENS
from tqai.errors import BackendError, UnsupportedError
from tqai.server.engine.model import LayerShape

__all__ = ["CodedPages", "DeviceRows", "ExactPages", "PageCodes", "PageTable", "page_codes_for"]

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


@dataclass(frozen=True)
class DeviceRows:
    """Sequences whose pages and lengths are known on the device only when a step runs (`attend_rows`).

    Attributes:
        table: int64 `[rows, room]`, page numbers; anything beyond a row's count.
        page_counts: int32 `[rows]`.
        exact_counts: int32 `[rows]`, exact tokens of each row, the first of its slot; at least 1.
        host_table: `table` on the host, for backends that read it there.
    """

    table: Tensor
    page_counts: Tensor
    exact_counts: Tensor
    host_table: NDArray[np.int64]


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
        mask = _within_rows(rows, exact.keys.shape[2])
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


class ExactPages:
    """Pages in the model's dtype. A step gathers the pages of a layer into one tensor, but on a GPU a decode
    step reads them where they lie (`exact_decode`)."""

    name = "exact"
    is_lossy = False

    def __init__(self, shape: LayerShape, dtype: torch.dtype, with_lse: bool = False) -> None:
        """`with_lse`: the log-sum-exp is wanted too."""
        self.shape, self.dtype, self.with_lse = shape, dtype, with_lse
        self.page_bytes = PAGE_TOKENS * (shape.key_dim + shape.value_dim) * dtype.itemsize

    @property
    def reads_lengths(self) -> bool:
        """See `PageCodes.reads_lengths`."""
        if not torch.cuda.is_available() or find_spec("triton") is None:
            return False
        from tqai.server.engine.exact_decode import serves

        return serves(self.shape.key_dim, self.shape.value_dim, self.dtype)

    def encoded(self, keys: Tensor, values: Tensor) -> Tensor:
        """See `PageCodes.encoded`."""
        return torch.cat([part.flatten(2) for part in (keys, values)], dim=-1).view(torch.uint8)

    def store(self, keys: Tensor, values: Tensor, slab: Tensor, ids: Tensor) -> None:
        """See `PageCodes.store`."""
        slab.index_copy_(0, ids, self.encoded(keys, values))

    def unpacked(self, slab: Tensor, ids: Tensor, dtype: torch.dtype) -> ExactTokens:
        """See `PageCodes.unpacked`."""
        raw = slab.index_select(0, ids).view(self.dtype).transpose(0, 1)
        cut = PAGE_TOKENS * self.shape.key_dim
        parts = (raw[..., :cut], raw[..., cut:])
        return ExactTokens(*(part.unflatten(-1, (PAGE_TOKENS, -1)).flatten(1, 2)[None] for part in parts))

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
        if self.reads_lengths and query.device.type == "cuda":
            if softcap is not None:
                raise UnsupportedError("soft-capped logits on uncompressed pages read where they lie")
            from tqai.server.engine.exact_decode import attend_exact_pages

            numbers, counts = slab.view(self.dtype), rows.page_counts
            out = attend_exact_pages(query, numbers, rows.table, counts, *exact, rows.exact_counts, scaling)
            return Attended(*out)
        table = PageTable([list(row) for row in rows.host_table], query.device)
        mask = _within_rows(rows, exact.keys.shape[2])
        return self.attend(query, slab, table, None, exact, mask, scaling, softcap)

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


def _within_rows(rows: DeviceRows, exact: int) -> Tensor:
    """bool `[rows, 1, 1, pages * 64 + exact]`: what is within the lengths."""
    device = rows.page_counts.device
    parts = []
    for most, counts in (
        (rows.table.shape[1] * PAGE_TOKENS, rows.page_counts * PAGE_TOKENS),
        (exact, rows.exact_counts),
    ):
        parts.append(torch.arange(most, device=device) < counts[:, None])
    return torch.cat(parts, dim=1)[:, None, None]


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
