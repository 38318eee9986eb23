"""Levels as odd polynomials of the code: arithmetic in registers instead of a table in memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["COEFFICIENTS", "level_polynomial"]

COEFFICIENTS = 6


def level_polynomial(centroids: NDArray[np.float32]) -> list[float]:
    """Coefficients of x, x^3, x^5, ... with x = code - (levels - 1) / 2; six, 0 where unused.

    Exact (to float32) for 2, 4 and 8 levels. For 16, least squares relative to the outermost level: no
    level is off by more than 1e-4 of it (tests/backends/triton/test_polynomial.py). More levels: all 0.
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
