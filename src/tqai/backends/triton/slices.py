"""Slices: the order of codes in a page from which a tensor core's operand unpacks without moving anything.

A side of a page with `b`-bit codes and head_dim `d` is cut into S slices of J = d / S coordinates: slice i
has the coordinates i J to i J + J - 1. The codes of one token at the same place j of all slices share a
*word*, slice i from bit i w on, w being the width of a plane: 4 and 2 bits are one plane, 3 bits are a plane
of the low two bits and, after it, one of the top bits, in which slices 0 to 7 have the bits 0 1 4 5 2 3 6 7.

    bits   S   plane widths   words
    4      4   4              16 bits
    3      8   2, 1           16 bits, then 8 bits
    2      8   2              16 bits

    keys     word of token t and place j    is number t J + j  of its plane
    values   word of token t and place j    is number j 64 + t of its plane

    4-bit keys of head_dim 128, byte by byte (words are little-endian, low byte first):
    byte     0               1               2               3               4
    bits 0-3 tok 0 dim  0    tok 0 dim 64    tok 0 dim  1    tok 0 dim 65    tok 0 dim 2   ...
    bits 4-7 tok 0 dim 32    tok 0 dim 96    tok 0 dim 33    tok 0 dim 97    tok 0 dim 34  ...

So the codes of two neighbouring words (32 bits) become levels in the halves of a register, as the operand
wants them (`pairs`). Formats that do not cut like this are laid out in `planes`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tqai.backends.triton.planes import plane_widths
from tqai.core.codec import CodecSpec
from tqai.core.packing import pack, unpack
from tqai.core.page import PAGE_TOKENS, PageFormat

__all__ = ["SLICES", "TOP_BITS", "is_sliced", "plain_side", "sliced_side"]

SLICES = {2: 8, 3: 8, 4: 4}
"""Slices of a side by bits per code."""
TOP_BITS = (0, 1, 4, 5, 2, 3, 6, 7)
"""Of the third bits of 3-bit codes, by slice; the inverse is the same."""
LEAST_PLACES = 16
"""The shortest sum that tensor cores take."""


def is_sliced(page_format: PageFormat) -> bool:
    """True if the pages of this format are laid out in slices, both sides."""
    return _cuts(page_format.key.spec) and _cuts(page_format.value.spec)


def _cuts(spec: CodecSpec) -> bool:
    if spec.bits not in SLICES:
        return False
    places = spec.head_dim // SLICES[spec.bits]
    return spec.head_dim & (spec.head_dim - 1) == 0 and places >= LEAST_PLACES


def sliced_side(codes: NDArray[np.uint8], bits: int, dim: int, values: bool) -> NDArray[np.uint8]:
    """Canonical rows uint8 `[..., 64, row_bytes]` as slices, uint8 `[..., 64 * row_bytes]`."""
    slices = SLICES[bits]
    indices = unpack(codes, bits, dim)
    lead = indices.shape[:-2]
    by_slice = indices.reshape(*lead, PAGE_TOKENS, slices, dim // slices)
    if values:
        by_slice = np.moveaxis(by_slice, -3, -1)  # [slice, place, token]
        by_slice = np.moveaxis(by_slice, -3, -1)  # [place, token, slice]
    else:
        by_slice = np.swapaxes(by_slice, -1, -2)  # [token, place, slice]
    flat = np.ascontiguousarray(by_slice).reshape(*lead, PAGE_TOKENS * dim)
    parts, shift = [], 0
    for width in plane_widths(bits):
        plane = flat >> shift & (2**width - 1)
        parts.append(pack(_turned(plane) if width == 1 else plane, width))
        shift += width
    return np.concatenate(parts, axis=-1)


def plain_side(raw: NDArray[np.uint8], bits: int, dim: int, values: bool) -> NDArray[np.uint8]:
    """Inverse of `sliced_side`: uint8 `[..., 64, row_bytes]`."""
    slices = SLICES[bits]
    places = dim // slices
    lead = raw.shape[:-1]
    flat = np.zeros((*lead, PAGE_TOKENS * dim), dtype=np.uint8)
    at = shift = 0
    for width in plane_widths(bits):
        size = PAGE_TOKENS * dim * width // 8
        part = np.ascontiguousarray(raw[..., at : at + size])
        plane = unpack(part, width, PAGE_TOKENS * dim)
        flat |= (_turned(plane) if width == 1 else plane) << np.uint8(shift)
        at, shift = at + size, shift + width
    if values:
        by_slice = flat.reshape(*lead, places, PAGE_TOKENS, slices)
        by_slice = np.moveaxis(by_slice, -1, -3)  # [slice, place, token]
        by_slice = np.moveaxis(by_slice, -1, -3)  # [token, slice, place]
    else:
        by_slice = np.swapaxes(flat.reshape(*lead, PAGE_TOKENS, places, slices), -1, -2)
    return pack(np.ascontiguousarray(by_slice).reshape(*lead, PAGE_TOKENS, dim), bits)


def _turned(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Top bits by slice as words have them, and back."""
    return plane.reshape(*plane.shape[:-1], -1, len(TOP_BITS))[..., list(TOP_BITS)].reshape(plane.shape)
