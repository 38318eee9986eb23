"""Integer levels for the tensor cores, the codebook's centroids.

The kernels multiply int8. A table gives each code an int8 `a` (and `b`, where there are two tables), and

    (a[code] + b[code] * coef_b) * unit  =  centroid[code] + error

    1 to 4 bits    centroids are whole multiples of a step (`tqai.core.grid`): no error but float32's
    4 bits         two tables of 8, the 8 inner codes (4 to 11) and the 8 outer, of one step. The byte permute
                   that reads a table yields 0 or -1 (the sign of the entry at the code's low three bits) for
                   the codes of the other, which the tables allow for.
    8 bits         16-bit levels: `a` their high and `b` their low byte, both signed

`relative_error` is the root of the expected squared error over the expected squared centroid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tqai.core.codec import Codec

__all__ = ["Levels", "integer_levels"]

Floats = NDArray[np.float64]
MOST = 126
"""A positive level of 4 bits is one more in its table, see `_two_tables`."""
EXACT = 1e-6
"""Of the greatest centroid: what float32 leaves of a whole multiple."""


@dataclass(frozen=True, eq=False)
class Levels:
    """Attributes: `a`, `b` int64 `[2**bits]`, what each table yields for each *code*; and the constants."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    coef_b: float
    unit: float
    relative_error: float

    @property
    def values(self) -> Floats:
        """The level that the kernels use for each code."""
        return (self.a + self.b * self.coef_b) * self.unit

    def permute_tables(self) -> tuple[int, int, int, int]:
        """The four 32-bit words of the two tables, for up to 4 bits (8 bits have a table in memory)."""
        count = len(self.a)
        if count == 16:
            low = np.arange(8)
            inner = np.where(low < 4, low + 8, low)
            outer = np.where(low < 4, low, low + 8)
            first, second = self.a[inner], self.b[outer]
        elif count <= 8:
            first = self.a[np.arange(8) % count]
            second = np.zeros(8, dtype=np.int64)
        else:
            raise ValueError(f"{count} levels do not fit a byte permute")
        words = np.concatenate([first, second]).astype(np.int8).view("<u4")
        return int(words[0]), int(words[1]), int(words[2]), int(words[3])

    def lookup(self) -> NDArray[np.uint32]:
        """uint32 `[256]`: `a` in byte 0, `b` in byte 1."""
        return ((self.a & 0xFF) | (self.b & 0xFF) << 8).astype(np.uint32)


def integer_levels(codec: Codec) -> Levels:
    """Levels for a scalar codec of 1, 2, 3, 4 or 8 bits."""
    return _levels(tuple(float(c) for c in codec.tables()["centroids"]), codec.spec.head_dim)


@lru_cache(maxsize=64)
def _levels(centroids: tuple[float, ...], dim: int) -> Levels:
    c = np.array(centroids)
    weights = _probabilities(c, dim)
    if len(c) == 256:
        return _wide(c, weights)
    whole = _whole(c)
    a, b = _two_tables(whole) if len(c) == 16 else (whole, np.zeros_like(whole))
    unit = float(np.sum(weights * whole * c) / np.sum(weights * whole**2))
    return Levels(a, b, 1.0, unit, _relative(c, weights, whole * unit - c))


def _probabilities(centroids: Floats, dim: int) -> Floats:
    """Chance of each cell for a coordinate of a random unit vector; enough digits to weigh errors by."""
    x = np.linspace(-1.0, 1.0, 20001)
    density = (1.0 - x * x).clip(0.0) ** max((dim - 3) / 2.0, 0.0)
    cells = np.searchsorted(0.5 * (centroids[1:] + centroids[:-1]), x)
    mass = np.bincount(cells, weights=density, minlength=len(centroids))
    out: Floats = (mass + mass[::-1]) / (2.0 * mass.sum())
    return out


def _relative(c: Floats, weights: Floats, errors: Floats) -> float:
    return float(np.sqrt(np.sum(weights * errors**2) / np.sum(weights * c**2)))


def _whole(c: Floats) -> NDArray[np.int64]:
    """The least whole numbers that the centroids are multiples of, of a byte; where there are none (other
    codebooks than core's), the nearest."""
    wholes = np.round(c / c[-1] * np.arange(1, MOST + 1)[:, None])
    errors = np.abs(wholes / np.arange(1, MOST + 1)[:, None] - c / c[-1]).max(axis=-1)
    exact = np.flatnonzero(errors < EXACT)
    found: NDArray[np.int64] = wholes[exact[0] if len(exact) else int(np.argmin(errors))].astype(np.int64)
    return found


def _two_tables(whole: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What the tables of the inner and of the outer codes yield for each code."""
    a, b = np.zeros(16, dtype=np.int64), np.zeros(16, dtype=np.int64)
    for code in range(16):
        own, other = (a, b) if 4 <= code < 12 else (b, a)
        # The other table's entry at the same low three bits has this one's sign: inner 8 to 11 lie beside
        # outer 0 to 3, so of the other; see `permute_tables`.
        other[code] = -1 if code >= 8 else 0
        own[code] = whole[code] - other[code]
    return a, b


def _wide(c: Floats, weights: Floats) -> Levels:
    unit = c[-1] / 32500.0
    whole = np.round(c / unit).astype(np.int64)
    a = (whole + 128) >> 8
    b = whole - 256 * a
    return Levels(a, b, 1.0 / 256.0, 256.0 * unit, _relative(c, weights, whole * unit - c))
