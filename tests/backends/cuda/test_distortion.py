"""The criterion of `distortion.py` tells encoders apart as it says."""

from __future__ import annotations

import numpy as np
import pytest
from tests.backends.cuda.distortion import check_as_good

VECTORS = 1024


def errors(seed, worse=0.0):
    """Of two encoders of 4 bits, `worse` more of the second's mean."""
    rng = np.random.default_rng(seed)
    right = 0.005 * (1.0 + 0.13 * rng.standard_normal(VECTORS)).clip(0.5)
    other = rng.random(VECTORS) < 0.2
    found = right + 0.005 * np.where(other, 0.0143 * rng.standard_normal(VECTORS), 0.0)
    return found + worse * right.mean(), right


@pytest.mark.parametrize("seed", range(20))
def test_equal_encoders_pass_and_worse_ones_do_not(seed):
    check_as_good(*errors(seed))
    for worse in (3e-3, -3e-3):
        with pytest.raises(AssertionError, match="worse"):
            check_as_good(*errors(seed, worse))


def test_one_bad_vector_shows():
    found, right = errors(0)
    found[77] += 0.6 * right.mean()
    with pytest.raises(AssertionError, match="a vector has"):
        check_as_good(found, right)


def test_too_few_vectors_show_nothing():
    found, right = errors(0)
    with pytest.raises(AssertionError, match="too few"):
        check_as_good(found[:200], right[:200])
