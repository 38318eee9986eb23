"""Trellis codes in C: one result on every instruction set, as good as core's, and attention on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai.backends.base import ExactTokens
from tqai.backends.native.trellis import (
    byte_maps,
    from_row_codes,
    nibble_maps,
    nibbles_of,
    place_bits,
    place_maps,
    to_row_codes,
)
from tqai.cache.layer import page_format_for
from tqai.config import CacheConfig
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.packing import unpack
from tqai.core.trellis import windows_of
from tqai.core.trellis_code import trellis_code

DIMS = (64, 80, 128, 256)
TOLERANCE = 2e-3


def format_of(name, bits_k, bits_v, key_dim, value_dim=None, **changes):
    config = CacheConfig(codec=name, bits_k=bits_k, bits_v=bits_v, **changes)
    return page_format_for(config, key_dim, value_dim or key_dim)


def special_rows(dim):
    """64 tokens of one head: ordinary, zero, huge, tiny, subnormal, NaN, inf, one spike, constant."""
    rows = torch.randn(64, dim, generator=torch.Generator().manual_seed(dim))
    rows[1] = 0.0
    rows[2] *= 1e37
    rows[3] = 3.4e38
    rows[4] *= 1e-30
    rows[5] = 1e-40
    rows[6, 0] = torch.nan
    rows[7, dim - 1] = torch.inf
    rows[8] = 0.0
    rows[8, 3] = -7.0
    rows[10] = 1.0
    return rows


def pages_of(backend, page_format, rows):
    out = torch.empty(1, 1, page_format.page_bytes, dtype=torch.uint8).fill_(0xFF)
    keys = rows[None, None, :, : page_format.key.spec.head_dim]
    values = rows[None, None, :, : page_format.value.spec.head_dim]
    backend.encode(keys, values, page_format, out)
    return out


@pytest.mark.parametrize("name", ["trellis", "trellis256"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", DIMS)
def test_every_instruction_set_codes_alike(native, isas, name, bits, dim):
    if name == "trellis256" and dim > 80:
        dim = 16 if bits % 2 else 32
    page_format = format_of(name, bits, 5 - bits, dim, scale="norm" if bits == 2 else "least_squares")
    rows = special_rows(dim)
    first = decoded = None
    for isa in isas:
        native.use_isa(isa)
        raw = pages_of(native, page_format, rows)
        numbers = torch.cat(list(native.decode(raw, page_format, torch.float16)), -1)
        if first is None:
            first, decoded = raw, numbers
        assert torch.equal(raw, first), isa
        assert torch.equal(numbers.view(torch.int16), decoded.view(torch.int16)), isa


def distortion(codec, encoded, rows):
    """Relative squared error of every row with its best scale."""
    spec = codec.spec
    windows = windows_of(unpack(encoded.codes, spec.bits, spec.head_dim), spec.bits, codec.code.window_bits)
    chosen = codec.tables()["windows"].astype(float)[windows]
    rotated = rows.double().numpy() @ codec.rotation_matrix.T
    along = (rotated * chosen).sum(-1) ** 2 / (chosen**2).sum(-1)
    return 1.0 - along / (rotated**2).sum(-1)


@pytest.mark.parametrize(
    ("name", "bits", "count"), [("trellis", b, 4) for b in (1, 2, 3, 4)] + [("trellis256", 2, 2)]
)
def test_paths_are_as_cheap_as_those_of_core(native, name, bits, count):
    """Sixteen-bit sums lose less than a thousandth of the error."""
    page_format = format_of(name, bits, bits, 128)
    rows = torch.randn(count, 1, 64, 128, generator=torch.Generator().manual_seed(bits))
    out = torch.empty(count, 1, page_format.page_bytes, dtype=torch.uint8)
    native.encode(rows, rows, page_format, out)
    pages = native.to_canonical(out, page_format)
    codec = page_format.key
    wanted = distortion(codec, codec.encode(rows.numpy()), rows).mean()
    assert distortion(codec, pages.key, rows).mean() == pytest.approx(wanted, rel=1e-3)
    np.testing.assert_array_equal(pages.key.codes, pages.value.codes)


@pytest.mark.parametrize(
    ("name", "bits_k", "bits_v", "key_dim", "value_dim"),
    [
        ("trellis", 3, 3, 128, 128),
        ("trellis", 4, 2, 64, 80),
        ("trellis", 2, 4, 96, 160),
        ("trellis", 1, 1, 16, 32),
        ("trellis", 4, 3, 256, 64),
        ("trellis256", 3, 3, 80, 64),
        ("trellis256", 4, 1, 64, 16),
        ("trellis", 2, 3, 32, 80),
        ("trellis256", 1, 3, 16, 16),
        ("trellis256", 2, 1, 256, 80),
    ],
)
def test_attention(each_isa, name, bits_k, bits_v, key_dim, value_dim, history, attention64):
    page_format = format_of(name, bits_k, bits_v, key_dim, value_dim)
    pages, keys, values = history(page_format, 1, 1, 10)
    recent = ExactTokens(torch.randn(1, 1, 3, key_dim), torch.randn(1, 1, 3, value_dim))
    both = [torch.cat([a, b.double()], 2) for a, b in ((keys, recent.keys), (values, recent.values))]
    for groups in (1, 2, 3, 4, 6):
        query = torch.randn(1, groups, 1, key_dim)
        seen = torch.rand(1, 1, 1, 643) > 0.2
        attended = each_isa.attend(query, pages, None, recent, seen, key_dim**-0.5)
        wanted, _ = attention64(query, *both, seen, key_dim**-0.5)
        error = (attended.out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert error.max() < 3 * TOLERANCE


@given(
    st.integers(1, 4), st.sampled_from((16, 64, 80, 256)), st.booleans(), st.randoms(use_true_random=False)
)
@settings(max_examples=20)
def test_the_order_of_bytes_converts_back(bits, dim, is_value, random):
    codec = make_codec(CodecSpec("trellis", dim, bits))
    rng = np.random.default_rng(random.randrange(1 << 30))
    rows = rng.integers(0, 256, (2, 64, codec.row_bytes), dtype=np.uint8)
    raw = from_row_codes(rows, codec, is_value)
    np.testing.assert_array_equal(to_row_codes(raw, codec, is_value), rows)
    flat = raw.reshape(2, -1)
    token, k = int(rng.integers(64)), int(rng.integers(codec.row_bytes))
    if is_value:
        place = 8 * (codec.row_bytes * (token // 8) + k) + token % 8
    else:
        place = 64 * k + 16 * (token % 16 // 4) + 4 * (token // 16) + token % 4
    np.testing.assert_array_equal(flat[:, place], rows[:, token, k])


@pytest.mark.parametrize("state_bits", [6, 8])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_maps_of_bytes_make_the_index_of_a_window(state_bits, bits):
    code = trellis_code(state_bits, bits)
    maps = byte_maps(code)
    rng = np.random.default_rng(bits)
    row = rng.integers(0, 256, 16, dtype=np.uint8)
    string = int.from_bytes(row.tobytes(), "little")
    for u in range(8):
        window = string >> (bits * u) & ((1 << code.window_bits) - 1)
        index = 0
        for i in range(3):
            octet, matrix = int(row[bits * u // 8 + i]), int(maps[u, i])
            for j in range(8):
                index ^= (matrix >> (8 * (7 - j)) & octet & 0xFF).bit_count() % 2 << j
        assert index == int(code.mixed(np.array([window]))[0])


@pytest.mark.parametrize("state_bits", [6, 8])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_maps_of_nibbles_lead_to_the_level_of_a_window(state_bits, bits):
    code = trellis_code(state_bits, bits)
    assert len(code.rows) == (7 if bits == 4 else 6)  # TQAI_TRELLIS_INDEX_BITS
    maps, levels = nibble_maps(code)
    string = int.from_bytes(
        np.random.default_rng(bits).integers(0, 256, 16, dtype=np.uint8).tobytes(), "little"
    )
    for u in range(8):
        shift, count, direct = nibbles_of(bits, state_bits, u)
        assert (direct < 0) == (state_bits == 6 and bits == 2 and u % 2 == 1)
        first = (bits * u - shift) // 4
        index = 0
        for j in range(count):
            nibble = string >> (4 * (first + j)) & 15
            assert j != direct or maps[u, j, nibble] == nibble
            index ^= int(maps[u, j, nibble])
        window = string >> (bits * u) & ((1 << code.window_bits) - 1)
        assert levels[u, index] == code.window_levels[window]
        assert not maps[u, count:].any()
        if bits == 4:  # what the second of two byte shuffles reads depends on bits 3 to 6 alone
            x, whole = np.arange(128), levels[u].astype(int)
            np.testing.assert_array_equal(whole, whole[x % 16] + whole[x & 120] - whole[x & 8])


@pytest.mark.parametrize("state_bits", [6, 8])
@pytest.mark.parametrize("bits", [2, 4])
def test_one_map_and_the_bits_beside_it_lead_to_the_level(state_bits, bits):
    code = trellis_code(state_bits, bits)
    maps, levels = place_maps(code)
    rng = np.random.default_rng(bits)
    for u in range(8 // bits):
        before, direct = place_bits(bits, state_bits, u)
        assert direct <= 4
        for one, two in rng.integers(0, 256, (20, 2)).tolist():
            mapped, beside = (two, one >> (bits * u)) if before else (one, two)
            index = beside & ((1 << direct) - 1)
            for j in range(8):
                index ^= (int(maps[u]) >> (8 * (7 - j)) & mapped & 0xFF).bit_count() % 2 << j
            window = (one | two << 8) >> (bits * u) & ((1 << code.window_bits) - 1)
            assert levels[u, index] == code.window_levels[window]


@pytest.mark.parametrize("dim", [48, 72, 288])
def test_head_dims_that_are_refused(native, dim):
    refusal = native.refuses(format_of("trellis", 3, 3, dim), "cpu", "float32")
    assert refusal is not None and f"head_dim {dim}" in refusal
