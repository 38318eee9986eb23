"""Levels as whole numbers: bytes where the codebook's are (all shipped ones of 2 to 4 bits), else 16 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tqai.backends.base import ExactTokens
from tqai.backends.native.structs import BYTE_ERROR, byte_levels, integer_levels, native_format
from tqai.core import scalar
from tqai.core.codebook import SHIPPED_HEAD_DIMS, Codebook, codebook, optimal_codebook
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat


def irregular(head_dim, bits):
    """No step makes whole numbers of a byte of these levels, and no sign is shared by a pair of them."""
    best = optimal_codebook(head_dim, bits)
    centroids = best.centroids * (1.0 + 0.02 * np.sin(np.arange(2**bits) + 1.0))
    return Codebook(centroids, 0.5 * (centroids[1:] + centroids[:-1]), best.mse_per_unit_vector)


@pytest.fixture
def irregular_format(monkeypatch):
    """Page format of (bits_k, bits_v, head_dim) with irregular codebooks."""

    def make(bits_k, bits_v, head_dim):
        with monkeypatch.context() as patched:
            patched.setattr(scalar, "codebook", irregular)
            specs = [CodecSpec("scalar", head_dim, bits) for bits in (bits_k, bits_v)]
            return PageFormat(*map(scalar.ScalarCodec, specs))

    return make


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [16, 32, *(dim for dim in SHIPPED_HEAD_DIMS if dim != 112), 160])
def test_shipped_levels_are_bytes(dim, bits):
    found = byte_levels(make_codec(CodecSpec("scalar", dim, bits)))
    assert found is not None
    levels, step = found
    assert levels.dtype == np.int8
    np.testing.assert_allclose(levels * step, codebook(dim, bits).centroids, rtol=3e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_other_levels_have_sixteen_bits(irregular_format, bits):
    pages = irregular_format(bits, bits, 128)
    assert byte_levels(pages.key) is None
    levels, step = integer_levels(pages.key, 128)
    centroids = irregular(128, bits).centroids
    assert np.linalg.norm(levels * step - centroids) < 2 * BYTE_ERROR * np.linalg.norm(centroids)
    assert not native_format(pages).struct.key.byte_levels


@pytest.mark.parametrize("bits_k, bits_v, dim", [(2, 4, 64), (3, 3, 80), (4, 2, 96), (4, 3, 128)])
def test_levels_that_are_no_bytes(each_isa, irregular_format, history, attention64, bits_k, bits_v, dim):
    """All of 16-bit products, whose error is 1e-4 to 5e-4 on every instruction set."""
    for group in (4, 2, 1):
        found, keys, values = history(irregular_format(bits_k, bits_v, dim), 1, 2, 9)
        query = torch.randn(1, 2 * group, 1, dim)
        recent = ExactTokens(*(torch.randn(1, 2, 1, dim) for _ in range(2)))
        keys, values = (torch.cat([x, y.double()], 2) for x, y in zip((keys, values), recent, strict=True))
        out, lse = attention64(query, keys, values, None, dim**-0.5)
        attended = each_isa.attend(query, found, None, recent, None, dim**-0.5)
        assert float((attended.out.double() - out).norm() / out.norm()) < 6e-4
        torch.testing.assert_close(attended.lse.double(), lse, rtol=0, atol=1e-3)
