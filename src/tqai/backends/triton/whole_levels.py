"""Levels as whole numbers of a byte (`core.grid`), which a kernel looks up in two registers.

level of a code = whole * unit      whole = -127 to 127, exact in float16
words           = the positive ones, a byte each, the smallest first
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_BITS", "WholeLevels", "whole_levels"]

MOST_BITS = 4
"""Of a code, for 8 magnitudes to fit two registers."""
LARGEST = 127
EXACT = 1e-6
"""Of the greatest centroid: what float32 leaves of a whole multiple."""


@dataclass(frozen=True)
class WholeLevels:
    """Attributes: `whole`, for each code, ascending and antisymmetric; and the `unit` that they are of."""

    whole: tuple[int, ...]
    unit: float

    @property
    def magnitudes(self) -> tuple[int, ...]:
        """The positive ones, ascending: 1, 2, 4 or 8."""
        return self.whole[len(self.whole) // 2 :]

    @property
    def words(self) -> tuple[int, int]:
        """`magnitudes`, four in a word, the first in its low byte."""
        packed = sum(k << 8 * i for i, k in enumerate(self.magnitudes))
        return packed & 0xFFFFFFFF, packed >> 32


def whole_levels(centroids: NDArray[np.float32]) -> WholeLevels | None:
    """Of `[2**bits]` centroids, ascending and antisymmetric: the least whole numbers that they are multiples
    of.

    None for more than 4 bits, and where there are none up to 127 (other codebooks than core's).
    """
    if len(centroids) > 2**MOST_BITS:
        return None
    c = centroids.astype(np.float64)
    for largest in range(1, LARGEST + 1):
        whole = np.rint(c / c[-1] * largest)
        if np.abs(whole / largest - c / c[-1]).max() < EXACT:
            return WholeLevels(tuple(int(k) for k in whole), float(np.sum(whole * c) / np.sum(whole * whole)))
    return None
