"""Without MLX these tests are left out: `pip install 'tqai[mlx]'`; arrays to and from numpy."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat

if find_spec("mlx") is None:
    collect_ignore_glob = ["test_*.py"]


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
