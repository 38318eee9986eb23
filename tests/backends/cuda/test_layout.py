"""Fragment order: bit-exact both ways, and what the kernels unpack from it is the right level."""

from __future__ import annotations

import numpy as np
import pytest

from tqai.backends.cuda import layout
from tqai.backends.cuda.levels import integer_levels
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.packing import pack
from tqai.core.page import PageFormat, pages_from_bytes, pages_to_bytes

DIMS = (64, 80, 96, 128, 256)


@pytest.mark.parametrize("bits_v", layout.WIDTHS)
@pytest.mark.parametrize("bits_k", layout.WIDTHS)
def test_pages_come_back_bit_exact(bits_k, bits_v):
    rng = np.random.default_rng(bits_k * 10 + bits_v)
    for dim in DIMS:
        page_format = PageFormat(
            make_codec(CodecSpec("scalar", dim, bits_k)), make_codec(CodecSpec("scalar", dim, bits_v))
        )
        raw = rng.integers(0, 256, (2, 3, page_format.page_bytes), dtype=np.uint8)
        fragment = layout.fragment_pages(pages_from_bytes(raw, page_format), page_format)
        assert fragment.shape == raw.shape
        assert (fragment != raw).any()
        for at in (page_format.key_scales_at, page_format.value_scales_at):
            np.testing.assert_array_equal(fragment[..., at : at + 128], raw[..., at : at + 128])
        back = pages_to_bytes(layout.plain_pages(fragment, page_format), page_format)
        np.testing.assert_array_equal(back, raw)


def permute(low, high, selector):
    """prmt.b32 in its default mode, for arrays of selectors: with the sign of the byte where bit 3 is set."""
    table = np.array([(low | high << 32) >> (8 * k) & 0xFF for k in range(8)], dtype=np.uint64)
    nibbles = selector[..., None] >> np.arange(0, 16, 4) & 15
    chosen = table[nibbles & 7]
    signs = np.where(chosen & 0x80, 0xFF, 0)
    return np.where(nibbles & 8, signs, chosen).astype(np.uint8).view(np.int8).astype(np.int64)


def unpacked(words, bits, tables, lookup):
    """As `unpack_unit` in unpack.cuh: `[..., register, 4]` of tables a and b."""
    w = [words[..., j].astype(np.int64) for j in range(bits)]
    if bits == 8:
        codes = np.stack([word[..., None] >> np.arange(0, 32, 8) & 255 for word in w], axis=-2)
        entry = lookup[codes]
        return tuple((entry >> s & 255).astype(np.uint8).view(np.int8).astype(np.int64) for s in (0, 8))
    flipped = 0
    if bits == 4:
        selectors, flipped = w, 0x88888888
    elif bits == 3:
        rest = w[0] >> 3 & 0x11111111 | w[1] >> 2 & 0x22222222 | w[2] >> 1 & 0x44444444
        selectors = [*(word & 0x77777777 for word in w), rest]
    elif bits == 2:
        selectors = [word >> shift & 0x33333333 for word in w for shift in (0, 2)]
    else:
        selectors = [w[0] >> shift & 0x11111111 for shift in range(4)]
    halves = [s >> shift for s in selectors for shift in (0, 16)]
    a = np.stack([permute(tables[0], tables[1], half) for half in halves], axis=-2)
    b = np.stack([permute(tables[2], tables[3], half ^ flipped & 0xFFFF) for half in halves], axis=-2)
    return a, b if bits == 4 else 0 * a


def words_of(fragment, bits, dim):
    """32-bit words `[unit, lane, bits]` by the byte planes that the kernel loads."""
    unit = fragment.reshape(dim // 16, -1)
    at = 0
    parts = []
    for width in {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (4, 4)}[bits]:
        size = 32 * width * 4
        parts.append(np.ascontiguousarray(unit[:, at : at + size]).view("<u4").reshape(dim // 16, 32, width))
        at += size
    return np.concatenate(parts, axis=-1)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("bits", layout.WIDTHS)
@pytest.mark.parametrize("dim", DIMS)
def test_kernels_unpack_the_level_of_each_code(dim, bits, values):
    codec = make_codec(CodecSpec("scalar", dim, bits))
    levels = integer_levels(codec)
    codes = np.random.default_rng(1).integers(0, 2**bits, (64, dim))
    fragment = layout.fragment_codes(pack(codes, bits), bits, dim, values)
    tables = levels.permute_tables() if bits < 8 else None
    lookup = levels.lookup().astype(np.int64) if bits == 8 else None
    a, b = unpacked(words_of(fragment, bits, dim), bits, tables, lookup)
    made = (a + b * levels.coef_b) * levels.unit
    lane, register, i = np.indices((32, 8, 4))
    g, c = lane // 4, lane % 4
    for unit in range(dim // 16):
        if values:
            token, d = 8 * (c + 4 * (register // 4)) + 4 * (register % 4 // 2) + i, g + 8 * (register % 2)
        else:
            token, d = 8 * g + register, 4 * c + i
        np.testing.assert_allclose(made[unit], levels.values[codes[token, 16 * unit + d]], rtol=0, atol=1e-12)
