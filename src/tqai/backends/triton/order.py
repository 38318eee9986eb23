"""Canonical pages to the order in which the kernels read them, and back, in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tqai.backends.triton.planes import plain_rows, plane_rows
from tqai.backends.triton.slices import is_sliced, plain_side, sliced_side
from tqai.core.page import PAGE_TOKENS, CanonicalPages, PageFormat, pages_from_bytes, pages_to_bytes

__all__ = ["ordered_pages", "plain_pages"]

Raw = NDArray[np.uint8]


def ordered_pages(pages: CanonicalPages, page_format: PageFormat) -> Raw:
    """Canonical pages as uint8 `[..., page_bytes]`: in slices where the format cuts so, else in planes."""
    return _reordered(pages_to_bytes(pages, page_format), page_format, True)


def plain_pages(raw: Raw, page_format: PageFormat) -> CanonicalPages:
    """Inverse of `ordered_pages`."""
    return pages_from_bytes(_reordered(raw, page_format, False), page_format)


def _reordered(raw: Raw, page_format: PageFormat, forward: bool) -> Raw:
    out: Raw = raw.copy()
    lead = raw.shape[:-1]
    sliced = is_sliced(page_format)
    sides = ((0, page_format.key, False), (page_format.value_codes_at, page_format.value, True))
    for at, codec, values in sides:
        bits, dim = codec.spec.bits, codec.spec.head_dim
        size = PAGE_TOKENS * codec.row_bytes
        part = np.ascontiguousarray(raw[..., at : at + size])
        rows = (*lead, PAGE_TOKENS, codec.row_bytes)
        if sliced and forward:
            part = sliced_side(part.reshape(rows), bits, dim, values)
        elif sliced:
            part = plain_side(part, bits, dim, values).reshape(part.shape)
        else:
            change = plane_rows if forward else plain_rows
            part = change(part.reshape(rows), bits, dim).reshape(part.shape)
        out[..., at : at + size] = part
    return out
