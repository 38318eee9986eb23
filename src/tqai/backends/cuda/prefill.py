"""Attention of many new tokens: history decoded tile by tile, tiles merged by their log-sum-exp.

Extra memory: one tile of decoded keys and values, at most `TILE_TOKENS` tokens of every sequence and KV
head and at most `TILE_BYTES` (but at least one page of each); the tile again for every query head of a KV
head, as flash attention takes it, or, where that cannot serve (mask, soft cap), in float32, with scores
of at most `TILE_SCORES` numbers (but at least one page's): tests/backends/cuda/test_prefill_cpu.py counts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens, History
from tqai.backends.torch_ops.attention import gather_pages
from tqai.core.page import PAGE_TOKENS, PageFormat

__all__ = ["attend_tiles"]

Decode = Callable[[Tensor, PageFormat, torch.dtype], tuple[Tensor, Tensor]]

TILE_TOKENS = 8192
TILE_BYTES = 1 << 28
TILE_SCORES = 1 << 26


class _Merge:
    """Running result `[batch, heads, new_tokens, dim]` float32 with its log-sum-exp."""

    def __init__(self) -> None:
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Take in attention over further tokens; `out` 0 where `lse` is -inf."""
        if self.out is None or self.lse is None:
            self.out, self.lse = out.float(), lse
            return
        total = torch.logaddexp(self.lse, lse)
        anchor = torch.where(total == -torch.inf, 0.0, total)
        self.out = self.out * (self.lse - anchor).exp().unsqueeze(-1) + out.float() * (
            lse - anchor
        ).exp().unsqueeze(-1)
        self.lse = total


def attend_tiles(
    query: Tensor,
    history: History,
    sinks: ExactTokens | None,
    recent: ExactTokens,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    decode: Decode,
) -> Attended:
    """As `Backend.attend`, for any number of new tokens. `decode` gives keys and values `[pages, 64,
    head_dim]` of raw pages uint8 `[pages, page_bytes]`, contiguous, in a dtype."""
    merge = _Merge()
    new_tokens, own = query.shape[2], recent.keys.shape[2]
    position = 0

    def add(tokens: ExactTokens, causal: bool = False) -> None:
        nonlocal position
        count = tokens.keys.shape[2]
        if count:
            seen = None if mask is None else mask[..., position : position + count]
            position += count
            if seen is None and softcap is None:
                merge.add(*_flash(query, tokens, scaling, causal))
            else:
                merge.add(*_plain(query, tokens, seen, scaling, softcap, causal))

    if sinks is not None:
        for tile in _pieces(sinks):
            add(tile)
    pages = _tile_pages(query, history)
    skip = history.first_token
    for first in range(0, history.pages, pages):
        raw = gather_pages(history, first, first + pages)
        keys, values = decode(raw.reshape(-1, raw.shape[-1]).contiguous(), history.page_format, query.dtype)
        shape = (*raw.shape[:3], PAGE_TOKENS, -1)
        tile = ExactTokens(
            *(part.view(shape).transpose(1, 2).flatten(2, 3)[:, :, skip:] for part in (keys, values))
        )
        skip = 0
        add(tile)
    earlier = own - new_tokens
    for tile in _pieces(ExactTokens(recent.keys[:, :, :earlier], recent.values[:, :, :earlier])):
        add(tile)
    add(ExactTokens(recent.keys[:, :, earlier:], recent.values[:, :, earlier:]), causal=True)
    assert merge.out is not None and merge.lse is not None
    limit = torch.finfo(query.dtype).max
    return Attended(merge.out.clamp(-limit, limit).to(query.dtype), merge.lse)


def _tile_pages(query: Tensor, history: History) -> int:
    batch, kv_heads = query.shape[0], history.slabs[0].shape[1] if len(history.slabs) else 1
    spec = history.page_format
    token_bytes = batch * kv_heads * 2 * (spec.key.spec.head_dim + spec.value.spec.head_dim)
    return max(1, min(TILE_TOKENS, TILE_BYTES // max(token_bytes, 1)) // PAGE_TOKENS)


def _pieces(tokens: ExactTokens) -> list[ExactTokens]:
    count = tokens.keys.shape[2]
    return [
        ExactTokens(tokens.keys[:, :, at : at + TILE_TOKENS], tokens.values[:, :, at : at + TILE_TOKENS])
        for at in range(0, count, TILE_TOKENS)
    ]


def _flash(query: Tensor, tokens: ExactTokens, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // tokens.keys.shape[1]
    keys, values = (part.to(query.dtype).repeat_interleave(groups, 1) for part in tokens)
    if keys.shape[-1] != values.shape[-1]:
        return _plain(query, tokens, None, scaling, None, causal)
    dim = query.shape[-1]
    pad = -dim % 8
    if pad:
        query, keys, values = (torch.nn.functional.pad(part, (0, pad)) for part in (query, keys, values))
    result = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, 0.0, causal, False, scale=scaling
    )
    return result[0][..., :dim], result[1]


def _score_rows(query: Tensor, count: int) -> int:
    return max(1, TILE_SCORES // (query.shape[0] * query.shape[1] * count))


def _plain(
    query: Tensor,
    tokens: ExactTokens,
    seen: Tensor | None,
    scaling: float,
    softcap: float | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """In float32, some rows of queries at a time."""
    batch, heads, new_tokens, _ = query.shape
    kv_heads, count = tokens.keys.shape[1:3]
    groups = heads // kv_heads
    keys, values = tokens.keys.float(), tokens.values.float()
    outs, lses = [], []
    step = _score_rows(query, count)
    for start in range(0, new_tokens, step):
        rows = query[:, :, start : start + step].float() * scaling
        taken = rows.shape[2]
        logits = (rows.reshape(batch, kv_heads, groups * taken, -1) @ keys.transpose(-1, -2)).view(
            batch, heads, taken, count
        )
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if seen is not None:
            visible = seen[:, :, start : start + step]
        elif causal:
            index = torch.arange(count, device=query.device)
            visible = (index <= torch.arange(start, start + taken, device=query.device)[:, None])[None, None]
        else:
            visible = None
        if visible is not None:
            logits = logits.masked_fill(~visible, -torch.inf)
        lse = torch.logsumexp(logits, -1)
        weights = (logits - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)).exp()
        if visible is not None:
            # weight 0 times NaN is NaN: tokens that nobody sees are taken out of the product
            somebody = (
                visible.expand(batch, heads, taken, count)
                .reshape(batch, kv_heads, groups * taken, count)
                .any(2)
            )
            part = torch.where(somebody.unsqueeze(-1), values, 0.0)
        else:
            part = values
        outs.append(
            (weights.view(batch, kv_heads, groups * taken, count) @ part).view(batch, heads, taken, -1)
        )
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)
