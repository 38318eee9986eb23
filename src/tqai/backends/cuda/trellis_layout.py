"""Canonical trellis codes to the CUDA kernels' order and back, in numpy; only where bits lie changes.

A row of codes is a circle of bits (docs/format.md). A lane of a warp reads a *run* of it, the bits of
neighbouring dimensions of one token; what goes on beyond the run's end it gets from the lane that has the
next one. Lane l = 4 g + c (g 0 to 7, c 0 to 3) has

    keys      8 runs r = 0..7    token 8 g + r,               part c of 4 parts of the dimensions
    values   16 runs r = 0..15   token 16 (r // 4) + 4 c + r % 4,    part g of 8 parts

one after the other without a gap. As many runs as fill whole 32-bit words (2, 4 or 8 of keys, 4, 8 or 16 of
values, as few as do) are a *block* of n words per lane. Blocks lie one after the other, n * 128 bytes each;
within a block the words lie in planes that lanes read with one access of 16, 8 or 4 bytes:

    words 0..3   words 4..7  ...  | two words, if n & 2 | one word, if n & 1
    32 lanes * 16 bytes each      | 32 lanes * 8        | 32 lanes * 4

    keys of 3 bits, head_dim 128: runs of 96 bits, blocks of 2 runs, n = 6
    byte  0      4      8      12     16 ...            512    516    520 ...          768 (next block)
          lane 0 lane 0 lane 0 lane 0 lane 1            lane 0 lane 0 lane 1
          word 0 word 1 word 2 word 3 word 0            word 4 word 5 word 4
          '-- token 0, dims 0-31 --'  token 1, dims 0-31: words 3, 4, 5
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tqai.core.page import PAGE_TOKENS

__all__ = ["bit_places", "block_shape", "lane_codes", "row_codes"]

LANES = 32
WORD_BITS = 32
Codes = NDArray[np.uint8]


def lane_codes(codes: Codes, bits: int, dim: int, values: bool) -> Codes:
    """Packed rows uint8 `[..., 64, row_bytes]` as uint8 `[..., 8 * dim * bits]` in the kernels' order."""
    flat = np.unpackbits(codes, axis=-1, bitorder="little").reshape(*codes.shape[:-2], -1)
    out = np.empty_like(flat)
    out[..., bit_places(bits, dim, values)] = flat
    return np.packbits(out, axis=-1, bitorder="little")


def row_codes(raw: Codes, bits: int, dim: int, values: bool) -> Codes:
    """Inverse of `lane_codes`: uint8 `[..., 64, row_bytes]`."""
    flat = np.unpackbits(raw, axis=-1, bitorder="little")[..., bit_places(bits, dim, values)]
    return np.packbits(flat.reshape(*raw.shape[:-1], PAGE_TOKENS, dim * bits), axis=-1, bitorder="little")


def block_shape(bits: int, dim: int, values: bool) -> tuple[int, int, int]:
    """Bits of a run, runs of a block, words of a block for each lane.

    >>> block_shape(3, 128, False)
    (96, 2, 6)
    """
    length = dim // (8 if values else 4) * bits
    runs = 4 if values else 2
    while runs * length % WORD_BITS:
        runs *= 2
    return length, runs, runs * length // WORD_BITS


@lru_cache(maxsize=64)
def bit_places(bits: int, dim: int, values: bool) -> NDArray[np.intp]:
    """Where each bit of the canonical code part lies, `[64 * dim * bits]`."""
    length, runs, words = block_shape(bits, dim, values)
    token, bit = np.indices((PAGE_TOKENS, dim * bits))
    part, at = bit // length, bit % length
    if values:
        run, lane = token // 16 * 4 + token % 4, 4 * part + token // 4 % 4
    else:
        run, lane = token % 8, token // 8 * 4 + part
    at = at + run % runs * length
    word = at // WORD_BITS
    quads = words & ~3
    in_pair = (word < quads + 2) & (words & 2 > 0)
    plane = np.where(word < quads, word & ~3, np.where(in_pair, quads, words - 1))
    width = np.where(word < quads, 4, np.where(in_pair, 2, 1))
    place = run // runs * words * LANES + plane * LANES + lane * width + (word - plane)
    return np.asarray((place * WORD_BITS + at % WORD_BITS).reshape(-1), dtype=np.intp)
