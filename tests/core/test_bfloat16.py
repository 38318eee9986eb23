"""core.bfloat16 against its definition, over all 65536 values."""

import numpy as np

from tqai.core.bfloat16 import LARGEST, NAN_BITS, from_bits, to_bits

FINITE_POSITIVE = np.arange(0x7F80, dtype=np.uint16)


def test_every_value_comes_back():
    bits = np.arange(0x10000, dtype=np.uint32).astype(np.uint16)
    values = from_bits(bits)
    assert values.dtype == np.float32
    is_nan = np.isnan(values)
    assert is_nan.sum() == 2 * 127
    np.testing.assert_array_equal(to_bits(values)[~is_nan], bits[~is_nan])
    assert (to_bits(values)[is_nan] == NAN_BITS).all()


def test_known_values():
    values = np.array([0.0, -0.0, 1.0, -2.0, 3.0e38, np.inf, -np.inf, np.nan])
    want = [0, 0x8000, 0x3F80, 0xC000, 0x7F62, 0x7F80, 0xFF80, NAN_BITS]
    assert to_bits(values).tolist() == want
    assert from_bits(to_bits(np.array(LARGEST))) == LARGEST
    assert to_bits(np.array(LARGEST)) == 0x7F7F


def test_between_neighbours_the_nearest_and_ties_to_even():
    low = FINITE_POSITIVE[:-1]
    middle = (low.astype(np.uint32) << 16 | 0x8000).view(np.float32)
    even = low + (low & 1)
    for sign, flag in ((1, 0), (-1, 0x8000)):
        np.testing.assert_array_equal(to_bits(sign * middle), even | flag)
        np.testing.assert_array_equal(to_bits(sign * np.nextafter(middle, np.float32(0))), low | flag)
        above = np.nextafter(middle, np.float32(np.inf))
        np.testing.assert_array_equal(to_bits(sign * above), (low + 1) | flag)


def test_beyond_the_largest_is_infinity():
    half_step_up = np.array([0x7F7F8000], np.uint32).view(np.float32)
    assert to_bits(half_step_up) == 0x7F80
    assert to_bits(np.nextafter(half_step_up, np.float32(0))) == 0x7F7F
    assert to_bits(np.array(1e300)) == 0x7F80


def test_shapes_are_kept():
    assert to_bits(np.zeros((2, 0, 3))).shape == (2, 0, 3)
    assert to_bits(np.float64(1.5)).shape == ()
    assert from_bits(np.zeros((4, 1), np.uint16)).shape == (4, 1)
