"""The order of trellis codes: bit-exact both ways, and runs lie where the kernels look for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai.backends.cuda.layout import fragment_pages, plain_pages
from tqai.backends.cuda.trellis_layout import block_shape, lane_codes, row_codes
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat, pages_from_bytes, pages_to_bytes

DIMS = st.sampled_from([16, 48, 64, 80, 96, 112, 128, 192, 256])
BITS = st.integers(1, 4)


@given(DIMS, BITS, st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_bits_come_back(dim, bits, values, seed):
    codes = np.random.default_rng(seed).integers(0, 256, (2, 64, dim * bits // 8), dtype=np.uint8)
    raw = lane_codes(codes, bits, dim, values)
    assert raw.shape == (2, 8 * dim * bits)
    np.testing.assert_array_equal(row_codes(raw, bits, dim, values), codes)


@given(DIMS, BITS, st.booleans(), st.integers(0, 63), st.data())
@settings(max_examples=60, deadline=None)
def test_a_bit_lies_where_its_lane_reads_it(dim, bits, values, token, data):
    """Word by word as `load_words` of trellis_lookup.cuh reads them, bit by bit as `bits_at` does."""
    row_bit = data.draw(st.integers(0, dim * bits - 1))
    codes = np.zeros((64, dim * bits // 8), dtype=np.uint8)
    codes[token, row_bit // 8] = 1 << row_bit % 8
    raw = lane_codes(codes, bits, dim, values)
    length, runs, words = block_shape(bits, dim, values)
    part, at = divmod(row_bit, length)
    if values:
        n, c, i = token // 16, token // 4 % 4, token % 4
        lane, run = 4 * part + c, 4 * n + i
    else:
        lane, run = 4 * (token // 8) + part, token % 8
    block = raw.reshape(-1, words * 128)[run // runs]
    loaded, start = [], 0
    while len(loaded) < words:
        size = 4 if words - len(loaded) >= 4 else 2 if words - len(loaded) >= 2 else 1
        plane = np.ascontiguousarray(block[start : start + 128 * size]).view("<u4").reshape(32, size)
        loaded += list(plane[lane])
        start += 128 * size
    place = run % runs * length + at
    wanted = np.zeros(words, dtype=np.uint32)
    wanted[place // 32] = np.uint32(1) << np.uint32(place % 32)
    np.testing.assert_array_equal(np.array(loaded, dtype=np.uint32), wanted)
    assert np.unpackbits(raw).sum() == 1


@pytest.mark.parametrize("name", ["trellis", "trellis256"])
@pytest.mark.parametrize(
    ("bits_k", "bits_v", "dims"), [(3, 3, (128, 128)), (4, 1, (80, 64)), (2, 3, (64, 96))]
)
def test_pages_come_back_and_scales_stay(name, bits_k, bits_v, dims):
    page_format = PageFormat(
        *(make_codec(CodecSpec(name, d, b)) for d, b in zip(dims, (bits_k, bits_v), strict=True))
    )
    raw = np.random.default_rng(bits_k).integers(0, 256, (2, 3, page_format.page_bytes), dtype=np.uint8)
    fragment = fragment_pages(pages_from_bytes(raw, page_format), page_format)
    assert (fragment != raw).any()
    for at in (page_format.key_scales_at, page_format.value_scales_at):
        np.testing.assert_array_equal(fragment[..., at : at + 128], raw[..., at : at + 128])
    np.testing.assert_array_equal(pages_to_bytes(plain_pages(fragment, page_format), page_format), raw)
