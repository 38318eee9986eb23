"""Scales of one byte: every byte's meaning, the measured cost, and the page that holds them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tqai.core import bfloat16
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.log_scale import NAN_BYTE, ZERO_BYTE, from_steps, to_steps
from tqai.core.page import (
    PAGE_TOKENS,
    CanonicalPages,
    PageFormat,
    decode_part,
    pages_from_bytes,
    pages_to_bytes,
    with_scale_format,
)
from tqai.errors import ConfigError


def bits_of(*numbers):
    return bfloat16.to_bits(np.array(numbers, dtype=np.float64))


@pytest.mark.parametrize("base", [1.0, 2.0**-126, 2.0**-133, 1.5 * 2.0**127, 2.0**100])
def test_bytes_are_sixteenths_of_octaves_below_the_largest(base):
    numbers = [base, base / 2, base / 4, base * 2.0**-1.25, base * 2.0**-15, 0.0, np.nan]
    steps, bases = to_steps(bits_of(*numbers))
    assert bfloat16.from_bits(bases) == np.float32(base)
    expected = [0, 16, 32, 20, 240, ZERO_BYTE, NAN_BYTE]
    if base > 2.0**-100:
        assert steps.tolist() == expected
        found = from_steps(steps, bases)
        np.testing.assert_allclose(found[:5], numbers[:5], rtol=2.0**-7)
    assert steps[0] == 0
    assert steps[5:].tolist() == expected[5:]
    found = from_steps(steps, bases)
    assert found[0] == np.float32(base)
    assert found[5] == 0
    assert np.isnan(found[6])


def test_pages_without_a_scale():
    steps, bases = to_steps(bits_of(0.0, np.nan, 0.0))
    assert steps.tolist() == [ZERO_BYTE, NAN_BYTE, ZERO_BYTE]
    assert bases == 0
    assert to_steps(bits_of(np.inf, 1.0))[0].tolist() == [NAN_BYTE, 0]


def test_what_is_far_below_the_largest_is_zero():
    """Half the smallest step, 2^(-253/16 - 1), is where zero begins."""
    for exponent, expected in ((-15.8, 253), (-16.75, 253), (-16.9, ZERO_BYTE), (-100.0, ZERO_BYTE)):
        assert to_steps(bits_of(1.0, 2.0**exponent))[0][1] == expected


@settings(max_examples=200, deadline=None)
@given(arrays.arrays(np.uint16, (3, 64), elements=st.integers(0, 0x7FFF)))
def test_any_scales(scales):
    """Within half a step of what they were, wherever that is representable; special ones kept."""
    steps, bases = to_steps(scales)
    numbers, found = bfloat16.from_bits(scales).astype(float), from_steps(steps, bases).astype(float)
    finite = np.isfinite(numbers)
    assert (np.isnan(found) == ~finite).all()
    assert (steps[~finite] == NAN_BYTE).all()
    largest = np.where(finite, numbers, 0.0).max(-1, keepdims=True)
    np.testing.assert_array_equal(bfloat16.from_bits(bases)[:, None], largest.astype(np.float32))
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves = np.abs(np.log2(found / numbers))
        inside = finite & (numbers >= largest * 2.0**-15.8) & (largest > 2.0**-110)
        assert (octaves[inside] <= 1 / 32 + 1e-6).all()
    assert (np.where(finite, found, 0.0) <= largest * (1 + 1e-7)).all()
    below = finite & (numbers < largest * 2.0**-16.9)
    assert (found[below] == 0).all()


def test_cost_is_what_is_claimed():
    """Relative mean squared error of the scale, (ln 2 / 16)^2 / 12, at spread-out scales."""
    rng = np.random.default_rng(0)
    numbers = np.exp(rng.normal(size=(2000, 64)))
    scales = bfloat16.to_bits(numbers)
    found = from_steps(*to_steps(scales)).astype(float)
    cost = np.mean((found / bfloat16.from_bits(scales) - 1) ** 2)
    assert cost == pytest.approx(0.000156, rel=0.05)


@pytest.mark.parametrize(
    ("key", "value", "offsets"),
    [
        # key scales, value codes, value scales, bases, end
        ((128, 4), (128, 2), (4096, 4160, 6208, 6272, 6288)),
        ((128, 3), (128, 3), (3072, 3136, 6208, 6272, 6288)),
        ((80, 3), (64, 1), (1920, 1984, 2496, 2560, 2576)),
        ((5, 3), (1, 1), (128, 192, 256, 320, 336)),
    ],
)
def test_offsets_in_the_page(key, value, offsets):
    codecs = (make_codec(CodecSpec("scalar", dim, bits)) for dim, bits in (key, value))
    layout = PageFormat(*codecs, "log8")
    got = (
        layout.key_scales_at,
        layout.value_codes_at,
        layout.value_scales_at,
        layout.bases_at,
        layout.page_bytes,
    )
    assert got == offsets
    assert all(at % 16 == 0 for at in got)
    assert layout.scales_bytes == 144


def test_all_in_bits_of_a_page():
    codec = make_codec(CodecSpec("scalar", 128, 3))
    assert PageFormat(codec, codec).bits_per_value == 3.125
    assert PageFormat(codec, codec, "log8").bits_per_value == 3 + 9 / 128
    with pytest.raises(ConfigError, match="scale_format='byte': allowed are bfloat16, log8"):
        PageFormat(codec, codec, "byte")


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize(("key", "value"), [((128, 4), (128, 2)), ((80, 3), (64, 5)), ((3, 3), (1, 1))])
def test_every_byte_is_where_it_is_drawn(key, value):
    codecs = [make_codec(CodecSpec("scalar", dim, bits)) for dim, bits in (key, value)]
    layout = PageFormat(*codecs, "log8")
    rng = np.random.default_rng(0)
    vectors = [
        rng.standard_normal((2, 3, PAGE_TOKENS, codec.spec.head_dim))
        * np.exp(rng.normal(size=(2, 3, PAGE_TOKENS, 1)))
        for codec in codecs
    ]
    plain = [codec.encode(part) for codec, part in zip(codecs, vectors, strict=True)]
    pages = CanonicalPages(*(with_scale_format(part, "log8") for part in plain))
    assert with_scale_format(plain[0], "bfloat16") is plain[0]
    raw = pages_to_bytes(pages, layout)
    page = raw[1, 2].tobytes()
    assert len(page) == layout.page_bytes
    for side, (part, codec, codes_at, scales_at) in enumerate(
        (
            (plain[0], codecs[0], 0, layout.key_scales_at),
            (plain[1], codecs[1], layout.value_codes_at, layout.value_scales_at),
        )
    ):
        largest = part.scales[1, 2].max()
        base_at = layout.bases_at + 2 * side
        assert int.from_bytes(page[base_at : base_at + 2], "little") == largest
        for token in (0, 1, 31, 63):
            row = codes_at + token * codec.row_bytes
            assert page[row : row + codec.row_bytes] == part.codes[1, 2, token].tobytes()
            ratio = bfloat16.from_bits(largest) / bfloat16.from_bits(part.scales[1, 2, token])
            assert page[scales_at + token] == round(16 * np.log2(ratio))
    assert page[layout.bases_at + 4 :] == bytes(12)
    for part, other in zip(pages, pages_from_bytes(raw, layout), strict=True):
        np.testing.assert_array_equal(part.codes, other.codes)
        np.testing.assert_array_equal(part.scales, other.scales)
        assert other.scales.dtype == np.uint8
    for part, codec, vector, bfloat in zip(pages, codecs, vectors, plain, strict=True):
        decoded, before = decode_part(part, codec), decode_part(bfloat, codec)
        np.testing.assert_array_equal(before, codec.decode(bfloat))
        # a scale may move by half a step, 2^(1/32)
        moved = np.linalg.norm(decoded - before, axis=-1) / np.linalg.norm(before, axis=-1)
        assert moved.max() < 2 ** (1 / 32) - 1 + 1e-6
        assert np.mean(moved**2) == pytest.approx(0.000156, rel=0.35)
        assert vector.shape == decoded.shape


def test_special_vectors_keep_their_meaning():
    codec = make_codec(CodecSpec("scalar", 16, 4))
    vectors = np.random.default_rng(0).standard_normal((PAGE_TOKENS, 16))
    vectors[3], vectors[5], vectors[7], vectors[9] = 0.0, np.nan, 3e37, 1e-30
    decoded = decode_part(with_scale_format(codec.encode(vectors), "log8"), codec)
    assert (decoded[3] == 0).all()
    assert np.isnan(decoded[5]).all()
    assert np.linalg.norm(decoded[7].astype(float)) == pytest.approx(3e37 * 4, rel=0.1)
    assert (decoded[9] == 0).all(), "nothing beside a vector 10^67 times its size"
