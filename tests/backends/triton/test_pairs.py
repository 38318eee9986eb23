"""The PTX that looks levels up, run by a few lines of numpy."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("triton")

from tqai.backends.triton.pairs import SLICE_PAIRS, UNIT, pair_instructions
from tqai.backends.triton.slices import SLICES, sliced_side
from tqai.backends.triton.whole_levels import whole_levels
from tqai.core.codebook import codebook
from tqai.core.packing import pack

OPERATIONS = {"and": np.bitwise_and, "xor": np.bitwise_xor, "sub": np.subtract, "add": np.add}


def run_ptx(text, words):
    """What the few kinds of instruction that `pairs` writes do, on uint32 arrays; what ends in `$`s."""
    held = {"%lanemask_le": np.uint32(0xFF), "%lanemask_gt": np.uint32(0xFFFFFF00), **words}

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
            nibble = selector >> np.uint64(4 * k) & np.uint64(15)
            byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            signs = np.where(byte >= 128, np.uint64(255), np.uint64(0))
            out |= np.where(nibble < 8, byte, signs) << np.uint64(8 * k)
        return out.astype(np.uint32)

    for line in re.sub(r"^\{ \.reg [^;]*;|\}$", "", text).split(";"):
        if not (line := line.strip()):
            continue
        name, rest = line.split(" ", 1)
        to, *given = (part.strip() for part in rest.split(","))
        a, *more = (value(part) for part in given)
        if name in ("mov.b32", "mov.u32"):
            held[to] = a
        elif name in ("and.b32", "xor.b32", "sub.u32", "add.u32"):
            held[to] = OPERATIONS[name[:3]](a, more[0])
        elif name == "shr.b32":
            held[to] = a >> more[0]
        elif name == "shl.b32":
            held[to] = a << more[0]
        elif name == "prmt.b32":
            held[to] = permuted(a, *more)
        elif name == "lop3.b32":
            assert more[2] == 0xEA
            held[to] = (a & more[0]) | more[1]
        elif name == "add.rn.f16x2":
            held[to] = as_word(as_halves(a) + as_halves(more[0]))
        else:
            raise AssertionError(line)
    return {to: as_halves(word) for to, word in held.items() if to.startswith("$")}


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(("bits", "dim"), [(4, 64), (4, 128), (3, 128), (2, 128), (2, 256)])
def test_instructions_yield_the_levels(bits, dim, values):
    levels = whole_levels(codebook(dim, bits).centroids.astype(np.float32))
    codes = np.random.default_rng(bits).integers(0, 2**bits, (64, dim), dtype=np.uint8)
    raw = sliced_side(pack(codes, bits), bits, dim, values)
    width = 4 if bits == 4 else 2
    low, top = np.split(raw, [64 * dim * width // 8])
    words = {"$2": low.view("<u4")}
    if bits == 3:
        words["$3"] = top[0::2].astype(np.uint32) | top[1::2].astype(np.uint32) << 16
    by_slice = np.array(levels.whole)[codes].reshape(64, SLICES[bits], -1)
    wanted = by_slice.transpose(1, 2, 0) if values else by_slice.transpose(1, 0, 2)
    for slices, text in zip(SLICE_PAIRS[bits], pair_instructions(levels, bits), strict=True):
        found = run_ptx(text, words)
        for name, number in zip(("$0", "$1"), slices, strict=True):
            np.testing.assert_array_equal(found[name].reshape(-1) * UNIT, wanted[number].reshape(-1))


def test_every_slice_is_in_one_pair():
    for bits, pairs in SLICE_PAIRS.items():
        assert sorted(number for pair in pairs for number in pair) == list(range(SLICES[bits]))
