"""What a page holds, byte by byte.

A page is 64 consecutive tokens of one KV head of one layer of one sequence. In memory it is one run
of bytes, so that a kernel fetches it with one copy:

    offset 0            key_scales_at        value_codes_at       value_scales_at      page_bytes
    | key codes         | 64 key scales      | value codes        | 64 value scales    |
    | 64 * row_bytes    | 64 * bfloat16      | 64 * row_bytes     | 64 * bfloat16      |
    '-- each part is a multiple of 16 bytes, as 64 rows and 64 scales always are -------'

The *canonical* order inside 'codes' is token by token, each token one bit-packed row (`core.packing`);
it is the form of saved files. A backend may order the bytes inside the two code parts as its kernels
like best; `Backend.to_canonical` and `from_canonical` convert, bit-exact. Sizes never differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tqai.core.codec import SCALE_BYTES, Codec, Encoded

__all__ = ["PAGE_TOKENS", "CanonicalPages", "PageFormat", "pages_from_bytes", "pages_to_bytes"]

PAGE_TOKENS = 64
ALIGN_BYTES = 16


class CanonicalPages(NamedTuple):
    """Pages in canonical order; leading axes are free, usually `[pages, num_kv_heads]`.

    Attributes:
        key: codes uint8 `[..., 64, key_row_bytes]`, scales uint16 `[..., 64]`.
        value: codes uint8 `[..., 64, value_row_bytes]`, scales uint16 `[..., 64]`.
    """

    key: Encoded
    value: Encoded


@dataclass(frozen=True)
class PageFormat:
    """Sizes and offsets, in bytes, of a page whose keys and values use these two codecs.

    Keys and values may differ in bits and in head_dim.
    """

    key: Codec
    value: Codec

    @property
    def key_codes_bytes(self) -> int:
        return _aligned(PAGE_TOKENS * self.key.row_bytes)

    @property
    def key_scales_at(self) -> int:
        return self.key_codes_bytes

    @property
    def value_codes_at(self) -> int:
        return self.key_scales_at + PAGE_TOKENS * SCALE_BYTES

    @property
    def value_codes_bytes(self) -> int:
        return _aligned(PAGE_TOKENS * self.value.row_bytes)

    @property
    def value_scales_at(self) -> int:
        return self.value_codes_at + self.value_codes_bytes

    @property
    def page_bytes(self) -> int:
        return self.value_scales_at + PAGE_TOKENS * SCALE_BYTES


def pages_to_bytes(pages: CanonicalPages, page_format: PageFormat) -> NDArray[np.uint8]:
    """Canonical pages as one uint8 array `[..., page_bytes]`; padding bytes are 0."""
    lead = pages.key.scales.shape[:-1]
    out = np.zeros((*lead, page_format.page_bytes), dtype=np.uint8)
    parts = (
        (0, pages.key, page_format.key_scales_at),
        (page_format.value_codes_at, pages.value, page_format.value_scales_at),
    )
    for codes_at, part, scales_at in parts:
        codes = part.codes.reshape(*lead, PAGE_TOKENS * part.codes.shape[-1])
        out[..., codes_at : codes_at + codes.shape[-1]] = codes
        scales = np.ascontiguousarray(part.scales.astype("<u2")).view(np.uint8)
        out[..., scales_at : scales_at + scales.shape[-1]] = scales
    return out


def pages_from_bytes(raw: NDArray[np.uint8], page_format: PageFormat) -> CanonicalPages:
    """Inverse of `pages_to_bytes`: `raw` is uint8 `[..., page_bytes]`."""
    lead = raw.shape[:-1]

    def part(codes_at: int, row_bytes: int, scales_at: int) -> Encoded:
        codes = raw[..., codes_at : codes_at + PAGE_TOKENS * row_bytes]
        scales = raw[..., scales_at : scales_at + PAGE_TOKENS * SCALE_BYTES]
        return Encoded(
            np.ascontiguousarray(codes).reshape(*lead, PAGE_TOKENS, row_bytes),
            np.ascontiguousarray(scales).view("<u2").astype(np.uint16).reshape(*lead, PAGE_TOKENS),
        )

    return CanonicalPages(
        part(0, page_format.key.row_bytes, page_format.key_scales_at),
        part(page_format.value_codes_at, page_format.value.row_bytes, page_format.value_scales_at),
    )


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES
