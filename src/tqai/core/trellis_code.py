"""The tables of the trellis codec: which value a window of bits stands for.

    bit j of m = parity of w & rows[j]        w: window of L = state_bits + bits bits; j = 0 .. t - 1
    value      = levels[m] * step             levels: int8 [2**t], t = 6 or 7

Codes of 4 bits have levels of two parts, and of m two nibbles that are a few shifts of the row's bits away:

    levels[m]     = parts[0][m % 16] + parts[1][m // 16]                    int8 [16] and [8]
    m % 16        = low 4 bits of the sum (exclusive or) of (w >> shift) & mask over terms[0]
    m // 16       = low 3 bits, over terms[1]

so that those of eight neighbours are found at once in a 32-bit word, and looked up by byte permutes. The
first eight of parts[0] are negative, the others not: a permute that yields the sign of an entry for the codes
of the other half so yields -1 or 0.

Values are in units of a coordinate's standard deviation, 1 / sqrt(head_dim) for a unit vector, the same for
every head_dim. A table of 64 or 128 bytes fits the registers that a CPU's byte permutes read, and a linear
map of bits is one instruction there; elsewhere `window_levels` has all 2**L values.

The numbers are package data (`core/tables/trellis.json`), found and written by
`training/trellis_tables.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from tqai.errors import ConfigError

__all__ = ["PART_BITS", "STATE_BITS", "TABLE_FILE", "TRELLIS_BITS", "TrellisCode", "rows_of", "trellis_code"]

TABLE_FILE = "trellis.json"
STATE_BITS = (6, 8)
TRELLIS_BITS = (1, 2, 3, 4)
PART_BITS = (4, 3)
"""Bits of an index into either part of the levels of 4-bit codes."""


@dataclass(frozen=True, eq=False)
class TrellisCode:
    """What a window stands for.

    Attributes:
        state_bits: 6 or 8.
        bits: bits per coordinate, 1 to 4.
        rows: a mask of window bits for every bit of m, least significant first.
        levels: int8 `[64]` or `[128]`, read-only.
        step: a level's unit, in standard deviations of a coordinate; a float32.
        terms: of 4 bits, for each part of the levels (shift, mask) pairs; else empty.
        parts: of 4 bits, int8 `[16]` (eight numbers below 0, eight others) and `[8]`; else empty.
    """

    state_bits: int
    bits: int
    rows: tuple[int, ...]
    levels: NDArray[np.int8]
    step: float
    terms: tuple[tuple[tuple[int, int], ...], ...] = ()
    parts: tuple[NDArray[np.int8], ...] = ()

    @property
    def window_bits(self) -> int:
        """L."""
        return self.state_bits + self.bits

    def mixed(self, windows: NDArray[np.integer]) -> NDArray[np.integer]:
        """Index into `levels` of each window."""
        out = np.zeros_like(windows)
        for j, row in enumerate(self.rows):
            for bit in range(self.window_bits):
                if row >> bit & 1:
                    out = out ^ ((windows >> bit & 1) << j)
        return out

    @cached_property
    def window_levels(self) -> NDArray[np.int8]:
        """int8 `[2**L]`: the level of every window, read-only."""
        out: NDArray[np.int8] = self.levels[self.mixed(np.arange(1 << self.window_bits))]
        out.setflags(write=False)
        return out


@lru_cache(maxsize=16)
def trellis_code(state_bits: int, bits: int) -> TrellisCode:
    """The shipped code of 2**state_bits states and `bits` bits per coordinate.

    Raises:
        ConfigError: there is none.
    """
    if bits not in TRELLIS_BITS or state_bits not in STATE_BITS:
        raise ConfigError(
            f"a trellis of {1 << state_bits} states and bits={bits}: allowed are 64 and 256 states and "
            f"{TRELLIS_BITS[0]} to {TRELLIS_BITS[-1]} bits"
        )
    text = resources.files("tqai.core.tables").joinpath(TABLE_FILE).read_text(encoding="utf-8")
    entry = json.loads(text)["states"][str(1 << state_bits)][str(bits)]
    step = float.fromhex(entry["step"])
    if "parts" not in entry:
        levels = _read_only(entry["levels"])
        return TrellisCode(state_bits, bits, tuple(int(row) for row in entry["rows"]), levels, step)
    terms = tuple(tuple((int(shift), int(mask)) for shift, mask in part) for part in entry["terms"])
    parts = tuple(_read_only(part) for part in entry["parts"])
    levels = _read_only(np.add.outer(parts[1].astype(np.int64), parts[0]).reshape(-1))
    return TrellisCode(state_bits, bits, rows_of(terms), levels, step, terms, parts)


def rows_of(terms: tuple[tuple[tuple[int, int], ...], ...]) -> tuple[int, ...]:
    """The rows of a map that is given by `terms`: 4 of the first part, then 3 of the second.

    >>> rows_of((((0, 15), (6, 15)), ((3, 7),)))
    (65, 130, 260, 520, 8, 16, 32)
    """
    rows = []
    for part, width in zip(terms, PART_BITS, strict=True):
        for bit in range(width):
            row = 0
            for shift, mask in part:
                row ^= (mask >> bit & 1) << (shift + bit)
            rows.append(row)
    return tuple(rows)


def _read_only(levels: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int8]:
    out = np.array(levels).astype(np.int8)
    if not np.array_equal(out, levels):
        raise ValueError(f"levels {levels} are not all of a byte")
    out.setflags(write=False)
    return out
