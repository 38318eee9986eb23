"""The tables of the trellis codec: which value a window of bits stands for.

    bit j of m = parity of w & rows[j]        w: window of L = state_bits + bits bits; j = 0 .. t - 1
    value      = levels[m] * step             levels: int8 [2**t], t = 6 or 7

Values are in units of a coordinate's standard deviation, 1 / sqrt(head_dim) for a unit vector, the same for
every head_dim. A table of 64 or 128 bytes fits the registers that a CPU's byte permutes read, and a linear
map of bits is one instruction there; elsewhere `window_levels` has all 2**L values.

The numbers are package data (`core/tables/trellis.json`), found and written by
`training/trellis_tables.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from tqai.errors import ConfigError

__all__ = ["STATE_BITS", "TABLE_FILE", "TRELLIS_BITS", "TrellisCode", "trellis_code"]

TABLE_FILE = "trellis.json"
STATE_BITS = (6, 8)
TRELLIS_BITS = (1, 2, 3, 4)


@dataclass(frozen=True, eq=False)
class TrellisCode:
    """What a window stands for.

    Attributes:
        state_bits: 6 or 8.
        bits: bits per coordinate, 1 to 4.
        rows: a mask of window bits for every bit of m, least significant first.
        levels: int8 `[64]` or `[128]`, read-only.
        step: a level's unit, in standard deviations of a coordinate; a float32.
    """

    state_bits: int
    bits: int
    rows: tuple[int, ...]
    levels: NDArray[np.int8]
    step: float

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
    levels = np.array(entry["levels"], dtype=np.int8)
    levels.setflags(write=False)
    rows = tuple(int(row) for row in entry["rows"])
    return TrellisCode(state_bits, bits, rows, levels, float.fromhex(entry["step"]))
