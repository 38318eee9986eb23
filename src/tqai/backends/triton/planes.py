"""Bit planes: the order of codes inside a row that shifts alone can unpack.

A row of `bits`-bit codes is cut into planes of 4, 2 and 1 bits, greatest first (3 = 2 + 1), low bits of the
code in the first plane. A plane of w bits is packed as in `core.packing`: coordinate d in byte d * w // 8,
from bit d * w % 8 on. No code straddles a byte. 1, 2, 4 and 8 bits are one plane, the canonical order.

    3 bits, head_dim 128     | 32 bytes: low 2 bits of each code | 16 bytes: their top bits |
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tqai.core.packing import pack, unpack

__all__ = ["plain_rows", "plane_rows", "plane_widths"]


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a code, the low bits' first: 8 -> (8,), 7 -> (4, 2, 1), 3 -> (2, 1)."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def plane_rows(codes: NDArray[np.uint8], bits: int, dim: int) -> NDArray[np.uint8]:
    """Canonical rows uint8 `[..., row_bytes]` in planes, same size; `dim` is a multiple of 8."""
    indices = unpack(codes, bits, dim)
    parts, shift = [], 0
    for width in plane_widths(bits):
        parts.append(pack(indices >> shift & (2**width - 1), width))
        shift += width
    return np.concatenate(parts, axis=-1)


def plain_rows(rows: NDArray[np.uint8], bits: int, dim: int) -> NDArray[np.uint8]:
    """Inverse of `plane_rows`."""
    indices = np.zeros((*rows.shape[:-1], dim), dtype=np.uint8)
    at = shift = 0
    for width in plane_widths(bits):
        size = dim * width // 8
        indices |= unpack(np.ascontiguousarray(rows[..., at : at + size]), width, dim) << np.uint8(shift)
        at, shift = at + size, shift + width
    return pack(indices, bits)
