"""Tensors that begin anywhere in memory and have gaps between rows: the same bits as dense ones."""

from __future__ import annotations

import pytest
import torch

from tqai.backends.base import ExactTokens


def shifted(tensor, elements, gap):
    """The same numbers `elements` after a multiple of 64 bytes, `gap` more between rows, NaN around them."""
    *lead, rows, dim = tensor.shape
    room = torch.full((tensor.numel() // dim * (dim + gap) + elements + 64,), torch.nan, dtype=tensor.dtype)
    start = (-room.data_ptr() % 64) // tensor.element_size() + elements
    strides = [rows * (dim + gap)] * (len(lead) + 2)
    strides[-1], strides[-2] = 1, dim + gap
    for axis in reversed(range(len(lead) - 1)):
        strides[axis] = strides[axis + 1] * lead[axis + 1]
    view = room.as_strided(tensor.shape, strides, start)
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("elements", "gap"), [(1, 0), (3, 1), (7, 5), (8, 16)])
def test_attention(each_isa, page_format, history, dtype, elements, gap):
    for bits_k, bits_v, dim in ((4, 2, 64), (3, 8, 80)):
        found, _, _ = history(page_format(bits_k, bits_v, dim), 2, 2, 3)
        query = torch.randn(2, 6, 2, dim).to(dtype)
        sinks, recent = (
            ExactTokens(*(torch.randn(2, 2, tokens, dim).to(dtype) for _ in "kv")) for tokens in (3, 70)
        )
        wanted = each_isa.attend(query, found, sinks, recent, None, 0.1)
        moved = [ExactTokens(*(shifted(x, elements, gap) for x in tokens)) for tokens in (sinks, recent)]
        got = each_isa.attend(shifted(query, elements, gap), found, *moved, None, 0.1)
        assert torch.equal(got.out, wanted.out) and torch.equal(got.lse, wanted.lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("elements", "gap", "bytes_on"), [(1, 0, 2), (3, 1, 6), (5, 3, 30), (8, 8, 16)])
def test_encoding_and_decoding(each_isa, page_format, dtype, elements, gap, bytes_on):
    pages = page_format(3, 4, 96)
    keys, values = (torch.randn(2, 3, 64, 96).to(dtype) for _ in "kv")
    wanted = torch.empty(2, 3, pages.page_bytes, dtype=torch.uint8)
    each_isa.encode(keys, values, pages, wanted)
    room = torch.full((wanted.numel() + 128,), 0xFF, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + bytes_on
    out = room[start : start + wanted.numel()].view(wanted.shape)
    each_isa.encode(shifted(keys, elements, gap), shifted(values, elements, gap), pages, out)
    assert torch.equal(out, wanted)
    assert (room[:start] == 0xFF).all() and (room[start + wanted.numel() :] == 0xFF).all()
    for one, other in zip(
        each_isa.decode(out, pages, dtype), each_isa.decode(wanted, pages, dtype), strict=True
    ):
        assert torch.equal(one, other)
