"""Codes of 1 to 8 bits packed into bytes without gaps, and back.

A row of n codes of b bits is a string of n*b bits: code i holds bits [i*b, i*b + b), its least
significant bit first, and bit k of the row is bit k % 8 of byte k // 8 (bit 0 is worth 1). The row is
padded with zero bits to a whole byte. With b = 3, as bytes are written (most significant bit left):

    byte 2          byte 1          byte 0
    7 7 7 6 6 6 5 5|5 4 4 4 3 3 3 2|2 2 1 1 1 0 0 0        which code the bit belongs to

docs/format.md has a worked example.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tqai.errors import ConfigError, InputError

__all__ = ["pack", "packed_bytes", "unpack"]


def packed_bytes(codes: int, bits: int) -> int:
    """Bytes of a packed row of `codes` codes of `bits` bits: ceil(codes * bits / 8)."""
    return (codes * bits + 7) // 8


def pack(indices: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Pack `indices` `[..., n]`, of any integer dtype, into uint8 `[..., ceil(n * bits / 8)]`.

    Raises:
        ConfigError: bits outside 1 to 8.
        InputError: not whole numbers, no axis, or an index outside 0 to 2**bits - 1.
    """
    _check_bits(bits)
    indices = np.asarray(indices)
    if not np.issubdtype(indices.dtype, np.integer):
        raise InputError(f"indices have dtype {indices.dtype}: whole numbers are wanted")
    if indices.ndim == 0:
        raise InputError("indices have no axis: shape [..., n] is wanted")
    if indices.size:
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= 1 << bits:
            worst = low if low < 0 else high
            raise InputError(f"index {worst} does not fit {bits} bits: allowed are 0 to {(1 << bits) - 1}")
    n = indices.shape[-1]
    lead = indices.shape[:-1]
    if n == 0:
        return np.zeros((*lead, 0), dtype=np.uint8)
    column = np.ascontiguousarray(indices.astype(np.uint8))[..., None]
    flat = np.unpackbits(column, axis=-1, count=bits, bitorder="little").reshape(*lead, n * bits)
    return np.packbits(flat, axis=-1, bitorder="little")


def unpack(packed: NDArray[np.uint8], bits: int, n: int) -> NDArray[np.uint8]:
    """Inverse of `pack`: uint8 indices `[..., n]` of `packed` uint8 `[..., ceil(n * bits / 8)]`.

    Padding bits are not looked at.

    Raises:
        ConfigError: bits outside 1 to 8.
        InputError: `packed` is not uint8 or its rows have another length.
    """
    _check_bits(bits)
    packed = np.asarray(packed)
    if packed.dtype != np.uint8:
        raise InputError(f"packed codes have dtype {packed.dtype}: uint8 is wanted")
    if n < 0:
        raise InputError(f"n={n} codes: a count of 0 or more is wanted")
    if packed.ndim == 0 or packed.shape[-1] != packed_bytes(n, bits):
        raise InputError(
            f"packed codes have shape {list(packed.shape)}: rows of {packed_bytes(n, bits)} bytes are wanted "
            f"for {n} codes of {bits} bits"
        )
    lead = packed.shape[:-1]
    if n == 0:
        return np.zeros((*lead, 0), dtype=np.uint8)
    flat = np.unpackbits(packed, axis=-1, count=n * bits, bitorder="little")
    return np.packbits(flat.reshape(*lead, n, bits), axis=-1, bitorder="little")[..., 0]


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or not 1 <= bits <= 8:
        raise ConfigError(f"bits={bits!r}: allowed are whole numbers from 1 to 8")
