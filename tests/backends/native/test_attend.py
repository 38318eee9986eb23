"""Attention: every pair of bits on every instruction set, masks, windows, padding and special values."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from tqai.backends.base import ExactTokens

MOST_ERROR = 2e-3
"""Relative L2 error that is promised; logits of order 1 stay far below it."""


def most_error(backend, *bits):
    """What these tests let pass: AVX-512 multiplies codes of 2 to 4 bits as bytes with factors of 12 bits,
    measured 6e-4 to 1.1e-3; everything else 1e-4 to 5e-4. A level or a scale that is wrong anywhere costs
    more."""
    return MOST_ERROR * (0.75 if backend.isa == "avx512" and min(bits) < 8 else 0.5)


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def run(
    backend,
    attention64,
    found,
    tokens,
    batch,
    heads,
    group,
    new,
    dtype=torch.float32,
    sinks=0,
    window=0,
    **more,
):
    """Attend with sinks and recent tokens around the history; (Attended, out64, lse64)."""
    history, keys, values = found
    key_dim, value_dim = keys.shape[-1], values.shape[-1]
    generator = torch.Generator().manual_seed(7)

    def exact(count):
        shape = (batch, heads, count)
        return ExactTokens(
            *(torch.randn(*shape, dim, generator=generator).to(dtype) for dim in (key_dim, value_dim))
        )

    first = exact(sinks) if sinks else None
    recent = exact(new + window)
    query = torch.randn(batch, heads * group, new, key_dim, generator=generator).to(dtype)
    parts = [(keys, values), recent] if first is None else [first, (keys, values), recent]
    all_keys, all_values = (torch.cat([part[i].double() for part in parts], 2) for i in (0, 1))
    assert all_keys.shape[2] == tokens + sinks + new + window
    mask, scaling, softcap = more.get("mask"), more.get("scaling", key_dim**-0.5), more.get("softcap")
    wanted = attention64(query, all_keys, all_values, mask, scaling, softcap)
    return backend.attend(query, history, first, recent, mask, scaling, softcap), *wanted


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_every_pair_of_bits(each_isa, page_format, history, attention64, dim):
    for bits_k, bits_v in itertools.product((2, 3, 4, 8), repeat=2):
        found = history(page_format(bits_k, bits_v, dim), 1, 2, 9)
        attended, out, lse = run(each_isa, attention64, found, 576, 1, 2, 4, 1)
        assert relative(attended.out, out) < most_error(each_isa, bits_k, bits_v), (bits_k, bits_v)
        torch.testing.assert_close(attended.lse.double(), lse, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "group, new", [(1, 1), (2, 1), (3, 1), (4, 2), (7, 1), (8, 3), (1, 16), (2, 17), (2, 70)]
)
def test_groups_and_new_tokens(each_isa, page_format, history, attention64, group, new):
    found = history(page_format(4, 2, 64), 2, 2, 3)
    attended, out, lse = run(each_isa, attention64, found, 192, 2, 2, group, new, sinks=3, window=65)
    assert relative(attended.out, out) < most_error(each_isa, 2)
    torch.testing.assert_close(attended.lse.double(), lse, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "codec, bits", [("scalar", 4), ("scalar", 3), ("scalar", 2), ("trellis", 4), ("trellis", 2)]
)
@pytest.mark.parametrize("group, masked", [(1, True), (1, False), (4, True), (4, False)])
def test_tokens_beside_one_with_nearly_all_weight(
    each_isa, page_format, history, attention64, codec, bits, group, masked
):
    """What the others add to a token of 88 to 99 % of all weight, as the first token of many a model has,
    is small but all of one direction: weights that are rounded to 0 would show in it."""
    found, keys, values = history(page_format(bits, bits, 64, codec=codec), 1, 2, 8, mean_value=1.0)
    strongest = keys[:, :, 5, None] / keys[:, :, 5, None].square().sum(-1, keepdim=True)
    query = (
        (torch.tensor([[9.5], [2.5], [10.5], [10]])[:group] * 8 * strongest).flatten(1, 2)[:, :, None].float()
    )
    far, nothing = -1000 * strongest[:, :, None, 0].float(), torch.zeros(1, 2, 1, 64)
    logits = 0.125 * query.double() @ keys.repeat_interleave(group, 1).transpose(-1, -2)
    weights = logits.softmax(-1)
    mask = (torch.arange(513) < 512).expand(1, 1, 1, 513) if masked else None
    attended = each_isa.attend(query, found, None, ExactTokens(far, nothing), mask, 0.125, None)
    share = weights[..., 5:6] * values[:, :, 5, None].repeat_interleave(group, 1)
    wanted = weights @ values.repeat_interleave(group, 1) - share
    off = (attended.out.double() - share - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert 0.85 < weights[:, ::group, 0, 5].min() < 0.99
    assert off.max() < 0.04, off


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(each_isa, page_format, history, attention64, dtype):
    found = history(page_format(3, 3, 96), 1, 2, 2)
    attended, out, _ = run(each_isa, attention64, found, 128, 1, 2, 2, 2, dtype, sinks=1)
    assert attended.out.dtype == dtype
    assert relative(attended.out, out) < MOST_ERROR + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("pages, first_token", [(1, 63), (1, 1), (8, 5), (9, 33), (17, 0), (40, 7)])
def test_pages_and_sliding_window(each_isa, page_format, history, attention64, pages, first_token):
    found = history(page_format(4, 4, 128), 2, 1, pages, first_token, slack=3)
    attended, out, lse = run(each_isa, attention64, found, 64 * pages - first_token, 2, 1, 4, 1)
    assert relative(attended.out, out) < most_error(each_isa, 4)
    torch.testing.assert_close(attended.lse.double(), lse, rtol=0, atol=1e-3)


def test_keys_and_values_of_different_size(each_isa, page_format, history, attention64):
    found = history(page_format(4, 3, 192, 128), 1, 2, 3)
    attended, out, _ = run(each_isa, attention64, found, 192, 1, 2, 4, 1)
    assert relative(attended.out, out) < most_error(each_isa, 3, 4)


@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap(each_isa, page_format, history, attention64, softcap):
    found = history(page_format(4, 4, 64), 1, 2, 3)
    attended, out, lse = run(each_isa, attention64, found, 192, 1, 2, 4, 1, softcap=softcap, scaling=0.5)
    assert relative(attended.out, out) < MOST_ERROR
    torch.testing.assert_close(attended.lse.double(), lse, rtol=0, atol=3e-3)


@pytest.mark.parametrize("layout", ["padding", "random", "per_head", "strided"])
def test_masks(each_isa, page_format, history, attention64, layout):
    batch, heads, group, new = 3, 2, 4, 5
    found = history(page_format(4, 2, 128), batch, heads, 10, first_token=9)
    tokens = 640 - 9
    total = 2 + tokens + new + 1
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(batch, 1, new, total, dtype=torch.bool).tril(total - new)
    if layout == "padding":
        mask &= torch.arange(total) >= torch.tensor([0, 100, 600])[:, None, None, None]
    else:
        wide = 1 if layout == "random" else heads * group
        mask = mask & (torch.rand(batch, wide, new, total, generator=generator) < 0.4)
    if layout == "strided":
        buffer = torch.zeros(batch, total, new, heads * group, dtype=torch.bool)
        buffer.copy_(mask.permute(0, 3, 2, 1))
        mask = buffer.permute(0, 3, 2, 1)
    attended, out, lse = run(
        each_isa, attention64, found, tokens, batch, heads, group, new, sinks=2, window=1, mask=mask
    )
    assert relative(attended.out, out) < most_error(each_isa, 2)
    torch.testing.assert_close(attended.lse.double(), lse, rtol=0, atol=1e-3)


def test_what_is_masked_never_shows(each_isa, page_format, history):
    pages = page_format(4, 4, 64)
    found, _, _ = history(pages, 1, 1, 2)
    raw = found.slabs[0]
    page = int(found.table[0, 1])
    raw[page, 0, pages.key_scales_at : pages.key_scales_at + 8] = 0xFF  # tokens 64 to 67: NaN keys
    raw[page, 0, pages.value_scales_at + 8 : pages.value_scales_at + 16] = 0xFF  # 68 to 71: NaN values
    exact = ExactTokens(torch.randn(1, 1, 3, 64), torch.randn(1, 1, 3, 64))
    exact.keys[0, 0, 0], exact.values[0, 0, 1] = torch.nan, torch.nan
    query = torch.randn(1, 4, 1, 64)
    mask = torch.ones(1, 1, 1, 131, dtype=torch.bool)
    mask[..., 64:72] = False
    mask[..., 128:130] = False
    attended = each_isa.attend(query, found, None, exact, mask, 0.125)
    assert attended.out.isfinite().all() and attended.lse.isfinite().all()
    for column in (64, 68, 128, 129):
        shown = mask.clone()
        shown[..., column] = True
        assert each_isa.attend(query, found, None, exact, shown, 0.125).out.isnan().all(), column
    nothing = each_isa.attend(query, found, None, exact, torch.zeros_like(mask), 0.125)
    assert (nothing.out == 0).all() and (nothing.lse == -torch.inf).all()


def test_huge_and_tiny_values(each_isa, page_format, attention64, native):
    pages = page_format(4, 8, 64)
    for size in (1e-25, 1e-12, 1e12, 1e37):
        values = torch.randn(1, 2, 64, 64) * size
        raw = torch.empty(1, 2, pages.page_bytes, dtype=torch.uint8)
        native.encode(torch.randn(1, 2, 64, 64), values, pages, raw)
        keys, values = (x.double() for x in native.decode(raw, pages, torch.float32))
        history = make_history(pages, raw)
        recent = ExactTokens(torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64) * size)
        query = torch.randn(1, 2, 1, 64)
        out = attention64(
            query,
            torch.cat([keys, recent.keys], 2),
            torch.cat([values, recent.values.double()], 2),
            None,
            0.1,
        )[0]
        assert relative(each_isa.attend(query, history, None, recent, None, 0.1).out, out) < MOST_ERROR, size


@pytest.mark.parametrize("bits, tokens", [(2, 32), (4, 32), (4, 64), (8, 64)])
def test_negative_scales(each_isa, page_format, attention64, native, bits, tokens):
    """No encoder writes one, but a page may hold it: weights of both signs in one block, or below 0 alone."""
    pages = page_format(4, bits, 80)
    raw = torch.empty(1, 2, pages.page_bytes, dtype=torch.uint8)
    native.encode(torch.randn(1, 2, 64, 80), torch.randn(1, 2, 64, 80), pages, raw)
    raw[..., pages.value_scales_at + 1 : pages.value_scales_at + 1 + 2 * tokens : 2] |= 0x80  # of the first
    keys, values = (x.double() for x in native.decode(raw, pages, torch.float32))
    recent = ExactTokens(torch.randn(1, 2, 1, 80), torch.randn(1, 2, 1, 80))
    query = torch.randn(1, 6, 1, 80)
    all_keys, all_values = (
        torch.cat([x, y.double()], 2) for x, y in zip((keys, values), recent, strict=True)
    )
    out = attention64(query, all_keys, all_values, None, 0.1)[0]
    attended = each_isa.attend(query, make_history(pages, raw), None, recent, None, 0.1)
    assert relative(attended.out, out) < most_error(each_isa, bits)


def test_ragged_histories(each_isa, page_format, history, attention64):
    """Sequences with fewer pages: what their table and addresses hold beyond is never followed."""
    found, keys, values = history(page_format(4, 3, 64), 4, 2, 10, first_token=7)
    counts = torch.tensor([10, 0, 1, 9], dtype=torch.int32)
    addresses = found.addresses.clone()
    addresses[torch.arange(10) >= counts[:, None]] = 0
    ragged = dataclasses.replace(found, addresses=addresses, counts=counts)
    present = (torch.arange(7, 640) < counts[:, None] * 64)[:, None, None]
    for new, hidden in ((1, 0), (3, 0), (3, 40), (17, 0)):
        recent = ExactTokens(torch.randn(4, 2, new, 64), torch.randn(4, 2, new, 64))
        query = torch.randn(4, 8, new, 64)
        own = torch.ones(new, new, dtype=torch.bool).tril().expand(4, 1, new, new)
        seen = torch.cat([present.expand(4, 1, new, 633), own], -1)
        given = None
        if hidden:
            given = torch.ones(4, 1, new, 633 + new, dtype=torch.bool).tril(633)
            given[..., 600 : 600 + hidden - 10] = False
            seen = seen & given
        all_keys, all_values = (
            torch.cat([x, y.double()], 2) for x, y in zip((keys, values), recent, strict=True)
        )
        out, lse = attention64(query, all_keys, all_values, seen, 0.125)
        attended = each_isa.attend(query, ragged, None, recent, given, 0.125)
        assert relative(attended.out, out) < most_error(each_isa, 3, 4), (new, hidden)
        torch.testing.assert_close(attended.lse.double(), lse, rtol=0, atol=2e-3)


def make_history(pages, raw):
    import numpy as np

    from tqai.backends.base import History

    addresses = torch.tensor([[raw.data_ptr()]], dtype=torch.int64)
    return History(pages, [raw], [0], np.zeros((1, 1), dtype=np.int32), addresses)


def test_peaked_attention(each_isa, page_format, history, attention64):
    """One token of 4096 holds nearly all weight: what the others add must not be lost to its scale."""
    found = history(page_format(8, 4, 128), 1, 2, 64)
    attended, out, lse = run(each_isa, attention64, found, 4096, 1, 2, 4, 1, scaling=0.5)
    assert relative(attended.out, out) < 3e-3  # logits of order 20: 1e-4 of a logit is 2e-3 of a weight
    torch.testing.assert_close(attended.lse.double(), lse, rtol=5e-4, atol=1e-3)


@pytest.mark.parametrize("bits_k", [2, 3, 4])
def test_logits_far_apart(each_isa, page_format, history, attention64, bits_k):
    """Logits of deviation 6: byte factors of the queries would be 2.5e-3 off, so finer ones are used."""
    found = history(page_format(bits_k, 8, 128), 1, 2, 16)
    attended, out, lse = run(each_isa, attention64, found, 1024, 1, 2, 4, 1, scaling=6 * 128**-0.5)
    assert relative(attended.out, out) < MOST_ERROR / 2
    torch.testing.assert_close(attended.lse.double(), lse, rtol=0, atol=2e-3)
