"""core.packing: exact bytes, exact round trips."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tqai.core.packing import pack, packed_bytes, unpack
from tqai.errors import ConfigError, InputError


def packed_one_bit_at_a_time(codes, bits):
    """The layout as docs/format.md states it, literally."""
    out = [0] * -(-len(codes) * bits // 8)
    for i, code in enumerate(codes):
        for j in range(bits):
            k = i * bits + j
            out[k // 8] |= ((code >> j) & 1) << (k % 8)
    return out


@st.composite
def codes_of_any_width(draw):
    bits = draw(st.integers(1, 8))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9))
    shape = (*shape[:-1], draw(st.integers(0, 130)))
    dtype = draw(st.sampled_from([np.uint8, np.int16, np.int64]))
    return bits, draw(
        hnp.arrays(dtype, shape, elements=st.integers(0, min(2**bits - 1, np.iinfo(dtype).max)))
    )


@given(codes_of_any_width())
def test_round_trip_and_layout(case):
    bits, codes = case
    packed = pack(codes, bits)
    n = codes.shape[-1]
    assert packed.dtype == np.uint8
    assert (
        packed.shape == (*codes.shape[:-1], packed_bytes(n, bits)) == (*codes.shape[:-1], -(-n * bits // 8))
    )
    for at in np.ndindex(codes.shape[:-1]):
        assert packed[at].tolist() == packed_one_bit_at_a_time(codes[at].tolist(), bits)
    back = unpack(packed, bits, n)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize(
    ("bits", "codes", "want"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 0, 1], [0b00000001, 0b00000001]),
        (2, [3, 0, 1, 2], [0b10_01_00_11]),
        # The worked example of docs/format.md.
        (3, [5, 2, 7, 0, 1, 6, 3, 4], [0b11_010_101, 0b0_001_000_1, 0b100_011_11]),
        (4, [0xA, 0x5, 0xF], [0x5A, 0x0F]),
        (5, [31, 0, 1], [0b000_11111, 0b0_00001_00]),
        (6, [63, 1], [0b01_111111, 0b0000_0000]),
        (7, [127, 1, 0], [0b1_1111111, 0, 0]),
        (8, [0, 255, 128], [0, 255, 128]),
    ],
)
def test_exact_bytes(bits, codes, want):
    assert pack(np.array(codes), bits).tolist() == want
    assert unpack(np.array(want, np.uint8), bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_padding_is_zero_and_not_read(bits):
    codes = np.full((2, 3), 2**bits - 1)
    packed = pack(codes, bits)
    used = 3 * bits % 8
    if used:
        assert (packed[:, -1] >> used == 0).all()
        packed[:, -1] |= 0xFF << used & 0xFF
    np.testing.assert_array_equal(unpack(packed, bits, 3), codes)


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("bits", range(1, 9))
def test_any_strides(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (65, 6, 3))
    want = pack(np.ascontiguousarray(codes.T), bits)
    np.testing.assert_array_equal(pack(codes.T, bits), want)
    wide = np.full((*want.shape[:-1], 2 * want.shape[-1]), 0xFF, np.uint8)
    wide[..., ::2] = want
    np.testing.assert_array_equal(unpack(wide[..., ::2], bits, 65), codes.T)


@pytest.mark.parametrize(
    ("codes", "bits", "words"),
    [
        (np.array([0, 4]), 2, "index 4 does not fit 2 bits"),
        (np.array([0, -1]), 2, "index -1 does not fit"),
        (np.array([256]), 8, "index 256"),
        (np.array([2**40]), 8, "index 1099511627776"),
        (np.array([1.0]), 4, "float64"),
        (np.array([True]), 4, "bool"),
        (np.array(3), 4, "no axis"),
    ],
)
def test_pack_refuses(codes, bits, words):
    with pytest.raises(InputError, match=words):
        pack(codes, bits)


@pytest.mark.parametrize(
    ("packed", "n", "words"),
    [
        (np.zeros(2, np.uint8), 8, r"shape \[2\]: rows of 3 bytes are wanted for 8 codes of 3 bits"),
        (np.zeros((5, 4), np.uint8), 8, r"shape \[5, 4\]: rows of 3 bytes"),
        (np.zeros(3, np.int8), 8, "int8"),
        (np.zeros((), np.uint8), 2, "rows of 1 bytes"),
        (np.zeros(0, np.uint8), -1, "n=-1"),
    ],
)
def test_unpack_refuses(packed, n, words):
    with pytest.raises(InputError, match=words):
        unpack(packed, 3, n)


@pytest.mark.parametrize("bits", [0, 9, 2.0, True])
def test_bits_out_of_range(bits):
    with pytest.raises(ConfigError, match=f"bits={bits}"):
        pack(np.array([0]), bits)
    with pytest.raises(ConfigError, match=f"bits={bits}"):
        unpack(np.array([0], np.uint8), bits, 1)
