"""Trellis codes in MLX operations against core: decoded to the bit, encoded as well."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tqai.backends.mlx.codes import mlx_codec
from tqai.core import bfloat16
from tqai.core.codec import CodecSpec, Encoded, make_codec
from tqai.core.page import PageFormat

SPECS = [
    *(("trellis", bits, dim) for bits, dim in ((1, 64), (2, 128), (3, 80), (3, 128), (3, 256), (4, 96))),
    ("trellis256", 2, 64),
    ("trellis256", 4, 128),
]


@pytest.mark.parametrize(("name", "bits", "dim"), SPECS)
def test_any_codes_look_up_what_core_has(name, bits, dim):
    codec = make_codec(CodecSpec(name, dim, bits))
    rows = np.random.default_rng(bits * dim).integers(0, 256, (3, 65, codec.row_bytes), dtype=np.uint8)
    ones = np.full(rows.shape[:-1], bfloat16.to_bits(np.float64(1.0)), dtype=np.uint16)
    found = np.array(mlx_codec(codec).lookup(mx.array(rows)))
    np.testing.assert_array_equal(found, codec.decode_rotated(Encoded(rows, ones)))
    scales = mx.array(np.random.default_rng(0).uniform(0.1, 9, (3, 65)).astype(np.float32)).astype(
        mx.bfloat16
    )
    wanted = codec.decode(Encoded(rows, np.array(scales.view(mx.uint16))))
    np.testing.assert_allclose(
        np.array(mlx_codec(codec).decode(mx.array(rows), scales, mx.float32)),
        wanted,
        atol=3e-6 * float(np.abs(wanted).max()),
    )


@pytest.mark.parametrize(("name", "bits", "dim"), SPECS)
def test_codes_are_as_good_as_those_of_core(normal, name, bits, dim):
    codec = make_codec(CodecSpec(name, dim, bits, seed=3))
    vectors = 3.0 * normal(bits + dim, 2, 33, dim)
    codes, scales = mlx_codec(codec).encode(mx.array(vectors))
    assert codes.shape == (2, 33, codec.row_bytes) and codes.dtype == mx.uint8
    wanted = codec.encode(vectors)
    errors = [
        np.square(codec.decode(encoded) - vectors).sum() / np.square(vectors).sum()
        for encoded in (Encoded(np.array(codes), np.array(scales.view(mx.uint16))), wanted)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    # float32 here and there: hardly a path differs
    assert (np.array(codes) != wanted.codes).mean() < 0.01


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_vectors_without_a_direction(normal, dtype):
    codec = make_codec(CodecSpec("trellis", 64, 3))
    vectors = normal(1, 1, 6, 64)
    vectors[0, 0] = 0.0
    vectors[0, 1, 5] = np.nan
    vectors[0, 2, 7] = -np.inf
    vectors[0, 3] *= 1e30
    vectors[0, 4] *= 1e-30
    codes, scales = (np.array(part) for part in _encoded(codec, vectors, dtype))
    wanted = codec.encode(np.array(mx.array(vectors).astype(dtype).astype(mx.float32)))
    assert scales[0, 0] == 0 and (scales[0, 1:3] == 0x7FC0).all() and not codes[0, :3].any()
    decoded, right = codec.decode(Encoded(codes, scales))[0, 3:], codec.decode(wanted)[0, 3:]
    assert (np.abs(decoded - right).max(-1) < 0.02 * np.abs(right).max(-1)).all()


def _encoded(codec, vectors, dtype):
    codes, scales = mlx_codec(codec).encode(mx.array(vectors).astype(dtype))
    return codes, scales.view(mx.uint16)


def test_metal_kernels_leave_trellis_codes_alone():
    from tqai.backends.mlx.metal.launch import _fits

    scalar, trellis = (make_codec(CodecSpec(name, 64, 3)) for name in ("scalar", "trellis"))
    assert _fits(PageFormat(scalar, scalar), 1)
    assert not _fits(PageFormat(trellis, trellis), 1)
    assert not _fits(PageFormat(scalar, trellis), 1)
