"""Backends encode and decode what core does: codes equal but for rounding at a boundary, bytes exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tqai.core import bfloat16
from tqai.core.packing import unpack

# A float32 rotation moves a unit coordinate by less than this; only then may an index differ.
BOUNDARY_ROUNDING = 1e-6
# bfloat16 has 8 significant bits; a scale on a rounding tie may fall to either side.
SCALE_ULP = 2.0**-7

SHAPES = [
    (4, 2, 128),
    (3, 3, 128),
    (2, 4, 64),
    (8, 8, 64),
    (4, 4, 80),
    (3, 2, 96),
    (4, 3, 256),
    (1, 5, 64),
    (7, 6, 48),
]


def check_codes(codec, encoded, vectors):
    vectors = vectors.double().numpy()
    expected = codec.encode(vectors)
    dim, bits = codec.spec.head_dim, codec.spec.bits
    found, wanted = (unpack(e.codes, bits, dim).astype(int) for e in (encoded, expected))
    rotated = vectors @ codec.rotation_matrix.T
    unit = rotated / np.maximum(np.linalg.norm(rotated, axis=-1, keepdims=True), 1e-300)
    boundaries = codec.tables()["boundaries"].astype(float)
    nearest = np.abs(unit[..., None] - boundaries).min(-1) if bits < 8 else np.zeros(unit.shape)
    differs = found != wanted
    assert np.abs(found - wanted).max() <= 1
    assert (nearest[differs] < BOUNDARY_ROUNDING).all()
    assert differs.mean() < 1e-3
    scales, wanted_scales = (bfloat16.from_bits(e.scales).astype(float) for e in (encoded, expected))
    np.testing.assert_allclose(scales, wanted_scales, rtol=SCALE_ULP, atol=0)
    assert (scales == wanted_scales).mean() > 0.97


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits_k", "bits_v", "dim"), SHAPES)
def test_codes_equal_core(backend, format_for, fill, bits_k, bits_v, dim, dtype):
    page_format = format_for(bits_k, bits_v, dim)
    generator = torch.Generator().manual_seed(bits_k * 100 + dim)
    keys, values = (3.0 * torch.randn(2, 3, 128, dim, generator=generator) for _ in range(2))
    keys, values = keys.to(dtype), values.to(dtype)
    filled = fill(page_format, keys, values)
    pages = backend.to_canonical(filled.pool.raw(), page_format)
    for codec, encoded, vectors in (
        (page_format.key, pages.key, keys),
        (page_format.value, pages.value, values),
    ):
        by_page = vectors.unflatten(2, (2, 64)).transpose(1, 2)
        check_codes(codec, encoded, by_page)


@pytest.mark.parametrize(("bits_k", "bits_v", "dim"), SHAPES)
def test_decode_equals_core(backend, format_for, fill, bits_k, bits_v, dim):
    page_format = format_for(bits_k, bits_v, dim)
    generator = torch.Generator().manual_seed(dim)
    keys, values = (torch.randn(1, 2, 128, dim, generator=generator) for _ in range(2))
    filled = fill(page_format, keys, values)
    keys, values = backend.decode(filled.pool.raw(), page_format, torch.float32)
    for found, wanted in ((keys, filled.keys), (values, filled.values)):
        found = found.transpose(1, 2).flatten(2, 3).double()
        worst = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert worst.max() < 2e-6


@pytest.mark.parametrize(("bits_k", "bits_v", "dim"), SHAPES)
def test_canonical_round_trip_is_exact(backend, format_for, bits_k, bits_v, dim):
    """Any codes at all, not only those that the encoder makes."""
    page_format = format_for(bits_k, bits_v, dim)
    rng = np.random.default_rng(7)
    raw = rng.integers(0, 256, (3, 2, page_format.page_bytes), dtype=np.uint8)
    canonical = backend.to_canonical(torch.from_numpy(raw), page_format)
    again = backend.to_canonical(
        torch.from_numpy(backend.from_canonical(canonical, page_format)), page_format
    )
    for first, second in zip(canonical, again, strict=True):
        np.testing.assert_array_equal(first.codes, second.codes)
        np.testing.assert_array_equal(first.scales, second.scales)


def test_special_vectors(backend, format_for, fill):
    """Zero, subnormal, huge, NaN and inf vectors: as core has them, and without touching neighbours."""
    page_format = format_for(4, 2, 128)
    keys = torch.randn(1, 1, 64, 128, generator=torch.Generator().manual_seed(0))
    clean = fill(page_format, keys, keys)
    special = keys.clone()
    special[0, 0, 3] = 0.0
    special[0, 0, 5] = 1e-40
    special[0, 0, 7, 11] = 1e30
    special[0, 0, 9] = 3e38
    special[0, 0, 13, 1] = torch.nan
    special[0, 0, 17, 2] = torch.inf
    special[0, 0, 19] = 65504.0
    marked = [3, 5, 7, 9, 13, 17, 19]
    filled = fill(page_format, special, special)
    pages = backend.to_canonical(filled.pool.raw(), page_format)
    for codec, encoded in ((page_format.key, pages.key), (page_format.value, pages.value)):
        wanted = codec.encode(special.unsqueeze(1).double().numpy())
        np.testing.assert_allclose(
            bfloat16.from_bits(encoded.scales), bfloat16.from_bits(wanted.scales), rtol=SCALE_ULP, atol=0
        )
        rows = np.array(marked)
        np.testing.assert_array_equal(
            encoded.codes[0, 0, 0, rows[[0, 1, 4, 5]]], wanted.codes[0, 0, 0, rows[[0, 1, 4, 5]]]
        )
    rest = [token for token in range(64) if token not in marked]
    assert torch.equal(filled.keys[:, :, rest], clean.keys[:, :, rest])
    decoded = backend.decode(filled.pool.raw(), page_format, torch.float16).keys
    finite = [token for token in range(64) if token not in (13, 17)]
    assert torch.isfinite(decoded[0, 0, 0, finite]).all()
    assert torch.isnan(decoded[0, 0, 0, [13, 17]]).all()
