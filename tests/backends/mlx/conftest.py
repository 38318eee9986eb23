"""Where MLX is not installed these tests are skipped; arrays to and from numpy."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'tqai[mlx]')")

from tqai.core.codec import CodecSpec, make_codec  # noqa: E402
from tqai.core.page import PageFormat  # noqa: E402


@pytest.fixture
def format_of():
    """Page format of (bits_k, bits_v, key_dim, value_dim); keys and values have different seeds."""

    def make(bits_k, bits_v, key_dim, value_dim=None, **spec):
        return PageFormat(
            make_codec(CodecSpec("scalar", key_dim, bits_k, **spec)),
            make_codec(CodecSpec("scalar", value_dim or key_dim, bits_v, seed=1, **spec)),
        )

    return make


@pytest.fixture
def normal():
    """Standard normal numbers, float32 numpy, of a seed and a shape."""

    def draw(seed, *shape):
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    return draw
