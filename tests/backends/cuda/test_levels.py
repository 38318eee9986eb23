"""Integer levels stay close to the centroids, and do not lean to one side."""

from __future__ import annotations

import numpy as np
import pytest

from tqai.backends.cuda.levels import integer_levels
from tqai.core.codec import CodecSpec, make_codec

# Root mean square error over root mean square centroid: 16-bit levels of 8 bits, else what float32 leaves.
BOUNDS = {1: 1e-7, 2: 1e-7, 3: 1e-7, 4: 1e-7, 8: 5e-5}


@pytest.mark.parametrize("bits", BOUNDS)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 112, 128, 192, 256])
def test_levels_are_close_to_centroids(dim, bits):
    codec = make_codec(CodecSpec("scalar", dim, bits))
    levels = integer_levels(codec)
    centroids = codec.tables()["centroids"].astype(np.float64)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((4096, dim))
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    codes = np.searchsorted(codec.tables()["boundaries"], unit.ravel(), side="right")
    errors = (levels.values - centroids)[codes]
    size = np.sqrt(np.mean(centroids[codes] ** 2))
    assert np.sqrt(np.mean(errors**2)) / size < BOUNDS[bits] * 1.05
    assert levels.relative_error < BOUNDS[bits]
    # A mean error does not average out over the tokens of a long context, unlike the rest.
    assert abs(np.mean(errors)) / size < 5e-6 + 4 * BOUNDS[bits] / np.sqrt(errors.size)


@pytest.mark.parametrize("bits", BOUNDS)
def test_levels_fit_their_tables(bits):
    levels = integer_levels(make_codec(CodecSpec("scalar", 128, bits)))
    for table in (levels.a, levels.b):
        assert table.min() >= -128 and table.max() <= 127
    assert (np.diff(levels.values) > 0).all()


def test_more_than_eight_levels_of_one_table_are_refused():
    levels = integer_levels(make_codec(CodecSpec("scalar", 128, 8)))
    with pytest.raises(ValueError, match="256 levels"):
        levels.permute_tables()
