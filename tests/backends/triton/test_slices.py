"""Slices come back bit-exact and are what their picture says."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

from tqai.backends.triton.slices import SLICES, is_sliced, plain_side, sliced_side
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.packing import pack
from tqai.core.page import PageFormat

SIZES = [(4, 64), (4, 128), (4, 256), (3, 128), (2, 128), (2, 256)]


def formats(bits_k, bits_v, dim):
    return PageFormat(*(make_codec(CodecSpec("scalar", dim, bits)) for bits in (bits_k, bits_v)))


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(("bits", "dim"), SIZES)
def test_sides_come_back_bit_exact(bits, dim, values):
    codes = np.random.default_rng(bits).integers(0, 256, (2, 3, 64, dim * bits // 8), dtype=np.uint8)
    raw = sliced_side(codes, bits, dim, values)
    assert raw.shape == (2, 3, 64 * dim * bits // 8)
    np.testing.assert_array_equal(plain_side(raw, bits, dim, values), codes)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(("bits", "dim"), SIZES)
def test_a_code_lies_where_the_picture_says(bits, dim, values):
    token, coordinate = 37, dim - 9
    indices = np.zeros((64, dim), dtype=np.uint8)
    indices[token, coordinate] = code = 2**bits - 1
    raw = sliced_side(pack(indices, bits), bits, dim, values)
    slices = SLICES[bits]
    i, j = divmod(coordinate, dim // slices)
    at = j * 64 + token if values else token * (dim // slices) + j
    width = 4 if bits == 4 else 2
    wanted = np.zeros_like(raw)
    wanted[: 64 * dim * width // 8].view("<u2")[at] = (code & (2**width - 1)) << (width * i)
    if bits == 3:
        wanted[64 * dim * 2 // 8 + at] = 1 << (0, 1, 4, 5, 2, 3, 6, 7)[i]
    np.testing.assert_array_equal(raw, wanted)


def test_which_formats_cut():
    assert is_sliced(formats(4, 2, 128)) and is_sliced(formats(3, 3, 256)) and is_sliced(formats(4, 4, 64))
    for bits_k, bits_v, dim in ((4, 2, 64), (8, 4, 128), (4, 1, 128), (4, 4, 96), (4, 4, 32)):
        assert not is_sliced(formats(bits_k, bits_v, dim))
