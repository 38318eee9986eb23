"""The physical order of codes (drawn in `csrc/layout.h` and docs/format.md) from and to the canonical one.

Units of 16 lanes of four terms; a line of 64 bytes holds 8 / b units of a plane of b bits, unit k of the
line in bits [k b, k b + b) of its bytes. Codes of 3 bits are a plane of the low two bits of all units, then a
plane of the high bits. Codes of 8 bits have two terms a lane, and little-endian 16-bit words for bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tqai.backends.native import trellis
from tqai.core.codec import Codec, Encoded
from tqai.core.packing import pack, unpack
from tqai.core.page import PAGE_TOKENS, CanonicalPages, PageFormat
from tqai.core.trellis import TrellisCodec

__all__ = ["from_row_codes", "reordered", "to_row_codes"]

LANES = 16
Order = Callable[[NDArray[np.uint8], Codec, bool], NDArray[np.uint8]]


@lru_cache(maxsize=64)
def _position(head_dim: int, is_value: bool, terms: int) -> NDArray[np.intp]:
    """Of code (token, dim), flattened, its unit * codes per unit + element."""
    token, dim = np.divmod(np.arange(PAGE_TOKENS * head_dim), head_dim)
    if is_value:
        chunk = dim // 64
        groups = np.minimum(head_dim // 16 - 4 * chunk, 4)
        unit = 256 // terms * chunk + groups * (token // terms) + dim % 64 // 16
        element = terms * (dim % 16) + token % terms
    else:
        unit = 4 * (dim // terms) + token // 16
        element = terms * (token % 16) + dim % terms
    return np.asarray(unit * LANES * terms + element, dtype=np.intp)


def _terms(bits: int) -> int:
    """Terms of a lane: 4 (elements are bytes) or 2 (16-bit words)."""
    return 2 if bits == 8 else 4


def _planes(bits: int) -> tuple[tuple[int, int], ...]:
    """(bits of the plane, its place in the code) in the order of the bytes."""
    return ((2, 0), (1, 2)) if bits == 3 else ((bits, 0),)


def to_row_codes(raw: NDArray[np.uint8], codec: Codec, is_value: bool) -> NDArray[np.uint8]:
    """Canonical codes uint8 `[..., 64, row_bytes]` of codes in physical order, same shape."""
    if isinstance(codec, TrellisCodec):
        return trellis.to_row_codes(raw, codec, is_value)
    head_dim, bits = codec.spec.head_dim, codec.spec.bits
    lead = raw.shape[:-2]
    raw = raw.reshape(*lead, -1)
    terms = _terms(bits)
    unit = LANES * terms
    codes = np.zeros((*lead, PAGE_TOKENS * head_dim // unit, unit), dtype=np.uint8)
    start = 0
    for width, place in _planes(bits):
        size = PAGE_TOKENS * head_dim * width // 8
        words = np.ascontiguousarray(raw[..., start : start + size]).view(f"<u{4 // terms}")
        words = words.reshape(*lead, -1, 1, unit).astype(np.uint16)
        shifts = np.arange(0, 32 // terms, width, dtype=np.uint16)[:, None]
        plane = (words >> shifts) & np.uint16((1 << width) - 1)
        codes |= (plane << np.uint16(place)).astype(np.uint8).reshape(codes.shape)
        start += size
    rows = codes.reshape(*lead, -1)[..., _position(head_dim, is_value, terms)]
    return pack(rows.reshape(*lead, PAGE_TOKENS, head_dim), bits)


def from_row_codes(codes: NDArray[np.uint8], codec: Codec, is_value: bool) -> NDArray[np.uint8]:
    """Inverse of `to_row_codes`."""
    if isinstance(codec, TrellisCodec):
        return trellis.from_row_codes(codes, codec, is_value)
    head_dim, bits = codec.spec.head_dim, codec.spec.bits
    rows = unpack(codes, bits, head_dim)
    lead = rows.shape[:-2]
    terms = _terms(bits)
    units = np.empty((*lead, PAGE_TOKENS * head_dim), dtype=np.uint16)
    units[..., _position(head_dim, is_value, terms)] = rows.reshape(*lead, -1)
    parts = []
    for width, place in _planes(bits):
        plane = (units >> np.uint16(place)) & np.uint16((1 << width) - 1)
        shifts = np.arange(0, 32 // terms, width, dtype=np.uint16)[:, None]
        lines = plane.reshape(*lead, -1, 32 // terms // width, LANES * terms) << shifts
        words = np.bitwise_or.reduce(lines, axis=-2).astype(f"<u{4 // terms}")
        parts.append(np.ascontiguousarray(words).view(np.uint8).reshape(*lead, -1))
    return np.concatenate(parts, axis=-1).reshape(codes.shape)


def reordered(pages: CanonicalPages, page_format: PageFormat, order: Order) -> CanonicalPages:
    """Pages with the codes of both sides put in another order; scales stay."""
    return CanonicalPages(
        Encoded(order(pages.key.codes, page_format.key, False), pages.key.scales),
        Encoded(order(pages.value.codes, page_format.value, True), pages.value.scales),
    )
