"""`MlxBackend`: the `Backend` contract served by MLX, on arrays of MLX."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from tqai.backends.base import Attended, ExactTokens, History
from tqai.backends.mlx.attention import attend
from tqai.backends.mlx.codes import mlx_codec
from tqai.backends.mlx.pages import decode_pages, encode_pages
from tqai.core.page import PAGE_TOKENS, CanonicalPages, PageFormat, pages_from_bytes, pages_to_bytes
from tqai.errors import UnsupportedError

__all__ = ["DEVICE_TYPE", "MlxBackend"]

Array = Any

DEVICE_TYPE = "mlx"
"""What stands for a device of MLX's own (CPU or Metal) in `resolve`, whose other names are torch's."""


class MlxBackend:
    """Canonical pages, computed on in MLX operations on MLX's default device. Holds no state."""

    name = "mlx"

    def refuses(self, page_format: PageFormat, device_type: str, dtype: str) -> str | None:
        """See `Backend.refuses`: arrays of MLX are served, torch's are not."""
        if device_type != DEVICE_TYPE:
            return (
                f"it computes on arrays of MLX, not on torch tensors ({device_type}): "
                "allowed are models that mlx-lm has loaded"
            )
        if dtype not in ("float32", "bfloat16", "float16"):
            return f"dtype {dtype}: allowed are float32, bfloat16 and float16"
        if page_format.scale_format != "bfloat16":
            return f"scale_format {page_format.scale_format!r}: allowed is bfloat16"
        try:
            mlx_codec(page_format.key)
            mlx_codec(page_format.value)
        except UnsupportedError as error:
            return str(error)
        return None

    def encode(self, keys: Array, values: Array, page_format: PageFormat, out: Array) -> None:
        """See `Backend.encode`."""
        out[...] = encode_pages(keys, values, page_format)

    def decode(self, raw: Array, page_format: PageFormat, dtype: Any) -> ExactTokens:
        """See `Backend.decode`."""
        return decode_pages(raw, page_format, dtype)

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
        """See `Backend.attend`. Pages that do not lie side by side are gathered first: the cache for
        mlx-lm keeps them side by side and calls `tqai.backends.mlx.attention` itself."""
        tokens = history.pages * PAGE_TOKENS
        before = 0 if sinks is None else sinks.keys.shape[2]
        after = recent.keys.shape[2]
        out_of_sight = history.first_token or history.counts is not None
        if out_of_sight and history.pages:
            if mask is None:
                new_tokens, columns = query.shape[2], before + history.tokens + after
                mask = mx.arange(columns) <= mx.arange(columns - new_tokens, columns)[:, None]
                mask = mask[None, None]
            hidden = mx.zeros((*mask.shape[:3], history.first_token), mx.bool_)
            mask = mx.concatenate([mask[..., :before], hidden, mask[..., before:]], axis=-1)
            if history.counts is not None:
                present = mx.arange(tokens) < (history.counts * PAGE_TOKENS)[:, None]
                ones = [mx.ones((present.shape[0], width), mx.bool_) for width in (before, after)]
                mask = mask & mx.concatenate([ones[0], present, ones[1]], axis=-1)[:, None, None]
        slabs = [_gathered(history)] if history.pages else []
        return attend(query, slabs, history.page_format, sinks, recent, mask, scaling, softcap)

    def to_canonical(self, raw: Array, page_format: PageFormat) -> CanonicalPages:
        """See `Backend.to_canonical`; the order is the same, only the container changes."""
        return pages_from_bytes(np.array(raw), page_format)

    def from_canonical(self, pages: CanonicalPages, page_format: PageFormat) -> NDArray[np.uint8]:
        """See `Backend.from_canonical`."""
        return pages_to_bytes(pages, page_format)


def _gathered(history: History) -> Array:
    """The pages of all sequences, uint8 `[batch, kv_heads, pages, page_bytes]`."""
    slabs = history.slabs[0] if len(history.slabs) == 1 else mx.concatenate(list(history.slabs))
    starts = np.asarray(history.slab_starts)
    sizes = np.array([slab.shape[0] for slab in history.slabs])
    before = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    slab_of = np.searchsorted(starts, history.table, side="right") - 1
    rows = history.table - starts[slab_of] + before[slab_of]
    return slabs[mx.array(rows.astype(np.int32))].swapaxes(1, 2)
