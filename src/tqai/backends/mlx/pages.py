"""Page records in MLX: vectors to records, records to codes and scales (`core.page` draws one)."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from tqai.backends.base import ExactTokens
from tqai.backends.mlx.codes import mlx_codec
from tqai.core.codec import SCALE_BYTES
from tqai.core.page import PAGE_TOKENS, PageFormat

__all__ = ["PageParts", "decode_pages", "encode_pages", "join_parts", "split_pages"]

Array = Any


class PageParts(NamedTuple):
    """Codes uint8 `[..., 64, row_bytes]` and scales bfloat16 `[..., 64]` of pages."""

    key_codes: Array
    key_scales: Array
    value_codes: Array
    value_scales: Array


def encode_pages(keys: Array, values: Array, page_format: PageFormat) -> Array:
    """Page records uint8 `[..., page_bytes]` of `keys` and `values` `[..., 64, head_dim]`."""
    key_codes, key_scales = mlx_codec(page_format.key).encode(keys)
    value_codes, value_scales = mlx_codec(page_format.value).encode(values)
    return join_parts(PageParts(key_codes, key_scales, value_codes, value_scales))


def join_parts(parts: PageParts) -> Array:
    """Inverse of `split_pages`. 64 rows are a multiple of 16 bytes, so nothing lies between the parts."""
    lead = parts.key_scales.shape[:-1]
    octets = [
        parts.key_codes.reshape(*lead, -1),
        parts.key_scales.view(mx.uint8),
        parts.value_codes.reshape(*lead, -1),
        parts.value_scales.view(mx.uint8),
    ]
    return mx.concatenate(octets, axis=-1)


def split_pages(raw: Array, page_format: PageFormat) -> PageParts:
    """The parts of page records `raw` uint8 `[..., page_bytes]`."""
    lead = raw.shape[:-1]
    parts = []
    for codes_at, row_bytes, scales_at in (
        (0, page_format.key.row_bytes, page_format.key_scales_at),
        (page_format.value_codes_at, page_format.value.row_bytes, page_format.value_scales_at),
    ):
        codes = raw[..., codes_at : codes_at + PAGE_TOKENS * row_bytes]
        scales = raw[..., scales_at : scales_at + PAGE_TOKENS * SCALE_BYTES]
        parts += [codes.reshape(*lead, PAGE_TOKENS, row_bytes), mx.contiguous(scales).view(mx.bfloat16)]
    return PageParts(*parts)


def decode_pages(raw: Array, page_format: PageFormat, dtype: Any) -> ExactTokens:
    """Keys and values `[..., 64, head_dim]` of page records `raw` uint8 `[..., page_bytes]`."""
    parts = split_pages(raw, page_format)
    return ExactTokens(
        mlx_codec(page_format.key).decode(parts.key_codes, parts.key_scales, dtype),
        mlx_codec(page_format.value).decode(parts.value_codes, parts.value_scales, dtype),
    )
