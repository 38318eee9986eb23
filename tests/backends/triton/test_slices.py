"""Slices come back bit-exact and are what their picture says; levels in float16 and their PTX."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("triton")

from tqai.backends.triton.pairs import four_instructions, pair_instructions
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


def run_ptx(text, words):
    """What the few kinds of instruction that `pairs` writes do, on uint32 arrays; what ends in `$`s."""
    held = dict(words)

    def value(name):
        return held[name] if name in held else np.uint32(int(name, 0))

    def as_halves(word):
        word = np.atleast_1d(np.asarray(word, dtype=np.uint32))
        return word.view("<f2").astype(np.float64).reshape(-1, 2)

    def as_word(pairs):
        return np.ascontiguousarray(pairs.astype("<f2")).view("<u4").reshape(-1)

    def permuted(a, b, selector):
        a, b, selector = np.broadcast_arrays(*(np.atleast_1d(np.uint64(x)) for x in (a, b, selector)))
        both, out = a | b << np.uint64(32), np.zeros(a.shape, dtype=np.uint64)
        for k in range(4):
            index = selector >> np.uint64(4 * k) & np.uint64(15)
            assert (index < 8).all()
            out |= (both >> index * np.uint64(8) & np.uint64(255)) << np.uint64(8 * k)
        return out.astype(np.uint32)

    for line in re.sub(r"^\{ \.reg [^;]*;|\}$", "", text).split(";"):
        if not (line := line.strip()):
            continue
        name, rest = line.split(" ", 1)
        to, *given = (part.strip() for part in rest.split(","))
        a, *more = (value(part) for part in given)
        if name == "mov.b32":
            held[to] = a
        elif name == "not.b32":
            held[to] = ~a
        elif name in ("and.b32", "xor.b32", "sub.u32"):
            held[to] = {"and": a & more[0], "xor": a ^ more[0], "sub": a - more[0]}[name[:3]]
        elif name == "shr.b32":
            held[to] = a >> more[0]
        elif name == "shl.b32":
            held[to] = a << more[0]
        elif name == "prmt.b32":
            held[to] = permuted(a, *more)
        elif name == "lop3.b32":
            held[to] = {0xEA: (a & more[0]) | more[1], 0x6A: (a & more[0]) ^ more[1]}[int(more[2])]
        elif name == "mul.rn.f16x2":
            held[to] = as_word(as_halves(a) * as_halves(more[0]))
        elif name == "fma.rn.f16x2":
            held[to] = as_word(as_halves(a) * as_halves(more[0]) + as_halves(more[1]))
        else:
            raise AssertionError(line)
    return {to: as_halves(word) for to, word in held.items() if to.startswith("$")}


def drawn_words(bits, count):
    """Codes `[200, count, slices]` and their words, low and top, `[200, count]`."""
    slices = SLICES[bits]
    codes = np.random.default_rng(1).integers(0, 2**bits, (200, count, slices)).astype(np.uint32)
    width = 4 if bits == 4 else 2
    shifts = np.arange(slices, dtype=np.uint32)
    low = np.bitwise_or.reduce((codes & (2**width - 1)) << (shifts * width), -1)
    return codes, low, np.bitwise_or.reduce((codes >> 2) << shifts, -1)


@pytest.mark.parametrize(("bits", "dim"), [(3, 128), (2, 128), (2, 256)])
def test_instructions_yield_the_levels(bits, dim):
    coefficients = half_polynomial(make_codec(CodecSpec("scalar", dim, bits)))
    levels = half_levels(coefficients, bits)
    codes, low, top = drawn_words(bits, 2)
    words = {"$1": low[:, 0] | low[:, 1] << 16, "$2": top[:, 0] | top[:, 1] << 16}
    for i, text in enumerate(pair_instructions(coefficients, bits, SLICES[bits])):
        np.testing.assert_array_equal(run_ptx(text, words)["$0"], levels[codes[:, :, i]])


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_four_words_at_once_yield_the_levels(dim):
    coefficients = half_polynomial(make_codec(CodecSpec("scalar", dim, 4)))
    levels = half_levels(coefficients, 4)
    codes, low, _ = drawn_words(4, 4)
    found = run_ptx(
        four_instructions(coefficients),
        {"$8": low[:, 0] | low[:, 1] << 16, "$9": low[:, 2] | low[:, 3] << 16},
    )
    for i in range(4):
        np.testing.assert_array_equal(found[f"${2 * i}"], levels[codes[:, :2, i]])
        np.testing.assert_array_equal(found[f"${2 * i + 1}"], levels[codes[:, 2:, i]])
