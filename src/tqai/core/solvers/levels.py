"""What a solver gives: centroids and the boundaries half way between them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Levels", "levels_of"]


class Levels(NamedTuple):
    """Float32 `centroids` `[2**bits]` and `boundaries` `[2**bits - 1]`, both ascending and symmetric."""

    centroids: NDArray[np.float32]
    boundaries: NDArray[np.float32]


def levels_of(half: NDArray[np.floating]) -> Levels:
    """Levels of the positive half `[2**(bits-1)]` of symmetric centroids, ascending."""
    positive = np.asarray(half, dtype=np.float64)
    centroids = np.concatenate([-positive[::-1], positive])
    boundaries = 0.5 * (centroids[1:] + centroids[:-1])
    return Levels(centroids.astype(np.float32), boundaries.astype(np.float32))
