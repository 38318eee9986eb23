"""The codec in MLX operations against core: bytes exact, indices equal but for rounding at a boundary."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai.backends.mlx import codes as mlx_codes
from tqai.backends.mlx.codes import MlxCodec, mlx_codec, pack, unpack
from tqai.core import bfloat16
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.packing import pack as core_pack
from tqai.core.packing import unpack as core_unpack

# A float32 rotation moves a unit coordinate by less than this; only then may an index differ.
BOUNDARY_ROUNDING = 1e-6
# bfloat16 has 8 significant bits; a scale on a rounding tie may fall to either side.
SCALE_ULP = 2.0**-7
HEAD_DIMS = (64, 80, 96, 128, 256)
PAIRS = [(bits, dim) for bits in range(1, 9) for dim in HEAD_DIMS]


@settings(max_examples=60)
@given(data=st.data(), bits=st.integers(1, 8), count=st.integers(1, 130))
def test_packing_is_that_of_core(data, bits, count):
    seed = data.draw(st.integers(0, 2**32 - 1))
    indices = np.random.default_rng(seed).integers(0, 1 << bits, (3, count)).astype(np.uint8)
    packed = core_pack(indices, bits)
    np.testing.assert_array_equal(np.array(pack(mx.array(indices), bits)), packed)
    np.testing.assert_array_equal(np.array(unpack(mx.array(packed), bits, count)), indices)


@pytest.mark.parametrize(("bits", "dim"), PAIRS)
def test_codes_equal_core(normal, bits, dim):
    codec = make_codec(CodecSpec("scalar", dim, bits))
    vectors = 3.0 * normal(bits * 1000 + dim, 2, 65, dim)
    wanted = codec.encode(vectors)
    codes, scales = mlx_codec(codec).encode(mx.array(vectors))
    found_indices = core_unpack(np.array(codes), bits, dim).astype(int)
    wanted_indices = core_unpack(wanted.codes, bits, dim).astype(int)
    rotated = vectors.astype(float) @ codec.rotation_matrix.T
    unit = rotated / np.linalg.norm(rotated, axis=-1, keepdims=True)
    differs = found_indices != wanted_indices
    assert differs.mean() < 1e-3
    distances = np.abs(unit[differs][:, None] - codec.tables()["boundaries"].astype(float)).min(-1)
    assert (distances < BOUNDARY_ROUNDING).all()
    found_scales = bfloat16.from_bits(np.array(scales.view(mx.uint16)))
    wanted_scales = bfloat16.from_bits(wanted.scales)
    np.testing.assert_allclose(found_scales, wanted_scales, rtol=SCALE_ULP, atol=0)
    assert (found_scales == wanted_scales).mean() > 0.97


@pytest.mark.parametrize(("bits", "dim"), PAIRS)
def test_any_codes_decode_as_in_core(bits, dim):
    """Any bytes at all, not only those that the encoder makes: centroids to the last bit."""
    codec = make_codec(CodecSpec("scalar", dim, bits))
    rng = np.random.default_rng(dim + bits)
    codes = core_pack(rng.integers(0, 1 << bits, (7, dim)).astype(np.uint8), bits)
    scales = bfloat16.to_bits(np.exp(rng.standard_normal(7)))
    form = mlx_codec(codec)
    indices = core_unpack(codes, bits, dim)
    np.testing.assert_array_equal(
        np.array(form.lookup(mx.array(codes))), codec.tables()["centroids"][indices]
    )
    decoded = np.array(form.decode(mx.array(codes), mx.array(scales).view(mx.bfloat16), mx.float32))
    wanted = codec.decode(codec.encode(np.zeros((0, dim)))._replace(codes=codes, scales=scales))
    error = np.linalg.norm(decoded - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert error.max() < 2e-6


@pytest.mark.parametrize("rotation", ["haar", "hadamard", "hadamard2", "identity"])
def test_rotation_is_that_of_core(normal, rotation):
    codec = make_codec(CodecSpec("scalar", 128, 4, rotation, seed=5))
    form, rows = mlx_codec(codec), normal(1, 9, 128)
    matrix = codec.rotation_matrix
    np.testing.assert_allclose(np.array(form.rotate(mx.array(rows))), rows @ matrix.T, atol=3e-6)
    np.testing.assert_allclose(np.array(form.unrotate(mx.array(rows))), rows @ matrix, atol=3e-6)


@pytest.mark.parametrize("rule", ["least_squares", "norm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_special_vectors(normal, rule, dtype):
    """Zero, subnormal, huge, NaN, inf and constant vectors: as core has them, without touching neighbours."""
    codec = make_codec(CodecSpec("scalar", 128, 4, scale=rule))
    clean = normal(3, 8, 128)
    vectors = clean.copy()
    largest = {"float32": 3e38, "bfloat16": 3e38, "float16": 65504.0}[dtype]
    vectors[0], vectors[1], vectors[2], vectors[3, 1], vectors[4, 2] = 0.0, 1e-40, largest, np.nan, np.inf
    vectors[5, 7] = largest / 2
    given = mx.array(vectors).astype(getattr(mx, dtype))
    as_given = np.array(given.astype(mx.float32))
    wanted = codec.encode(as_given)
    codes, scales = mlx_codec(codec).encode(given)
    found_scales = bfloat16.from_bits(np.array(scales.view(mx.uint16)))
    np.testing.assert_allclose(found_scales, bfloat16.from_bits(wanted.scales), rtol=SCALE_ULP, atol=0)
    np.testing.assert_array_equal(np.array(codes)[[0, 1, 3, 4]], wanted.codes[[0, 1, 3, 4]])
    alone, alone_scales = mlx_codec(codec).encode(mx.array(clean).astype(getattr(mx, dtype)))
    np.testing.assert_array_equal(np.array(codes)[6:], np.array(alone)[6:])
    np.testing.assert_array_equal(
        np.array(scales.view(mx.uint16))[6:], np.array(alone_scales.view(mx.uint16))[6:]
    )
    decoded = np.array(mlx_codec(codec).decode(codes, scales, mx.float16))
    assert np.isnan(decoded[[3, 4]]).all()
    assert np.isfinite(decoded[[0, 1, 2, 5, 6, 7]]).all()
    assert (decoded[[0, 1]] == 0).all()


def test_scales_beyond_bfloat16_are_its_largest_number():
    codec = make_codec(CodecSpec("scalar", 64, 2, scale="norm"))
    _, scales = mlx_codec(codec).encode(mx.full((1, 64), 3.4e38))
    assert int(scales.view(mx.uint16)[0]) == 0x7F7F


def test_coordinate_on_a_boundary_belongs_to_the_upper_cell():
    form = mlx_codec(make_codec(CodecSpec("scalar", 64, 4)))
    for bits in (4, 6):
        form = mlx_codec(make_codec(CodecSpec("scalar", 64, bits)))
        cells = np.array(form._cells(form.boundaries))
        np.testing.assert_array_equal(cells, np.arange(1, 1 << bits))


def test_distortion_is_that_of_an_independent_implementation(normal):
    """4 bits at head_dim 128: mlx-vlm's codec gives an NMSE of 0.00893 (with the norm as scale)."""
    form = mlx_codec(make_codec(CodecSpec("scalar", 128, 4, scale="norm")))
    vectors = mx.array(normal(11, 4096, 128))
    error = form.decode(*form.encode(vectors), mx.float32) - vectors
    nmse = float((error * error).sum() / (vectors * vectors).sum())
    assert nmse == pytest.approx(0.00893, rel=0.06)


def test_compiled_functions_give_the_same_codes(monkeypatch, normal):
    """What runs on a GPU is compiled; here the compiled form runs on the CPU."""
    codec = make_codec(CodecSpec("scalar", 64, 1, scale="norm"))
    monkeypatch.setattr(mlx_codes, "compiled", mx.compile)
    vectors = mx.array(normal(5, 70, 64))
    plain = mlx_codec(codec)
    codes, scales = MlxCodec(codec).encode(vectors)
    np.testing.assert_array_equal(
        np.array(codes), np.array(pack(plain.quantize(*plain.rotated_rows(vectors))[0], 1))
    )
    assert mx.array_equal(scales, plain.encode(vectors)[1])


def test_codec_without_a_form_is_refused():
    from tqai.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match=r"qjl.*allowed are scalar"):
        mlx_codec(make_codec(CodecSpec("qjl", 64, 3, sketch=64)))
