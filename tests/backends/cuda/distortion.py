"""Whether two encoders of trellis codes are equally good: their errors on the same vectors, in pairs.

Encoders of one trellis that round otherwise find another path for 7 to 25 % of the vectors (2 to 4 bits); it
is as good on the whole, and for one vector up to a sixth of the mean error better or worse. At head_dim 128
the difference has a standard deviation of 0.4 to 0.7 % of the mean error (16 to 32 thousand vectors); the
errors themselves scatter by 6 to 13 %.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["check_as_good"]

MOST_APART = 1e-3
"""Of the mean error, beside what the vectors scatter."""
MOST_SCATTER = 3.5e-4
"""The standard error of the mean difference: with three of them 0.3 % worse is still seen."""
MOST_FOR_ONE = 0.5
"""Of the mean error: a vector so much worse was not encoded well by accident of rounding."""


def check_as_good(found: NDArray[np.floating], right: NDArray[np.floating]) -> None:
    """Squared errors of the same vectors, relative to their squared norms, by the encoder in question and by
    one that is known to be good. AssertionError where they are not equally good, or too few to tell."""
    difference = (found - right).ravel() / right.mean()
    assert difference.max() < MOST_FOR_ONE, f"a vector has {difference.max():.2f} of the mean error more"
    scatter = difference.std() / np.sqrt(difference.size)
    assert scatter < MOST_SCATTER, f"{difference.size} vectors are too few: they scatter by {scatter:.1e}"
    assert abs(difference.mean()) < MOST_APART + 3 * scatter, (
        f"{difference.mean():.5f} +- {scatter:.5f} worse"
    )
