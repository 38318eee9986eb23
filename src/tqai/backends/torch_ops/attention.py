"""Attention over packed history and exact tokens, in torch operations.

History is read in tiles of pages: a tile's codes become centroids, the scores are taken in the
rotated space, and an online softmax (Milakov and Gimelshein, arXiv 1805.02867) carries the running
maximum and sum from tile to tile. The values' accumulator stays in the rotated space and is
un-rotated once at the end. Exact tokens (sinks, window, the step's own) go through the same softmax
into an accumulator of their own.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens, History
from tqai.backends.torch_ops.codes import torch_codec
from tqai.backends.torch_ops.log_scale import from_steps
from tqai.core.page import BASE_BYTES, PAGE_TOKENS, PageFormat

__all__ = ["attend", "gather_pages", "split_page", "within_counts"]

TILE_SCORES = 1 << 24
"""Most scores of one tile: 64 MiB in float32. Bounds the extra memory of long prefill chunks."""
MAX_TILE_TOKENS = 32 * PAGE_TOKENS


class _Softmax:
    """Online softmax of the queries `[batch, kv_heads, groups, new_tokens]`, float32 throughout.

    `top` is the running maximum of the logits, `total` the sum of exp(logit - top); `exact` and
    `coded` are the accumulators `[..., value_head_dim]`, the latter in the rotated space.
    """

    def __init__(self, query: Tensor, value_dim: int) -> None:
        self.top = query.new_full(query.shape[:-1], -torch.inf)
        self.total = query.new_zeros(query.shape[:-1])
        self.exact = query.new_zeros((*query.shape[:-1], value_dim))
        self.coded = torch.zeros_like(self.exact)

    def weigh(self, logits: Tensor) -> Tensor:
        """Weights of `logits` `[..., new_tokens, tokens]` after shrinking what was accumulated."""
        top = torch.maximum(self.top, logits.amax(-1))
        # a query that has seen nothing yet keeps -inf; subtracting it from itself would give NaN
        anchor = torch.where(top == -torch.inf, 0.0, top)
        weights = torch.exp(logits - anchor.unsqueeze(-1))
        shrink = torch.exp(self.top - anchor)
        self.top = top
        self.total = self.total * shrink + weights.sum(-1)
        self.exact = self.exact * shrink.unsqueeze(-1)
        self.coded = self.coded * shrink.unsqueeze(-1)
        return weights


def attend(
    query: Tensor,
    history: History | None,
    sinks: ExactTokens | None,
    recent: ExactTokens,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Attended:
    """Attention as `Backend.attend` defines it; `history` None means no compressed tokens.

    Accuracy: relative L2 error against float64 attention to the exactly decoded tokens at most 5e-6
    for float32 queries (tests/conformance/test_attend.py).
    """
    batch, query_heads, new_tokens, _ = query.shape
    kv_heads, own = recent.keys.shape[1], recent.keys.shape[2]
    groups = query_heads // kv_heads
    scaled = (query.float() * scaling).reshape(batch, kv_heads, groups, new_tokens, -1)
    state = _Softmax(scaled, recent.values.shape[-1])
    if history is not None and history.counts is not None:
        mask = within_counts(history, mask, 0 if sinks is None else sinks.keys.shape[2], new_tokens, own)
    if mask is not None:
        heads = (1, 1) if mask.shape[1] == 1 else (kv_heads, groups)
        mask = mask.reshape(mask.shape[0], *heads, new_tokens, -1)
    tile_tokens = max(TILE_SCORES // (batch * query_heads * new_tokens), PAGE_TOKENS)
    tile_tokens = min(tile_tokens // PAGE_TOKENS * PAGE_TOKENS, MAX_TILE_TOKENS)
    position = 0

    if sinks is not None and sinks.keys.shape[2]:
        seen = None if mask is None else mask[..., : sinks.keys.shape[2]]
        _add_exact(state, scaled, sinks, seen, softcap)
        position = sinks.keys.shape[2]

    if history is not None and history.tokens:
        _add_history(state, scaled, history, mask, position, tile_tokens, softcap)
        position += history.tokens

    for start in range(0, own, tile_tokens):
        stop = min(start + tile_tokens, own)
        tile = ExactTokens(recent.keys[:, :, start:stop], recent.values[:, :, start:stop])
        if mask is not None:
            seen = mask[..., position + start : position + stop]
        else:
            seen = _causal(new_tokens, own, start, stop, query.device)
        _add_exact(state, scaled, tile, seen, softcap)

    weighted = state.exact
    if history is not None:
        weighted = weighted + _unrotated(state.coded, history.page_format)
    total = state.total.unsqueeze(-1)
    out = torch.where(total > 0, weighted / total, 0.0)
    # a NaN that is in sight must show: `total > 0` is false for it
    out = torch.where(total.isnan(), torch.nan, out)
    limit = min(torch.finfo(dtype).max for dtype in (query.dtype, out.dtype))
    out = out.clamp(-limit, limit).to(query.dtype).reshape(batch, query_heads, new_tokens, -1)
    return Attended(out, (state.top + state.total.log()).reshape(batch, query_heads, new_tokens))


def _unrotated(coded: Tensor, page_format: PageFormat) -> Tensor:
    """Sums over values, back from the rotated space."""
    if page_format.value.spec.rotation == "identity":
        return coded
    return coded @ torch_codec(page_format.value, coded.device).rotation


def _add_history(
    state: _Softmax,
    scaled: Tensor,
    history: History,
    mask: Tensor | None,
    position: int,
    tile_tokens: int,
    softcap: float | None,
) -> None:
    page_format = history.page_format
    key_codec = torch_codec(page_format.key, scaled.device)
    value_codec = torch_codec(page_format.value, scaled.device)
    rotated = scaled @ key_codec.rotation.T
    batch, kv_heads, groups, new_tokens, _ = scaled.shape
    rotated = rotated.reshape(batch, kv_heads, groups * new_tokens, -1)
    tile_pages = tile_tokens // PAGE_TOKENS
    skip = history.first_token
    for first_page in range(0, history.pages, tile_pages):
        raw = gather_pages(history, first_page, first_page + tile_pages)
        key_codes, key_scales, value_codes, value_scales = split_page(raw.transpose(1, 2), page_format)
        keys = key_codec.lookup(key_codes).flatten(2, 3)
        values = value_codec.lookup(value_codes).flatten(2, 3)
        key_scales, value_scales = key_scales.flatten(2), value_scales.flatten(2)
        if skip:
            keys, values = keys[:, :, skip:], values[:, :, skip:]
            key_scales, value_scales = key_scales[..., skip:], value_scales[..., skip:]
            skip = 0
        tokens = keys.shape[2]
        logits = (rotated @ keys.transpose(-1, -2)) * key_scales.float().unsqueeze(-2)
        logits = _cap(logits.unflatten(2, (groups, new_tokens)), softcap)
        value_scales = value_scales.float()[:, :, None, None]
        if mask is not None:
            seen = mask[..., position : position + tokens]
            weights = state.weigh(torch.where(seen, logits, -torch.inf))
            # a masked token may carry a NaN scale: select, do not multiply
            weights = torch.where(seen, weights * value_scales, 0.0)
        else:
            weights = state.weigh(logits) * value_scales
        state.coded += (weights.flatten(2, 3) @ values).unflatten(2, (groups, new_tokens))
        position += tokens


def _add_exact(
    state: _Softmax, scaled: Tensor, tokens: ExactTokens, seen: Tensor | None, softcap: float | None
) -> None:
    keys, values = tokens.keys.float().unsqueeze(2), tokens.values.float().unsqueeze(2)
    logits = _cap(scaled @ keys.transpose(-1, -2), softcap)
    if seen is not None:
        logits = torch.where(seen, logits, -torch.inf)
        # weight 0 times NaN is NaN: a value that no query sees must not enter the product
        seen_by_any = seen.any(dim=3).any(dim=2, keepdim=True).unsqueeze(-1)
        values = torch.where(seen_by_any, values, 0.0)
    weights = state.weigh(logits)
    state.exact += weights @ values


def _causal(new_tokens: int, own: int, start: int, stop: int, device: torch.device) -> Tensor | None:
    """Which of the tokens start..stop-1 of `own` tokens the last `new_tokens` of them see; None: all."""
    if stop <= own - new_tokens + 1:
        return None
    query_position = torch.arange(own - new_tokens, own, device=device)
    seen = torch.arange(start, stop, device=device) <= query_position[:, None]
    return seen[None, None, None]


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def within_counts(history: History, mask: Tensor | None, sinks: int, new_tokens: int, own: int) -> Tensor:
    """`mask` of a step (None is causal) less the tokens of pages that a sequence has not got.

    For `history.counts`; `sinks` and `own` count the exact tokens before and after the history.
    Returns bool `[batch, query_heads or 1, new_tokens, sinks + history + own]`.
    """
    assert history.counts is not None
    device = history.counts.device
    column = torch.arange(history.tokens, device=device) + history.first_token
    present = column < history.counts[:, None] * PAGE_TOKENS
    present = F.pad(present, (sinks, own), value=True)[:, None, None]
    if mask is not None:
        return mask & present
    seen = torch.ones((new_tokens, present.shape[-1]), dtype=torch.bool, device=device)
    return present & seen.tril(present.shape[-1] - new_tokens)


def gather_pages(history: History, start: int, stop: int) -> Tensor:
    """Raw pages start..stop-1 of every sequence, uint8 `[batch, pages, kv_heads, page_bytes]`.

    A view where the pages lie side by side in one slab, else a copy of this tile alone.
    """
    ids = history.table[:, start:stop]
    flat = ids.reshape(-1)
    slab_of = np.searchsorted(history.slab_starts, flat, side="right") - 1
    # runs of neighbouring pages in one slab
    cuts = np.flatnonzero((np.diff(flat) != 1) | (np.diff(slab_of) != 0)) + 1
    runs = []
    for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), flat.size], strict=True):
        slab = int(slab_of[first])
        row = int(flat[first]) - history.slab_starts[slab]
        runs.append(history.slabs[slab][row : row + last - first])
    pages = runs[0] if len(runs) == 1 else torch.cat(runs)
    return pages.unflatten(0, ids.shape)


def split_page(raw: Tensor, page_format: PageFormat) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Key codes, key scales, value codes, value scales of raw pages uint8 `[..., page_bytes]`:
    codes uint8 `[..., 64, row_bytes]`, scales `[..., 64]`, bfloat16 or (log8) float32."""
    parts = []
    for codes_at, row_bytes, scales_at, base_at in (
        (0, page_format.key.row_bytes, page_format.key_scales_at, page_format.bases_at),
        (
            page_format.value_codes_at,
            page_format.value.row_bytes,
            page_format.value_scales_at,
            page_format.bases_at + BASE_BYTES,
        ),
    ):
        codes = raw[..., codes_at : codes_at + PAGE_TOKENS * row_bytes]
        scales = raw[..., scales_at : scales_at + page_format.part_scales_bytes]
        if page_format.scale_format == "bfloat16":
            scales = scales.contiguous().view(torch.bfloat16)
        else:
            scales = from_steps(scales, raw[..., base_at : base_at + BASE_BYTES])
        parts += [codes.unflatten(-1, (PAGE_TOKENS, row_bytes)), scales]
    return parts[0], parts[1], parts[2], parts[3]
