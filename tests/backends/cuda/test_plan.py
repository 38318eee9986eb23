"""What is computed before a launch: shapes, shared memory, divisions, the quantizer's table."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tqai.backends.cuda.plan import (
    Shape,
    attention_shared_bytes,
    block_count,
    choose_shape,
    codec_macros,
    division,
    quantizer_cells,
    refuse_format,
    rotation_plan,
    split_count,
)
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat

H200_SHARED_BYTES = 232448
A10_SHARED_BYTES = 101376


def page_format(dim=128, bits_k=4, bits_v=4, value_dim=None, **spec):
    return PageFormat(
        make_codec(CodecSpec("scalar", dim, bits_k, **spec)),
        make_codec(CodecSpec("scalar", value_dim or dim, bits_v, **spec)),
    )


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 64, 65, 516, 4097, 2**20 + 1, 2**24 - 1])
def test_division_by_a_known_divisor(divisor):
    factor, shift = division(divisor)
    assert 0 <= factor < 2**32
    draw = random.Random(divisor)
    for n in [
        0,
        1,
        divisor - 1,
        divisor,
        2 * divisor - 1,
        2**31 - 1,
        *(draw.randrange(2**31) for _ in range(500)),
    ]:
        assert ((n * factor >> 32) + n & 0xFFFFFFFF) >> shift == n // divisor


@pytest.mark.parametrize(
    ("multiprocessors", "segments", "items", "blocks"),
    [
        (132, 8, 512, 128),  # whole multiples of the segments
        (132, 64, 2048, 128),
        (132, 100, 2048, 132),  # a third of the machine would idle: cut anywhere
        (132, 100, 10, 100),
        (132, 1, 3, 3),  # never more blocks than items
        (132, 4096, 1, 132),
        (200, 8, 5000, 160),  # never more than a merge can hold
    ],
)
def test_block_count(multiprocessors, segments, items, blocks):
    assert block_count(multiprocessors, segments, items) == blocks


def test_shapes_fit_into_shared_memory():
    assert choose_shape(page_format(), H200_SHARED_BYTES, 8) == Shape(12, 2)
    assert choose_shape(page_format(), H200_SHARED_BYTES, 8, one_buffer=True) == Shape(12, 1)
    for limit in (A10_SHARED_BYTES, H200_SHARED_BYTES):
        for dim in (64, 80, 96, 128, 256):
            for bits in (1, 2, 3, 4):
                shape = choose_shape(page_format(dim, bits, bits), limit, 64)
                assert shape is not None
                assert attention_shared_bytes(page_format(dim, bits, bits), shape, 64) <= limit
    assert choose_shape(page_format(256, 8, 8), A10_SHARED_BYTES, 1) == Shape(1, 1)
    assert choose_shape(page_format(256, 8, 8), A10_SHARED_BYTES // 2, 1) is None


def test_keys_and_values_of_the_same_levels_share_a_table():
    alike, different = page_format(128, 8, 8), page_format(128, 8, 8, 112, rotation="haar")
    assert codec_macros(alike, "bfloat16")["ONE_LUT"] == 1
    assert codec_macros(different, "bfloat16")["ONE_LUT"] == 0
    assert codec_macros(page_format(128, 8, 4), "bfloat16")["ONE_LUT"] == 0
    shape = Shape(1, 1)
    sizes = [attention_shared_bytes(f, shape, 1) - f.page_bytes for f in (alike, different)]
    assert sizes[1] - sizes[0] > 30000


def test_refusals_say_why():
    assert refuse_format(page_format()) is None
    assert "5 bits" in refuse_format(page_format(bits_k=5))
    assert "head_dim 72" in refuse_format(page_format(72))
    assert "head_dim 512" in refuse_format(page_format(512))
    assert "Hadamard" in refuse_format(page_format(16))
    assert "narrower" in refuse_format(page_format(16, 1, 1, 256, rotation="haar"))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_quantizer_table_counts_boundaries(dim, bits):
    codec = make_codec(CodecSpec("scalar", dim, bits))
    boundaries = codec.tables()["boundaries"]
    cells, scale = quantizer_cells(codec)
    positive = boundaries[boundaries > 0]
    near = np.concatenate(
        [np.nextafter(positive, np.float32(0)), positive, np.nextafter(positive, np.float32(9))]
    )
    rng = np.random.default_rng(0)
    tries = np.concatenate([near, np.abs(rng.standard_normal(5000) / np.sqrt(dim)), [0.0, 1.0]]).astype(
        np.float32
    )
    # as the kernel does it: |y| * (scale / norm) in float32, rounded either way
    for wobble in (1.0 - 2.0**-23, 1.0, 1.0 + 2.0**-23):
        bucket = np.minimum((tries * np.float32(scale) * np.float32(wobble)).astype(np.int64), len(cells) - 1)
        above = tries >= cells[bucket, 0]
        counted = cells[bucket, 1].view(np.int32) + above
        np.testing.assert_array_equal(counted, np.searchsorted(positive, tries, side="right"))


@pytest.mark.parametrize(("dim", "rotation"), [(128, "hadamard"), (128, "hadamard2"), (80, "haar")])
def test_rotation_plan_is_the_rotation(dim, rotation):
    codec = make_codec(CodecSpec("scalar", dim, 4, rotation=rotation, seed=3))
    plan = rotation_plan(codec).astype(np.float64)
    x = np.random.default_rng(0).standard_normal(dim)
    if rotation == "haar":
        got, back = x @ plan[0], x @ plan[0] @ plan[1]
    else:
        bits = np.arange(dim)
        hadamard = (
            1.0 - 2.0 * (np.bitwise_count(bits[:, None] & bits) & 1)
            if hasattr(np, "bitwise_count")
            else (np.array([[1 - 2 * (bin(i & j).count("1") & 1) for j in range(dim)] for i in range(dim)]))
        )
        got = x
        for signs in plan:
            got = hadamard @ (got * signs)
        back = got
        for signs in plan[::-1]:
            back = (hadamard @ back) * signs
    np.testing.assert_allclose(got, x @ codec.rotation_matrix.T, atol=2e-6)
    np.testing.assert_allclose(back, x, atol=2e-6)


@pytest.mark.parametrize(
    ("multiprocessors", "segments", "items", "splits"),
    [
        (132, 8, 513, 16),
        (132, 64, 2049, 2),
        (132, 8, 65, 6),
        (132, 1, 12, 1),
        (132, 1, 0, 1),
        (132, 132, 9, 1),
        (132, 133, 9, None),
        # 3 of each leave 12 of 132 idle: too many where there is much to do
        (132, 40, 2049, None),
        (132, 40, 64, 3),
    ],
)
def test_split_count(multiprocessors, segments, items, splits):
    assert split_count(multiprocessors, segments, items) == splits
