"""Scales of one byte in C: the bytes and numbers of core, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tqai.backends.base import ExactTokens, History
from tqai.cache.layer import page_format_for
from tqai.config import CacheConfig
from tqai.core import log_scale
from tqai.core.bfloat16 import to_bits
from tqai.core.page import decode_part, with_scale_format

TOLERANCE = 2e-3


def format_of(codec="scalar", dim=64, scale_format="log8", **changes):
    return page_format_for(CacheConfig(codec=codec, scale_format=scale_format, **changes), dim, dim)


def encoded(backend, page_format, keys, values):
    out = torch.empty(*keys.shape[:2], page_format.page_bytes, dtype=torch.uint8).fill_(0xFF)
    backend.encode(keys, values, page_format, out)
    return out


def uneven(seed=0, dim=64):
    """Two pages of two heads: norms over 2^40, zeros, NaN, inf, a page of zeros, one of NaN."""
    rows = torch.randn(2, 2, 64, dim, generator=torch.Generator().manual_seed(seed))
    rows[0, 0] *= torch.exp2(torch.linspace(-20, 20, 64))[:, None]
    rows[0, 1, 3:7] = 0.0
    rows[0, 1, 9, 0] = torch.nan
    rows[0, 1, 10, 1] = torch.inf
    rows[1, 0] = 0.0
    rows[1, 1] = torch.nan
    return rows


@pytest.mark.parametrize("codec", ["scalar", "trellis"])
@pytest.mark.parametrize("scale", ["least_squares", "norm"])
def test_bytes_and_bases_are_those_of_core(each_isa, codec, scale):
    plain, log8 = (format_of(codec, scale_format=f, scale=scale) for f in ("bfloat16", "log8"))
    keys, values = uneven(1), uneven(2)
    raw = encoded(each_isa, log8, keys, values)
    of_plain = each_isa.to_canonical(encoded(each_isa, plain, keys, values), plain)
    of_log8 = each_isa.to_canonical(raw, log8)
    for one, other in zip(of_plain, of_log8, strict=True):
        wanted = with_scale_format(one, "log8")
        np.testing.assert_array_equal(other.codes, wanted.codes)
        np.testing.assert_array_equal(other.scales, wanted.scales)
    assert not raw[..., log8.bases_at + 4 :].any()


def test_every_byte_of_a_scale_is_written_as_core_does(native):
    """Rows along one axis have their length as scale: one row at every threshold, and on both sides of it."""
    log8, plain = (format_of(scale="norm", rotation="identity", scale_format=f) for f in ("log8", "bfloat16"))
    lengths = np.concatenate([log_scale.THRESHOLDS * (1 + e) for e in (-4e-3, 0.0, 4e-3)]).astype(np.float32)
    rows = torch.zeros(13, 1, 64, 64)
    rows[:, 0, 0, 5] = 1.0
    padded = np.resize(lengths, (13, 63))
    rows[:, 0, 1:, 5] = torch.from_numpy(padded)
    found = native.to_canonical(encoded(native, log8, rows, rows), log8).value
    scales = native.to_canonical(encoded(native, plain, rows, rows), plain).value.scales
    np.testing.assert_array_equal(scales[:, 0, 1:], to_bits(padded))
    np.testing.assert_array_equal(
        found.scales, with_scale_format(found._replace(scales=scales), "log8").scales
    )
    assert len(set(found.scales[..., :64].ravel().tolist())) == 255


@pytest.mark.parametrize("codec", ["scalar", "trellis"])
def test_decoding_agrees_with_core(each_isa, codec):
    page_format = format_of(codec)
    raw = encoded(each_isa, page_format, uneven(3), uneven(4))
    pages = each_isa.to_canonical(raw, page_format)
    np.testing.assert_array_equal(each_isa.from_canonical(pages, page_format), raw.numpy())
    for part, side, found in (
        (pages.key, page_format.key, each_isa.decode(raw, page_format, torch.float32).keys),
        (pages.value, page_format.value, each_isa.decode(raw, page_format, torch.float32).values),
    ):
        wanted = torch.from_numpy(decode_part(part, side))
        assert torch.equal(found.isnan(), wanted.isnan())
        error = (found.double() - wanted.double()).nan_to_num().norm(dim=-1)
        assert (error <= 1e-6 * wanted.double().nan_to_num().norm(dim=-1)).all()


@pytest.mark.parametrize(
    ("codec", "bits_k", "bits_v"), [("scalar", 4, 2), ("trellis", 3, 3), ("scalar", 8, 3)]
)
def test_attention(each_isa, codec, bits_k, bits_v, attention64):
    page_format = format_of(codec, dim=64, bits_k=bits_k, bits_v=bits_v)
    rows = [torch.randn(5, 2, 64, 64, generator=torch.Generator().manual_seed(s)) for s in (5, 6)]
    # scales that differ much between tokens and pages, as one byte must hold
    for side in rows:
        side *= torch.exp2(torch.rand(5, 2, 64, 1, generator=torch.Generator().manual_seed(7)) * 4 - 2)
    raw = encoded(each_isa, page_format, *rows)
    addresses = (raw.data_ptr() + torch.arange(5) * raw.stride(0)).view(1, 5)
    history = History(page_format, [raw], [0], np.arange(5, dtype=np.int32)[None], addresses)
    pages = each_isa.to_canonical(raw, page_format)
    recent = ExactTokens(torch.randn(1, 2, 3, 64), torch.randn(1, 2, 3, 64))
    keys, values = (
        torch.cat(
            [torch.from_numpy(decode_part(p, c)).double().transpose(0, 1).flatten(1, 2)[None], e.double()], 2
        )
        for p, c, e in (
            (pages.key, page_format.key, recent.keys),
            (pages.value, page_format.value, recent.values),
        )
    )
    query = torch.randn(1, 4, 1, 64)
    out = each_isa.attend(query, history, None, recent, None, 0.125).out
    wanted, _ = attention64(query, keys, values, None, 0.125)
    error = (out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error.max() < TOLERANCE
