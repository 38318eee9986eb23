"""core.qjl_codec: real bits, unbiased, the residual of what is read back, special vectors."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai.core import bfloat16
from tqai.core.codec import CodecSpec, Encoded, make_codec
from tqai.core.packing import packed_bytes, unpack
from tqai.errors import ConfigError, InputError


def codec_of(dim=64, bits=2, sketch=32, **changes):
    return make_codec(CodecSpec("qjl", dim, bits, sketch=sketch, **changes))


def vectors_of(dim, count=50, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)) * 3.0


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize(("dim", "bits", "sketch"), [(128, 4, 64), (80, 3, 80), (48, 1, 100), (7, 2, 3)])
def test_row_is_codes_signs_and_norm(dim, bits, sketch):
    codec, x = codec_of(dim, bits, sketch), vectors_of(dim)
    codes, scales = codec.encode(x)
    scalar = make_codec(CodecSpec("scalar", dim, bits))
    plain = scalar.encode(x)
    signs_at, norm_at = packed_bytes(dim, bits), packed_bytes(dim, bits) + packed_bytes(sketch, 1)
    assert codes.shape == (50, norm_at + 2) and codec.row_bytes == norm_at + 2
    assert codec.bits_per_value == 8 * (norm_at + 4) / dim
    np.testing.assert_array_equal(codes[:, :signs_at], plain.codes)
    np.testing.assert_array_equal(scales, plain.scales)
    left_over = (x - scalar.decode(plain)) @ codec.rotation_matrix.T
    projected = left_over @ codec.sketch.matrix.T
    signs = unpack(codes[:, signs_at:norm_at], 1, sketch)
    clear = np.abs(projected) > 1e-5 * np.abs(projected).max()
    np.testing.assert_array_equal(signs[clear], (projected >= 0)[clear])
    norms = bfloat16.from_bits(np.ascontiguousarray(codes[:, norm_at:]).view("<u2")[:, 0])
    wanted = np.linalg.norm(left_over, axis=-1) / bfloat16.from_bits(scales)
    np.testing.assert_allclose(norms, wanted, rtol=2.0**-8)


@pytest.mark.parametrize(("bits", "sketch"), [(1, 16), (2, 64), (3, 100)])
def test_inner_products_are_unbiased_over_seeds(bits, sketch):
    dim, seeds = 64, 300
    x, y = vectors_of(dim, 2)
    y = x / 2 + y
    estimates = []
    for seed in range(seeds):
        codec = make_codec.__wrapped__(CodecSpec("qjl", dim, bits, sketch=sketch, seed=seed))
        estimates.append(codec.decode(codec.encode(x[None]))[0] @ y)
    error = np.std(estimates, ddof=1) / math.sqrt(seeds)
    assert abs(np.mean(estimates) - x @ y) < 4 * error
    scalar = make_codec(CodecSpec("scalar", dim, bits))
    assert abs(scalar.decode(scalar.encode(x[None]))[0] @ x - x @ x) > 4 * error / np.linalg.norm(y)


def test_a_sketch_as_long_as_the_vector_lowers_the_error_and_a_short_one_raises_it():
    x = vectors_of(128, 400)

    def error(codec):
        return np.mean((codec.decode(codec.encode(x)) - x) ** 2) / np.mean(x**2)

    plain = error(make_codec(CodecSpec("scalar", 128, 3)))
    assert error(codec_of(128, 3, 128)) == pytest.approx((math.pi / 2 - 1) * plain, rel=0.1)
    assert error(codec_of(128, 3, 32)) == pytest.approx((math.pi / 2 * 4 - 1) * plain, rel=0.1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 8), st.integers(1, 90), st.sampled_from([1e-30, 1.0, 1e30]))
def test_any_size_round_trips(dim, bits, sketch, size):
    codec, x = codec_of(dim, bits, sketch), vectors_of(dim, 5) * size
    encoded = codec.encode(x)
    assert encoded.codes.shape == (5, codec.row_bytes)
    again = codec.encode(x[3:4])
    np.testing.assert_array_equal(again.codes[0], encoded.codes[3])
    decoded, rotated = codec.decode(encoded), codec.decode_rotated(encoded)
    np.testing.assert_allclose(
        rotated @ codec.rotation_matrix, decoded, rtol=0, atol=2e-6 * np.abs(rotated).sum(-1).max()
    )


def test_special_vectors():
    codec = codec_of(64, 3, 40)
    x = vectors_of(64, 6).astype(np.float32)
    clean = codec.encode(x)
    x[0], x[1], x[2, 5], x[3], x[4, 0] = 0.0, 1e-40, np.nan, 3e37, np.inf
    codes, scales = codec.encode(x)
    assert scales[0] == scales[1] == 0
    assert not codes[[0, 1], codec.signs_at :].any() and not codes[[2, 4]].any()
    assert np.isnan(bfloat16.from_bits(scales[[2, 4]])).all()
    decoded = codec.decode(Encoded(codes, scales))
    assert not decoded[:2].any() and np.isfinite(decoded[[3, 5]]).all() and np.isnan(decoded[[2, 4]]).all()
    np.testing.assert_array_equal(codes[5], clean.codes[5])
    assert np.linalg.norm(decoded[3] / 3e37 - 1) / 8 < 0.5
    x[3] = 3.4e38  # its length is beyond bfloat16
    assert np.isfinite(codec.decode(codec.encode(x))[3]).all()


def test_float16_norm_beyond_its_range():
    """256 coordinates of 60000 have a norm of 960000, over float16's 65504, which must not matter."""
    x = np.full((1, 256), 60000.0, dtype=np.float16)
    codec = codec_of(256, 8, 64)
    decoded = codec.decode(codec.encode(x))
    assert np.linalg.norm(decoded - x.astype(np.float64)) < 0.02 * 960000


@pytest.mark.parametrize("sketch", [0, -1, 4097, True, 2.5])
def test_bad_sketch_sizes(sketch):
    with pytest.raises(ConfigError, match="sketch"):
        codec_of(sketch=sketch)


def test_wrong_rows_are_refused_and_copies_are_the_same_object():
    codec = codec_of()
    with pytest.raises(InputError, match=f"{codec.row_bytes}"):
        codec.decode(Encoded(np.zeros((2, 5), np.uint8), np.zeros(2, np.uint16)))
    resolved = make_codec(codec.spec)
    assert pickle.loads(pickle.dumps(codec)) is resolved is pickle.loads(pickle.dumps(resolved))
