"""Trellis pages in every backend that serves them: paths as cheap as core's, decoding, attention, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tqai.backends.base import ExactTokens
from tqai.core import bfloat16
from tqai.core.packing import unpack
from tqai.core.trellis import windows_of

# Relative L2 error of attention against float64 on the decoded tokens.
TOLERANCE = {"torch": 5e-6, "default": 2e-3}
CASES = [
    # codec, bits_k, bits_v, key_dim, value_dim
    ("trellis", 3, 3, 128, 128),
    ("trellis", 4, 2, 64, 128),
    ("trellis", 2, 4, 128, 96),
    ("trellis", 3, 4, 80, 80),
    ("trellis", 1, 3, 64, 256),
    ("trellis256", 3, 2, 64, 64),
    ("trellis256", 4, 3, 96, 80),
]


def distortion(codec, encoded, vectors):
    """Squared error of a batch with the best scale of every vector, so that rounding it plays no part."""
    spec = codec.spec
    windows = windows_of(unpack(encoded.codes, spec.bits, spec.head_dim), spec.bits, codec.code.window_bits)
    chosen = codec.tables()["windows"].astype(float)[windows]
    rotated = vectors.double().numpy() @ codec.rotation_matrix.T
    scale = (rotated * chosen).sum(-1, keepdims=True) / (chosen**2).sum(-1, keepdims=True)
    unit = np.linalg.norm(rotated, axis=-1, keepdims=True)
    return (((rotated - scale * chosen) / unit) ** 2).sum(), scale[..., 0]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
def test_codes_decoding_and_attention(backend, format_for, fill, exact_tokens, reference_attention, case):
    codec_name, bits_k, bits_v, key_dim, value_dim = case
    page_format = format_for(bits_k, bits_v, key_dim, value_dim, codec=codec_name)
    generator = torch.Generator().manual_seed(key_dim + bits_k)
    keys = torch.randn(1, 2, 128, key_dim, generator=generator)
    values = 2.0 * torch.randn(1, 2, 128, value_dim, generator=generator)
    filled = fill(page_format, keys, values, slabs=2)

    pages = backend.to_canonical(filled.pool.raw(), page_format)
    for codec, encoded, vectors in (
        (page_format.key, pages.key, keys),
        (page_format.value, pages.value, values),
    ):
        by_page = vectors.unflatten(2, (2, 64)).transpose(1, 2)
        wanted, _ = distortion(codec, codec.encode(by_page.numpy()), by_page)
        found, scales = distortion(codec, encoded, by_page)
        assert found == pytest.approx(wanted, rel=1e-3)
        np.testing.assert_allclose(bfloat16.from_bits(encoded.scales), scales, rtol=2.0**-7)

    decoded = backend.decode(filled.pool.raw(), page_format, torch.float32)
    for found, wanted in ((decoded.keys, filled.keys), (decoded.values, filled.values)):
        found = found.transpose(1, 2).flatten(2, 3).double()
        assert ((found - wanted).norm(dim=-1) <= 3e-6 * wanted.norm(dim=-1)).all()

    recent = exact_tokens(generator, 1, 2, 5, key_dim, value_dim, torch.float32)
    everything = ExactTokens(
        *(torch.cat([a, b.double()], 2) for a, b in zip((filled.keys, filled.values), recent, strict=True))
    )
    for groups, new_tokens in ((1, 1), (2, 1), (4, 3)):
        query = torch.randn(1, 2 * groups, new_tokens, key_dim, generator=generator)
        scaling = key_dim**-0.5
        attended = backend.attend(query, filled.pool.history(), None, recent, None, scaling)
        wanted, _ = reference_attention(query, *everything, None, scaling)
        error = (attended.out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert error.max() < 5 * TOLERANCE.get(backend.name, TOLERANCE["default"])


@pytest.mark.parametrize("codec_name", ["trellis", "trellis256"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_any_bytes_decode_as_core_decodes_them(backend, format_for, codec_name, bits, dim):
    """Exactly, in the rotated space: scale 1 and the rotation undone leave the table's values."""
    page_format = format_for(bits, bits, dim, codec=codec_name, rotation="identity")
    rng = np.random.default_rng(bits)
    raw = rng.integers(0, 256, (2, 1, page_format.page_bytes), dtype=np.uint8)
    ones = np.full(64, 0x3F80, "<u2").view(np.uint8)
    for at in (page_format.key_scales_at, page_format.value_scales_at):
        raw[..., at : at + 128] = ones
    own = torch.from_numpy(raw)
    pages = backend.to_canonical(own, page_format)
    again = torch.from_numpy(backend.from_canonical(pages, page_format))
    assert torch.equal(again, own)
    decoded = backend.decode(own, page_format, torch.float32)
    for found, codec, encoded in (
        (decoded.keys, page_format.key, pages.key),
        (decoded.values, page_format.value, pages.value),
    ):
        np.testing.assert_array_equal(found.numpy(), codec.decode_rotated(encoded))


def test_special_vectors(backend, format_for, fill):
    """Zero, subnormal, huge, spiked, NaN and inf vectors: as core has them, neighbours untouched."""
    page_format = format_for(3, 2, 128, codec="trellis")
    keys = torch.randn(1, 1, 64, 128, generator=torch.Generator().manual_seed(0))
    clean = fill(page_format, keys, keys)
    special = keys.clone()
    special[0, 0, 3] = 0.0
    special[0, 0, 5] = 1e-40
    special[0, 0, 7, 11] = 1e30
    special[0, 0, 9] = 3e38
    special[0, 0, 13, 1] = torch.nan
    special[0, 0, 17, 2] = torch.inf
    special[0, 0, 19] = torch.tensor(page_format.key.rotation_matrix[5])  # a single spike, rotated
    special[0, 0, 21] = 65504.0
    marked = [3, 5, 7, 9, 13, 17, 19, 21]
    filled = fill(page_format, special, special)
    pages = backend.to_canonical(filled.pool.raw(), page_format)
    for codec, encoded in ((page_format.key, pages.key), (page_format.value, pages.value)):
        wanted = codec.encode(special.unsqueeze(1).double().numpy())
        found, scales = (bfloat16.from_bits(e.scales)[0, 0, 0] for e in (encoded, wanted))
        np.testing.assert_allclose(found[marked], scales[marked], rtol=0.02, atol=0)
        none = [3, 5, 13, 17]
        assert (encoded.codes[0, 0, 0, none] == 0).all()
        np.testing.assert_array_equal(encoded.scales[0, 0, 0, none], wanted.scales[0, 0, 0, none])
    rest = [token for token in range(64) if token not in marked]
    assert torch.equal(filled.keys[:, :, rest], clean.keys[:, :, rest])
    decoded = backend.decode(filled.pool.raw(), page_format, torch.float16).keys[0, 0, 0]
    finite = [token for token in range(64) if token not in (13, 17)]
    assert torch.isfinite(decoded[finite]).all()
    assert torch.isnan(decoded[[13, 17]]).all()


def test_encoding_in_blocks_and_odd_counts(backend, format_for):
    """Every page of a long prefill is encoded as it is alone, however the encoder groups vectors."""
    page_format = format_for(2, 3, 64, codec="trellis")
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(5, 3, 64, 64, generator=generator) for _ in range(2))
    together = torch.empty(5, 3, page_format.page_bytes, dtype=torch.uint8).fill_(0xFF)
    backend.encode(keys, values, page_format, together)
    alone = torch.empty(1, 3, page_format.page_bytes, dtype=torch.uint8).fill_(0xFF)
    backend.encode(keys[3:4], values[3:4], page_format, alone)
    assert torch.equal(together[3:4], alone)
