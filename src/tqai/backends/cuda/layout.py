"""Canonical pages to fragment order and back, in numpy: the order in which tensor cores want the codes.

A *unit* is 16 head dimensions by 64 tokens; the codes of a page are head_dim / 16 units, one after the
other, 128 * bits bytes each. A unit gives each of 32 lanes (lane = 4 g + c, g 0 to 7, c 0 to 3) 32 codes:
8 registers r of 4 codes i, which after unpacking to int8 are A fragments of mma.m16n8k32:

    keys     register r, code i:  token 8 g + r,                        dimension 16 u + 4 c + i
    values   register r, code i:  token 8 (c + 4 (r // 4)) + 4 (r % 4 // 2) + i,
                                  dimension 16 u + g + 8 (r % 2)

The 32 codes lie in `bits` 32-bit little-endian words. Nibble n of a word is its bits 4 n to 4 n + 3; low
nibbles 0 to 3 belong to the first and 4 to 7 to the second of two registers, nibble 4 h + i being code i:

    bits   word j                                                              byte planes per unit
    1      bit k of nibble 4 h + i: register 2 k + h                           32 lanes * 4
    2      bits 2 k, 2 k + 1 of nibble 4 h + i: register 4 j + 2 k + h         32 lanes * 8
    3      low 3 bits of nibble 4 h + i: register 2 j + h; the top bit is      32 * 8 (words 0, 1),
           bit j of register 6 + h                                             then 32 * 4 (word 2)
    4      nibble 4 h + i: register 2 j + h, as code ^ (code << 1 & 8) ^ 8     32 lanes * 16
    8      byte i: register j                                                  32 * 16 (words 0 to 3), twice

With 4 bits the top bit of a stored nibble thus says "among the 8 outer levels".
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqai.backends.cuda.trellis_layout import lane_codes, row_codes
from tqai.core.packing import pack, unpack
from tqai.core.page import PAGE_TOKENS, CanonicalPages, PageFormat, pages_from_bytes, pages_to_bytes
from tqai.core.trellis import STATES

__all__ = ["UNIT_DIMS", "WIDTHS", "fragment_codes", "fragment_pages", "plain_codes", "plain_pages"]

UNIT_DIMS = 16
WIDTHS = (1, 2, 3, 4, 8)
"""Bits per code that have a fragment order."""

LANES = 32
REGISTERS = 8
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (4, 4)}
Codes = NDArray[np.uint8]


def fragment_pages(pages: CanonicalPages, page_format: PageFormat) -> Codes:
    """Canonical pages as uint8 `[..., page_bytes]` in fragment order; only the code parts are reordered."""
    return _reorder(pages_to_bytes(pages, page_format), page_format, fragment_codes)


def plain_pages(raw: Codes, page_format: PageFormat) -> CanonicalPages:
    """Inverse of `fragment_pages`."""
    return pages_from_bytes(_reorder(raw, page_format, plain_codes), page_format)


def fragment_codes(codes: Codes, bits: int, dim: int, values: bool) -> Codes:
    """Packed rows uint8 `[..., 64, row_bytes]` as uint8 `[..., 8 * dim * bits]` in fragment order."""
    tokens, dims = _places(dim, values)
    chosen = unpack(codes, bits, dim)[..., tokens, dims].astype(np.uint32)
    words = _to_words(chosen, bits)
    planes, start = [], 0
    for width in PLANES[bits]:
        part = np.ascontiguousarray(words[..., start : start + width].astype("<u4"))
        planes.append(part.reshape(*part.shape[:-2], LANES * width).view(np.uint8))
        start += width
    units = np.concatenate(planes, axis=-1)
    return units.reshape(*units.shape[:-2], -1)


def plain_codes(raw: Codes, bits: int, dim: int, values: bool) -> Codes:
    """Inverse of `fragment_codes`: uint8 `[..., 64, row_bytes]`."""
    lead = raw.shape[:-1]
    units = np.ascontiguousarray(raw).reshape(*lead, dim // UNIT_DIMS, LANES * bits * 4)
    planes, start = [], 0
    for width in PLANES[bits]:
        part = np.ascontiguousarray(units[..., start : start + LANES * width * 4]).view("<u4")
        planes.append(part.reshape(*part.shape[:-1], LANES, width))
        start += LANES * width * 4
    chosen = _from_words(np.concatenate(planes, axis=-1).astype(np.uint32), bits)
    tokens, dims = _places(dim, values)
    indices = np.empty((*lead, PAGE_TOKENS, dim), dtype=np.uint8)
    indices[..., tokens, dims] = chosen
    return pack(indices, bits)


def _places(dim: int, values: bool) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Token and dimension of every code, each `[units, lane, register, 4]`."""
    u, lane, r, i = np.indices((dim // UNIT_DIMS, LANES, REGISTERS, 4))
    g, c = lane // 4, lane % 4
    if values:
        return 8 * (c + 4 * (r // 4)) + 4 * (r % 4 // 2) + i, UNIT_DIMS * u + g + 8 * (r % 2)
    return 8 * g + r, UNIT_DIMS * u + 4 * c + i


def _to_words(codes: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """`[..., register, 4]` to `[..., bits]` words."""
    if bits == 8:
        return _join(codes, 8)
    # [..., register pair, nibble]: the 8 codes of two registers
    nibbles = codes.reshape(*codes.shape[:-2], REGISTERS // 2, 8)
    if bits == 4:
        return _join(nibbles ^ ((nibbles << 1) & 8) ^ 8, 4)
    if bits == 3:
        top = np.stack([nibbles[..., 3, :] >> j & 1 for j in range(3)], axis=-2)
        return _join(nibbles[..., :3, :] | top << 3, 4)
    per_word = 4 // bits
    grouped = nibbles.reshape(*nibbles.shape[:-2], bits, per_word, 8)
    shifts = (bits * np.arange(per_word, dtype=np.uint32))[:, None]
    return _join(np.bitwise_or.reduce(grouped << shifts, axis=-2), 4)


def _from_words(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Inverse of `_to_words`."""
    if bits == 8:
        return _split(words, 8).astype(np.uint8)
    nibbles = _split(words, 4)
    if bits == 4:
        pairs = nibbles ^ ((nibbles << 1) & 8) ^ 8
    elif bits == 3:
        rest = sum(((nibbles[..., j, :] >> 3) & 1) << j for j in range(3))
        pairs = np.concatenate([nibbles & 7, np.asarray(rest)[..., None, :]], axis=-2)
    else:
        per_word = 4 // bits
        shifts = (bits * np.arange(per_word, dtype=np.uint32))[:, None]
        pairs = (nibbles[..., None, :] >> shifts) & (2**bits - 1)
    return pairs.reshape(*words.shape[:-1], REGISTERS, 4).astype(np.uint8)


def _join(parts: NDArray[Any], width: int) -> NDArray[np.uint32]:
    shifts = np.arange(parts.shape[-1], dtype=np.uint32) * np.uint32(width)
    joined: NDArray[np.uint32] = np.bitwise_or.reduce(parts.astype(np.uint32) << shifts, axis=-1)
    return joined


def _split(words: NDArray[np.uint32], width: int) -> NDArray[np.uint32]:
    shifts = np.arange(32 // width, dtype=np.uint32) * np.uint32(width)
    return (words[..., None] >> shifts) & np.uint32(2**width - 1)


def _reorder(raw: Codes, page_format: PageFormat, change: object) -> Codes:
    out = raw.copy()
    lead = raw.shape[:-1]
    parts = ((0, page_format.key, False), (page_format.value_codes_at, page_format.value, True))
    for at, codec, values in parts:
        size = PAGE_TOKENS * codec.row_bytes
        codes = np.ascontiguousarray(raw[..., at : at + size])
        bits, dim = codec.spec.bits, codec.spec.head_dim
        if codec.spec.name in STATES:
            codes = codes if change is plain_codes else codes.reshape(*lead, PAGE_TOKENS, codec.row_bytes)
            change_trellis = row_codes if change is plain_codes else lane_codes
            codes = change_trellis(codes, bits, dim, values).reshape(*lead, size)
        elif change is fragment_codes:
            codes = fragment_codes(codes.reshape(*lead, PAGE_TOKENS, codec.row_bytes), bits, dim, values)
        else:
            codes = plain_codes(codes, bits, dim, values).reshape(*lead, size)
        out[..., at : at + size] = codes
    return out
