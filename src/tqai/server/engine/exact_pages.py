"""`ExactPages`: keys and values in the model's dtype, as the uncompressed mode that the compressed one is
compared with:

    page  [kv_heads][ 64 keys | 64 values ]      in the dtype of the model
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens
from tqai.backends.torch_ops.attention import attend as attend_exact
from tqai.core.page import PAGE_TOKENS
from tqai.errors import UnsupportedError
from tqai.server.engine.model import LayerShape
from tqai.server.engine.page_table import DeviceRows, PageTable, within_rows

__all__ = ["ExactPages"]


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
        mask = within_rows(rows, exact.keys.shape[2])
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
