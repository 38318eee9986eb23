"""Levels as whole numbers: those of the codebooks, to what float32 leaves of them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

from tqai.backends.triton.whole_levels import whole_levels
from tqai.core.codebook import codebook, optimal_codebook


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 112, 128, 256])
def test_whole_levels_are_the_centroids(dim, bits):
    centroids = codebook(dim, bits).centroids.astype(np.float32)
    levels = whole_levels(centroids)
    assert len(levels.whole) == 2**bits and levels.whole[-1] <= 127
    made = np.array(levels.whole) * levels.unit
    assert np.abs(made - centroids).max() / centroids[-1] < 1e-7


def test_words_hold_a_byte_for_each_magnitude():
    levels = whole_levels(codebook(128, 4).centroids.astype(np.float32))
    assert levels.magnitudes == (5, 15, 25, 36, 48, 62, 79, 104)
    assert levels.words == (0x24190F05, 0x684F3E30)
    assert levels.whole == (*(-k for k in levels.magnitudes[::-1]), *levels.magnitudes)


def test_other_codebooks_have_none():
    assert whole_levels(optimal_codebook(128, 4).centroids.astype(np.float32)) is None
    assert whole_levels(optimal_codebook(128, 2).centroids.astype(np.float32)) is None
    assert whole_levels(codebook(128, 5).centroids.astype(np.float32)) is None
