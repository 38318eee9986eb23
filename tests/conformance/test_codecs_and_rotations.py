"""Page formats beyond the plain ones: the codec "qjl", and values that come rotated already."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tqai.backends import load, resolve
from tqai.backends.base import ExactTokens
from tqai.cache.layer import page_format_for
from tqai.config import CacheConfig
from tqai.core import bfloat16

CASES = {
    "qjl keys": (4, 2, 128, 128, {"use_qjl": True}),
    "qjl both": (3, 3, 64, 80, {"codec": "qjl", "qjl_sketch_size": 100}),
    "identity values": (4, 2, 128, 128, {"rotation_v": "identity"}),
    "identity values of another length": (4, 4, 80, 96, {"rotation_v": "identity"}),
}
# Relative L2 error of attention against float64 on the decoded tokens.
TOLERANCE = {"torch": 5e-6, "default": 2e-3}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poisoned_allocations")
def test_attention_decode_and_codes(backend, format_for, fill, exact_tokens, reference_attention, name):
    bits_k, bits_v, key_dim, value_dim, settings = CASES[name]
    page_format = format_for(bits_k, bits_v, key_dim, value_dim, **settings)
    generator = torch.Generator().manual_seed(key_dim)
    keys = torch.randn(2, 2, 192, key_dim, generator=generator)
    values = 2.0 * torch.randn(2, 2, 192, value_dim, generator=generator)
    values[:, :, 5] = 0.0
    filled = fill(page_format, keys, values, slabs=2)

    pages = backend.to_canonical(filled.pool.raw(), page_format)
    for codec, encoded, vectors in (
        (page_format.key, pages.key, keys),
        (page_format.value, pages.value, values),
    ):
        by_page = vectors.unflatten(2, (3, 64)).transpose(1, 2).double().numpy()
        expected = codec.encode(by_page)
        assert (encoded.codes != expected.codes).mean() < 2e-3
        found, wanted = (bfloat16.from_bits(e.scales).astype(float) for e in (encoded, expected))
        np.testing.assert_allclose(found, wanted, rtol=2.0**-7, atol=0)

    decoded = backend.decode(filled.pool.raw(), page_format, torch.float32)
    for found, wanted in ((decoded.keys, filled.keys), (decoded.values, filled.values)):
        found = found.transpose(1, 2).flatten(2, 3).double()
        assert ((found - wanted).norm(dim=-1) <= 3e-6 * wanted.norm(dim=-1)).all()

    recent = exact_tokens(generator, 2, 2, 5, key_dim, value_dim, torch.float32)
    query = torch.randn(2, 4, 3, key_dim, generator=generator)
    scaling = key_dim**-0.5
    attended = backend.attend(query, filled.pool.history(), None, recent, None, scaling)
    everything = ExactTokens(
        *(torch.cat([a, b.double()], 2) for a, b in zip((filled.keys, filled.values), recent, strict=True))
    )
    wanted, _ = reference_attention(query, *everything, None, scaling)
    error = (attended.out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error.max() < 5 * TOLERANCE.get(backend.name, TOLERANCE["default"])


def test_a_masked_page_of_rubbish_is_not_felt(reference_attention):
    """Also of the sketch's norm, whose bytes may read as NaN."""
    config = CacheConfig(codec="qjl", qjl_sketch_size=64)
    page_format, torch_backend = page_format_for(config, 64, 64), load("torch")
    from tqai.cache.pages import PagePool

    pool = PagePool(page_format, 1, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 1, 64, 64, generator=generator) for _ in range(2))
    ids, buffer = pool.append(2)
    buffer.fill_(0xFF)
    torch_backend.encode(keys, values, page_format, buffer[:1])
    pool.commit(ids, buffer)
    query = torch.randn(1, 1, 1, 64, generator=generator)
    mask = torch.ones(1, 1, 1, 129, dtype=torch.bool)
    mask[..., 64:128] = False
    recent = ExactTokens(keys[:, :, :1], values[:, :, :1])
    attended = torch_backend.attend(query, pool.history(), None, recent, mask, 0.125)
    seen = torch_backend.decode(pool.raw()[:, :1], page_format, torch.float32)
    wanted, _ = reference_attention(
        query,
        torch.cat([seen.keys[0], recent.keys], 2),
        torch.cat([seen.values[0], recent.values], 2),
        None,
        0.125,
    )
    assert (attended.out.double() - wanted).norm() < 1e-5 * wanted.norm()


def test_others_refuse_the_sketch_and_torch_serves():
    page_format = page_format_for(CacheConfig(use_qjl=True), 128, 128)
    choice = resolve(page_format, "cpu", "float32")
    assert choice.backend.name == "torch"
    plain = page_format_for(CacheConfig(), 128, 128)
    assert page_format.page_bytes - plain.page_bytes == 64 * (64 // 8 + 2)
    assert page_format.value is plain.value
