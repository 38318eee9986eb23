"""Bit planes come back bit-exact and are what their picture says."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

from tqai.backends.triton.planes import plain_rows, plane_rows, plane_widths
from tqai.core.packing import pack, packed_bytes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_rows_come_back_bit_exact(dim, bits):
    codes = np.random.default_rng(bits).integers(0, 256, (3, 5, packed_bytes(dim, bits)), dtype=np.uint8)
    planes = plane_rows(codes, bits, dim)
    assert planes.shape == codes.shape
    np.testing.assert_array_equal(plain_rows(planes, bits, dim), codes)
    assert (planes == codes).all() == (bits in (1, 2, 4, 8))


def test_three_bits_are_two_and_one():
    assert plane_widths(3) == (2, 1)
    assert plane_widths(7) == (4, 2, 1)
    codes = np.zeros((1, 64), dtype=np.int64)
    codes[0, 5] = 0b110
    row = plane_rows(pack(codes, 3), 3, 64)[0]
    assert row[5 * 2 // 8] == 0b10 << 2
    assert row[16] == 1 << 5
    assert row.sum() == (0b10 << 2) + (1 << 5)
