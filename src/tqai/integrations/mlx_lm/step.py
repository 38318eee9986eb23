"""`Step`: what one attention step of one layer reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tqai.backends.base import ExactTokens
from tqai.backends.mlx.pages import decode_pages
from tqai.core.page import PageFormat
from tqai.integrations.mlx_lm.columns import Columns
from tqai.integrations.mlx_lm.exact import joined

__all__ = ["Step"]

Array = Any


@dataclass(frozen=True)
class Step:
    """The tokens in sight of one step, in the columns that `columns` describes.

    Attributes:
        slabs: uint8 `[batch, kv_heads, pages, page_bytes]` each.
        recent: window, then the step's own tokens, exact even if the store has compressed them since.
        columns: which column holds which token of which sequence.
    """

    page_format: PageFormat
    sinks: ExactTokens | None
    slabs: tuple[Array, ...]
    recent: ExactTokens
    columns: Columns

    @property
    def tokens(self) -> int:
        """Columns in sight."""
        return self.columns.count - self.columns.hidden

    @property
    def is_exact(self) -> bool:
        """Whether nothing in sight is compressed and nothing held is out of sight."""
        return not self.slabs and self.sinks is None and not self.columns.hidden

    def materialize(self) -> ExactTokens:
        """All keys and values in sight `[batch, kv_heads, tokens, head_dim]`, in the model's dtype."""
        dtype = self.recent.keys.dtype
        parts = [] if self.sinks is None else [self.sinks]
        for slab in self.slabs:
            decoded = decode_pages(slab, self.page_format, dtype)
            parts.append(ExactTokens(*(x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in decoded)))
        keys, values = joined([*parts, self.recent])
        hidden = self.columns.hidden
        return ExactTokens(keys[:, :, hidden:], values[:, :, hidden:])
