"""Slices come back bit-exact and are what their picture says; levels in float16 and their PTX."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("triton")

from tqai.backends.triton.pairs import pair_instructions
from tqai.backends.triton.polynomial import half_levels, half_polynomial
from tqai.backends.triton.slices import SLICES, is_sliced, plain_side, sliced_side
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.packing import pack
from tqai.core.page import PageFormat

SIZES = [(4, 64), (4, 128), (4, 256), (3, 128), (2, 128), (2, 256)]


def formats(bits_k, bits_v, dim):
    return PageFormat(*(make_codec(CodecSpec("scalar", dim, bits)) for bits in (bits_k, bits_v)))


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(("bits", "dim"), SIZES)
def test_sides_come_back_bit_exact(bits, dim, values):
    codes = np.random.default_rng(bits).integers(0, 256, (2, 3, 64, dim * bits // 8), dtype=np.uint8)
    raw = sliced_side(codes, bits, dim, values)
    assert raw.shape == (2, 3, 64 * dim * bits // 8)
    np.testing.assert_array_equal(plain_side(raw, bits, dim, values), codes)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(("bits", "dim"), SIZES)
def test_a_code_lies_where_the_picture_says(bits, dim, values):
    token, coordinate = 37, dim - 9
    indices = np.zeros((64, dim), dtype=np.uint8)
    indices[token, coordinate] = code = 2**bits - 1
    raw = sliced_side(pack(indices, bits), bits, dim, values)
    slices = SLICES[bits]
    i, j = divmod(coordinate, dim // slices)
    at = j * 64 + token if values else token * (dim // slices) + j
    width = 4 if bits == 4 else 2
    wanted = np.zeros_like(raw)
    wanted[: 64 * dim * width // 8].view("<u2")[at] = (code & (2**width - 1)) << (width * i)
    if bits == 3:
        wanted[64 * dim * 2 // 8 + at] = 1 << i
    np.testing.assert_array_equal(raw, wanted)


def test_which_formats_cut():
    assert is_sliced(formats(4, 2, 128)) and is_sliced(formats(3, 3, 256)) and is_sliced(formats(4, 4, 64))
    for bits_k, bits_v, dim in ((4, 2, 64), (8, 4, 128), (4, 1, 128), (4, 4, 96), (4, 4, 32)):
        assert not is_sliced(formats(bits_k, bits_v, dim))


@pytest.mark.parametrize(("bits", "dim"), SIZES)
def test_half_polynomial_is_close_to_the_levels(bits, dim):
    codec = make_codec(CodecSpec("scalar", dim, bits))
    centroids = codec.tables()["centroids"].astype(np.float64)
    made = half_levels(half_polynomial(codec), bits) * centroids[-1]
    np.testing.assert_array_equal(made, -made[::-1])
    drawn = np.random.default_rng(0).standard_normal((20000, dim))
    unit = drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)
    share = np.bincount(np.searchsorted(codec.tables()["boundaries"], unit.ravel()), minlength=2**bits)
    error = np.sqrt(np.sum(share * (made - centroids) ** 2) / np.sum(share * centroids**2))
    assert error < 3e-4


def run_pair(text, words):
    """What the few kinds of instruction that `pairs` writes do, on uint32 arrays."""
    halves = dict(words)

    def value(name):
        return np.uint32(int(name, 16)) if name.startswith("0x") else halves.get(name)

    def as_halves(word):
        word = np.atleast_1d(np.asarray(word, dtype=np.uint32))
        return word.view("<f2").astype(np.float64).reshape(-1, 2)

    def as_word(pairs):
        return np.ascontiguousarray(pairs.astype("<f2")).view("<u4").reshape(-1)

    for line in re.sub(r"^\{ \.reg [^;]*;|\}$", "", text).split(";"):
        if not (line := line.strip()):
            continue
        name, rest = line.split(" ", 1)
        to, *given = (part.strip() for part in rest.split(","))
        a = value(given[0])
        if name == "mov.b32":
            halves[to] = a
        elif name == "shr.b32":
            halves[to] = a >> np.uint32(int(given[1]))
        elif name == "shl.b32":
            halves[to] = a << np.uint32(int(given[1]))
        elif name == "lop3.b32":
            assert given[3] == "0xea"  # (a & b) | c
            halves[to] = (a & value(given[1])) | value(given[2])
        elif name == "mul.rn.f16x2":
            halves[to] = as_word(as_halves(a) * as_halves(value(given[1])))
        elif name == "fma.rn.f16x2":
            halves[to] = as_word(as_halves(a) * as_halves(value(given[1])) + as_halves(value(given[2])))
        else:
            raise AssertionError(line)
    return as_halves(halves["$0"])


@pytest.mark.parametrize(("bits", "dim"), [(4, 128), (3, 128), (2, 256)])
def test_instructions_yield_the_levels(bits, dim):
    coefficients = half_polynomial(make_codec(CodecSpec("scalar", dim, bits)))
    levels = half_levels(coefficients, bits)
    slices = SLICES[bits]
    codes = np.random.default_rng(1).integers(0, 2**bits, (200, 2, slices)).astype(np.uint32)
    width = 4 if bits == 4 else 2
    shifts = np.arange(slices, dtype=np.uint32)
    low = np.bitwise_or.reduce((codes & (2**width - 1)) << (shifts * width), -1)
    top = np.bitwise_or.reduce((codes >> 2) << shifts, -1)
    words = {"$1": low[:, 0] | low[:, 1] << 16, "$2": top[:, 0] | top[:, 1] << 16}
    for i, text in enumerate(pair_instructions(coefficients, bits, slices)):
        np.testing.assert_array_equal(run_pair(text, words), levels[codes[:, :, i]])
