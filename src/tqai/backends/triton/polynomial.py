"""Levels as odd polynomials of the code: arithmetic in registers instead of a table in memory."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from tqai.core.codec import Codec

__all__ = ["COEFFICIENTS", "HALF_COEFFICIENTS", "half_levels", "half_polynomial", "level_polynomial"]

Floats = NDArray[np.float64]
COEFFICIENTS = 6
HALF_COEFFICIENTS = {2: 2, 3: 4, 4: 5}
"""Terms of the polynomials in float16, by bits per code."""


def level_polynomial(centroids: NDArray[np.float32]) -> list[float]:
    """Coefficients of x, x^3, x^5, ... with x = code - (levels - 1) / 2; six, 0 where unused.

    Exact (to float32) for 2, 4 and 8 levels. For 16, least squares relative to the outermost level: no
    level is off by more than 1e-4 of it (tests/backends/triton/test_planes.py). More levels: all 0.
    """
    count = len(centroids)
    if count > 16:
        return [0.0] * COEFFICIENTS
    half = count // 2
    x = np.arange(half) + 0.5
    used = min(half, COEFFICIENTS)
    # x / half keeps the powers near 1
    powers = (x / half)[:, None] ** (2 * np.arange(used) + 1)
    found = np.linalg.lstsq(powers, centroids[half:].astype(np.float64), rcond=None)[0]
    found /= float(half) ** (2 * np.arange(used) + 1)
    return [*found.tolist(), *([0.0] * (COEFFICIENTS - used))]


def half_polynomial(codec: Codec) -> tuple[float, ...]:
    """Coefficients of x, x^3, ... in float16 that, evaluated in float16, come close to the levels over the
    outermost one; x = (2 code - (levels - 1)) / levels. For 2, 3 and 4 bits.

    Least squares weighed by how often a level occurs, then a search among neighbouring float16 numbers.
    The root of the expected squared error is at most 3e-4 of that of the levels.
    """
    centroids = tuple(float(c) for c in codec.tables()["centroids"])
    return _half_polynomial(centroids, codec.spec.head_dim)


@lru_cache(maxsize=64)
def _half_polynomial(centroids: tuple[float, ...], dim: int) -> tuple[float, ...]:
    c = np.array(centroids)
    half = len(c) // 2
    terms = HALF_COEFFICIENTS[len(c).bit_length() - 1]
    x = (2.0 * np.arange(half) + 1.0) / len(c)
    wanted = c[half:] / c[-1]
    weights = _chances(c, dim)[half:]
    weights = weights / np.sum(weights * wanted**2)
    powers = x[:, None] ** (2 * np.arange(terms) + 1) * np.sqrt(weights)[:, None]
    best = _half(np.linalg.lstsq(powers, wanted * np.sqrt(weights), rcond=None)[0])

    def error(coefficients: Floats) -> float:
        return float(np.sum(weights * (_evaluated(coefficients, x) - wanted) ** 2))

    least = error(best)
    steps = [k * 2.0**-10.5 for k in (-3, -2, -1, 1, 2, 3)]
    while True:
        start = least
        for count in (1, 2):
            for places in combinations(range(terms), count):
                for change in product(steps, repeat=count):
                    tried = best.copy()
                    tried[list(places)] *= 1.0 + np.array(change)
                    tried = _half(tried)
                    if (e := error(tried)) < least:
                        least, best = e, tried
        if least >= start * (1.0 - 1e-6):
            return tuple(best.tolist())


def half_levels(coefficients: tuple[float, ...], bits: int) -> Floats:
    """Levels `[2**bits]` over the outermost, as float16 arithmetic with fused multiply-adds gives them."""
    x = (2.0 * np.arange(2**bits) - (2**bits - 1)) / 2**bits
    return _evaluated(np.array(coefficients), x)


def _evaluated(coefficients: Floats, x: Floats) -> Floats:
    y = _half(x * x)
    p = np.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        p = _half(p * y + c)
    return _half(x * p)


def _half(x: Floats) -> Floats:
    return np.asarray(x).astype(np.float16).astype(np.float64)


def _chances(centroids: Floats, dim: int) -> Floats:
    """How often each level occurs: the share of a random unit vector's coordinates in its cell."""
    x = np.linspace(-1.0, 1.0, 20001)
    density = (1.0 - x * x).clip(0.0) ** max((dim - 3) / 2.0, 0.0)
    cells = np.searchsorted(0.5 * (centroids[1:] + centroids[:-1]), x)
    chances = np.bincount(cells, weights=density / density.sum(), minlength=len(centroids))
    return np.asarray(chances, dtype=np.float64)
