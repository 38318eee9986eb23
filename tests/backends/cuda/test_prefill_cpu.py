"""Tiled attention of many new tokens, on the CPU: right, and never more than a tile at a time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tqai.backends import load
from tqai.backends.base import ExactTokens, History
from tqai.backends.cuda import prefill
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat

HEADS, GROUPS, DIM, PAGES = 2, 3, 64, 11


@pytest.fixture
def case():
    """Two sequences of 11 pages, 3 sinks and 40 recent tokens; what the pages decode to, in order."""
    generator = torch.Generator().manual_seed(0)
    page_format = PageFormat(*(make_codec(CodecSpec("scalar", DIM, bits)) for bits in (4, 3)))
    backend = load("torch")

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    slab = torch.empty(2 * PAGES, HEADS, page_format.page_bytes, dtype=torch.uint8)
    backend.encode(*(normal(2 * PAGES, HEADS, 64, DIM) for _ in "kv"), page_format, slab)
    table = torch.randperm(2 * PAGES, generator=generator).view(2, PAGES)
    addresses = slab.data_ptr() + table * slab.stride(0)
    history = History(page_format, [slab], [0], table.numpy().astype(np.int32), addresses, 5)
    decoded = [
        part[table].transpose(1, 2).flatten(2, 3)[:, :, 5:]
        for part in backend.decode(slab, page_format, torch.float32)
    ]
    sinks, recent = (ExactTokens(normal(2, HEADS, n, DIM), normal(2, HEADS, n, DIM)) for n in (3, 40))
    query = normal(2, HEADS * GROUPS, 20, DIM)
    keys, values = (torch.cat([a, b, c], 2).double() for a, b, c in zip(sinks, decoded, recent, strict=True))
    return SimpleNamespace(
        backend=backend, query=query, history=history, sinks=sinks, recent=recent, keys=keys, values=values
    )


class FlashOnCpu:
    """The operator's form for CPUs in its place; all else of it, which torch may ask for, is its own."""

    def __init__(self, operator):
        self.operator = operator

    def __call__(self, query, keys, values, dropout, causal, debug, scale):
        cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return cpu(query, keys, values, dropout, causal, scale=scale)[:2]

    def __getattr__(self, name):
        return getattr(self.operator, name)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("tile_tokens", "tile_bytes"), [(8192, 1 << 28), (128, 1 << 28), (8192, 1), (8192, 300_000)]
)
def test_tiles_are_bounded_and_merge_to_the_whole(
    case, monkeypatch, tile_tokens, tile_bytes, masked, softcap
):
    monkeypatch.setattr(prefill, "TILE_TOKENS", tile_tokens)
    monkeypatch.setattr(prefill, "TILE_BYTES", tile_bytes)
    monkeypatch.setattr(prefill, "TILE_SCORES", 2 * HEADS * GROUPS * 64 * 3)
    flash = FlashOnCpu(torch.ops.aten._scaled_dot_product_flash_attention)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
    page_bytes = 2 * HEADS * 64 * 2 * (DIM + DIM)  # of both sequences, as float16
    tiles, scores = [], []

    def decode(raw, page_format, dtype):
        tiles.append(raw.shape[0] // (2 * HEADS))
        return case.backend.decode(raw, page_format, dtype)

    tanh, logsumexp = torch.tanh, torch.logsumexp
    monkeypatch.setattr(torch, "logsumexp", lambda x, dim: scores.append(x.numel()) or logsumexp(x, dim))
    mask, seen = None, torch.ones(20, case.keys.shape[2], dtype=torch.bool).tril(case.keys.shape[2] - 20)
    if masked:
        mask = seen & (torch.rand(2, 1, *seen.shape, generator=torch.Generator().manual_seed(1)) > 0.3)
        mask[..., 0] = True
        seen = mask
    got = prefill.attend_tiles(
        case.query, case.history, case.sinks, case.recent, mask, DIM**-0.5, softcap, decode
    )
    monkeypatch.setattr(torch, "logsumexp", logsumexp)
    keys, values = (part.repeat_interleave(GROUPS, 1) for part in (case.keys, case.values))
    logits = case.query.double() @ keys.transpose(-1, -2) * DIM**-0.5
    logits = logits if softcap is None else softcap * tanh(logits / softcap)
    logits = logits.masked_fill(~seen, -torch.inf)
    wanted, lse = logits.softmax(-1) @ values, logits.logsumexp(-1)
    error = (got.out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error.max() < 1e-5
    torch.testing.assert_close(got.lse.double(), lse, rtol=0, atol=1e-5)
    assert sum(tiles) == PAGES
    most = max(1, min(tile_tokens // 64, tile_bytes // page_bytes))
    assert max(tiles) == min(most, PAGES)
    assert max(scores, default=0) <= max(prefill.TILE_SCORES, 2 * HEADS * GROUPS * 64 * max(tiles))
    assert bool(scores) == (masked or softcap is not None)
