"""Encoding and decoding: against core, and alike on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai.backends.native.order import from_row_codes, to_row_codes
from tqai.cache.layer import page_format_for
from tqai.config import CacheConfig
from tqai.core.packing import unpack

DIMS = (64, 80, 96, 128, 256)
BITS = (2, 3, 4, 8)


def special_rows(dim):
    """64 tokens of one head: ordinary, zero, huge, tiny, subnormal, NaN, inf, one spike."""
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
    rows[9] = -0.0
    return rows


def codes_and_scales(native, raw, page_format):
    pages = native.to_canonical(raw, page_format)
    return [
        (
            unpack(side.codes, codec.spec.bits, codec.spec.head_dim).reshape(-1, codec.spec.head_dim),
            side.scales.ravel(),
        )
        for side, codec in ((pages.key, page_format.key), (pages.value, page_format.value))
    ]


@pytest.mark.parametrize("rotation", ["auto", "haar"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_encodes_as_core(native, page_format, dim, bits, rotation):
    pages = page_format(bits, bits, dim, rotation=rotation)
    rows = special_rows(dim)[None, None]
    raw = torch.full((1, 1, pages.page_bytes), 0xFF, dtype=torch.uint8)
    native.encode(rows, rows, pages, raw)
    wanted = pages.key.encode(rows.numpy())
    indices = unpack(wanted.codes, bits, dim)[0, 0]
    unit = rotated_units(pages.key, rows[0, 0].numpy())
    boundaries = pages.key.tables()["boundaries"].astype(np.float64)
    for codes, scales in codes_and_scales(native, raw, pages):
        differs = codes != indices
        # only where the coordinate lies within float32 rounding of a boundary, and then by one cell
        distance = np.abs(unit[differs][:, None] - boundaries).min(-1, initial=np.inf)
        assert distance.max(initial=0.0) < 3e-6
        assert np.abs(codes.astype(int) - indices)[differs].max(initial=0) <= 1
        assert differs.mean() < 1e-3
        same = np.abs(scales.astype(int) - wanted.scales[0, 0].astype(int)) <= 1
        assert same.all()
        assert not np.isin(scales, (0x7F80, 0xFF80)).any()  # a finite vector never has an infinite scale
        assert (scales == wanted.scales[0, 0]).mean() > 0.9


def rotated_units(codec, rows):
    usable = np.isfinite(rows).all(-1) & (np.abs(rows).max(-1) >= 2.0**-126)
    rotated = np.where(usable[:, None], rows, 0.0).astype(np.float64) @ codec.rotation_matrix.T
    norms = np.linalg.norm(rotated, axis=-1, keepdims=True)
    return rotated / np.where(norms > 0, norms, 1.0)


@pytest.mark.parametrize("dim", DIMS)
def test_every_isa_encodes_and_decodes_to_the_same_bytes(native, isas, page_format, dim):
    for bits_k, bits_v in ((2, 3), (3, 8), (4, 2), (8, 4)):
        pages = page_format(bits_k, bits_v, dim)
        rows = torch.stack([special_rows(dim), torch.randn(64, dim)])[:, None]
        raws, decoded = [], []
        for isa in isas:
            assert native.use_isa(isa)
            raw = torch.full((2, 1, pages.page_bytes), 0xFF, dtype=torch.uint8)
            native.encode(rows, rows, pages, raw)
            raws.append(raw)
            decoded.append(
                [*native.decode(raws[0], pages, torch.float32), *native.decode(raws[0], pages, torch.float16)]
            )
        for raw, numbers in zip(raws[1:], decoded[1:], strict=True):
            assert torch.equal(raw, raws[0])
            for one, first in zip(numbers, decoded[0], strict=True):
                torch.testing.assert_close(one, first, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", DIMS)
def test_decodes_as_core(each_isa, page_format, dim, dtype):
    pages = page_format(3, 8, dim)
    rows = special_rows(dim)[None, None]
    raw = torch.full((1, 1, pages.page_bytes), 0xFF, dtype=torch.uint8)
    each_isa.encode(rows, rows, pages, raw)
    canonical = each_isa.to_canonical(raw, pages)
    limit = torch.finfo(dtype).max
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for codec, encoded, found in zip(
        (pages.key, pages.value), canonical, each_isa.decode(raw, pages, dtype), strict=True
    ):
        wanted = torch.from_numpy(codec.decode(encoded)).clamp(-limit, limit).to(dtype)
        assert found.dtype == dtype
        assert found.shape == wanted.shape
        assert torch.equal(found.isnan(), wanted.isnan())
        scale = wanted.float().nan_to_num().abs().amax(-1, keepdim=True).clamp_min(6e-5)
        assert ((found.float() - wanted.float()).nan_to_num().abs() <= tolerance * scale).all()


def test_takes_any_dtype_and_strides(native, page_format):
    pages = page_format(4, 2, 128)
    base = torch.randn(2, 64, 3, 128).to(torch.float16)
    strided = base.permute(0, 2, 1, 3)
    wanted = torch.empty(2, 3, pages.page_bytes, dtype=torch.uint8)
    native.encode(strided.float().contiguous(), strided.float().contiguous(), pages, wanted)
    every_other = torch.randn(2, 3, 64, 256).to(torch.float16)
    every_other[..., ::2] = strided
    for keys, values in ((strided, strided), (strided.float(), strided), (every_other[..., ::2], strided)):
        raw = torch.full_like(wanted, 0xFF)
        native.encode(keys, values, pages, raw)
        assert torch.equal(raw, wanted)
    bfloat = strided.to(torch.bfloat16)
    native.encode(bfloat.float(), bfloat.float(), pages, wanted)
    native.encode(bfloat, bfloat, pages, raw)
    assert torch.equal(raw, wanted)


@settings(deadline=None, max_examples=40)
@given(
    dim=st.sampled_from((16, 32, 64, 80, 96, 128, 160, 192, 256)),
    bits=st.sampled_from(BITS),
    is_value=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_order_is_a_permutation_of_bits(dim, bits, is_value, seed):
    codec = page_format_for(CacheConfig(bits_k=bits, bits_v=bits), dim, dim).key
    raw = np.random.default_rng(seed).integers(0, 256, (2, 64, codec.row_bytes), dtype=np.uint8)
    assert np.array_equal(from_row_codes(to_row_codes(raw, codec, is_value), codec, is_value), raw)
    assert np.array_equal(to_row_codes(from_row_codes(raw, codec, is_value), codec, is_value), raw)
    assert np.unpackbits(raw).sum() == np.unpackbits(to_row_codes(raw, codec, is_value)).sum()
