"""core.page: every byte where docs/format.md draws it."""

import numpy as np
import pytest

from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PAGE_TOKENS, CanonicalPages, PageFormat, pages_from_bytes, pages_to_bytes


def page_format(key=(128, 4), value=(128, 2)):
    return PageFormat(*(make_codec(CodecSpec("scalar", dim, bits)) for dim, bits in (key, value)))


def pages_of(layout, lead, seed=0):
    rng = np.random.default_rng(seed)
    return CanonicalPages(
        *(
            codec.encode(rng.standard_normal((*lead, PAGE_TOKENS, codec.spec.head_dim)))
            for codec in (layout.key, layout.value)
        )
    )


@pytest.mark.parametrize(
    ("key", "value", "offsets"),
    [
        # key scales, value codes, value scales, end
        ((128, 4), (128, 2), (4096, 4224, 6272, 6400)),
        ((128, 3), (128, 3), (3072, 3200, 6272, 6400)),
        ((80, 3), (64, 1), (1920, 2048, 2560, 2688)),
        ((256, 8), (256, 8), (16384, 16512, 32896, 33024)),
        ((5, 3), (1, 1), (128, 256, 320, 448)),
    ],
)
def test_offsets(key, value, offsets):
    layout = page_format(key, value)
    got = (layout.key_scales_at, layout.value_codes_at, layout.value_scales_at, layout.page_bytes)
    assert got == offsets
    assert all(at % 16 == 0 for at in got)


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize(("key", "value"), [((128, 4), (128, 2)), ((80, 3), (64, 5)), ((3, 3), (1, 1))])
def test_every_byte_is_where_it_is_drawn(key, value):
    layout = page_format(key, value)
    pages = pages_of(layout, (2, 3))
    raw = pages_to_bytes(pages, layout)
    assert raw.shape == (2, 3, layout.page_bytes)
    page = raw[1, 2].tobytes()
    for part, codec, codes_at, scales_at in (
        (pages.key, layout.key, 0, layout.key_scales_at),
        (pages.value, layout.value, layout.value_codes_at, layout.value_scales_at),
    ):
        for token in (0, 1, 31, 63):
            row = codes_at + token * codec.row_bytes
            assert page[row : row + codec.row_bytes] == part.codes[1, 2, token].tobytes()
            at = scales_at + 2 * token
            assert int.from_bytes(page[at : at + 2], "little") == part.scales[1, 2, token]
        assert not any(page[codes_at + PAGE_TOKENS * codec.row_bytes : scales_at])


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0, 4)])
@pytest.mark.parametrize(("key", "value"), [((128, 4), (128, 2)), ((5, 3), (7, 1))])
def test_round_trip(lead, key, value):
    layout = page_format(key, value)
    pages = pages_of(layout, lead)
    back = pages_from_bytes(pages_to_bytes(pages, layout), layout)
    for part, other in zip(pages, back, strict=True):
        np.testing.assert_array_equal(part.codes, other.codes)
        np.testing.assert_array_equal(part.scales, other.scales)
        assert other.scales.dtype == np.uint16
