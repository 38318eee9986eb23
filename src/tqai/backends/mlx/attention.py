"""Attention over packed history and exact tokens, in MLX operations.

History is read in tiles of pages: a tile's codes become centroids, the scores are taken in the rotated
space, and an online softmax (Milakov and Gimelshein, arXiv 1805.02867) carries the running maximum and
sum from tile to tile. The values' accumulator stays in the rotated space and is un-rotated once at the
end. MLX is lazy: every tile is made to depend on the result of the one before it, so that no more than
one is in memory at a time.

Slabs here are uint8 `[batch, kv_heads, pages, page_bytes]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

from tqai.backends.base import Attended, ExactTokens
from tqai.backends.mlx.codes import compiled, mlx_codec
from tqai.backends.mlx.pages import split_pages
from tqai.core.page import PAGE_TOKENS, PageFormat

__all__ = ["Partial", "attend", "empty_partial", "history_partial"]

Array = Any

TILE_TOKENS = 64 * PAGE_TOKENS
TILE_SCORES = 1 << 24
"""Most scores of one tile: 64 MiB in float32. Bounds the extra memory of long prefill chunks."""


class Partial(NamedTuple):
    """An online softmax under way, float32, for queries `[batch, kv_heads, groups, new_tokens]`.

    Attributes:
        top: running maximum of the logits; -inf before the first seen token.
        total: sum of exp(logit - top).
        exact: sum of exp(logit - top) * value of exact tokens, `[..., value_head_dim]`.
        coded: the same of compressed tokens, in the rotated space.
    """

    top: Array
    total: Array
    exact: Array
    coded: Array


def empty_partial(query: Array, value_dim: int) -> Partial:
    """Nothing seen yet, for `query` `[batch, kv_heads, groups, new_tokens, head_dim]`."""
    rows = query.shape[:-1]
    zeros = mx.zeros((*rows, value_dim), mx.float32)
    return Partial(mx.full(rows, -mx.inf, mx.float32), mx.zeros(rows, mx.float32), zeros, zeros)


def attend(
    query: Array,
    slabs: Sequence[Array],
    page_format: PageFormat | None,
    sinks: ExactTokens | None,
    recent: ExactTokens,
    mask: Array | None,
    scaling: float,
    softcap: float | None = None,
    history: Callable[[Array, Partial], Partial | None] | None = None,
) -> Attended:
    """Attention as `Backend.attend` defines it, over sinks, the pages of `slabs` and recent tokens.

    `mask` is None (causal), bool (True where seen) or a floating array that is added to the logits,
    `[batch or 1, query_heads or 1, new_tokens, all tokens]`. `history`, if given, replaces the reading of
    the slabs: it takes the scaled query `[batch, kv_heads, groups, new_tokens, head_dim]` and the partial
    so far, and returns it with all compressed tokens added, or None to leave them to the slabs' reader.

    Accuracy: relative L2 error against float64 attention to the exactly decoded tokens at most 5e-6
    for float32 queries (tests/backends/mlx/test_attend.py).
    """
    batch, query_heads, new_tokens, _ = query.shape
    kv_heads, own = recent.keys.shape[1], recent.keys.shape[2]
    groups = query_heads // kv_heads
    scaled = (query.astype(mx.float32) * scaling).reshape(batch, kv_heads, groups, new_tokens, -1)
    state = empty_partial(scaled, recent.values.shape[-1])
    if mask is not None:
        while mask.ndim < 4:
            mask = mask[None]
        heads = (1, 1) if mask.shape[1] == 1 else (kv_heads, groups)
        mask = mask.reshape(mask.shape[0], *heads, new_tokens, -1)
    position = 0
    if sinks is not None and sinks.keys.shape[2]:
        position = sinks.keys.shape[2]
        state = _add_exact(state, scaled, sinks, None if mask is None else mask[..., :position], softcap)
    if slabs:
        assert page_format is not None
        read = None if history is None else history(scaled, state)
        if read is None:
            state, position = history_partial(state, scaled, slabs, page_format, mask, position, softcap)
        else:
            state = read
            position += sum(slab.shape[2] for slab in slabs) * PAGE_TOKENS
    tile = _tile_tokens(batch * query_heads * new_tokens)
    for start in range(0, own, tile):
        stop = min(start + tile, own)
        part = ExactTokens(recent.keys[:, :, start:stop], recent.values[:, :, start:stop])
        if mask is not None:
            seen = mask[..., position + start : position + stop]
        else:
            seen = _causal(new_tokens, own, start, stop)
        state = _add_exact(state, scaled, part, seen, softcap)
    weighted = state.exact
    if slabs:
        assert page_format is not None
        weighted = weighted + mlx_codec(page_format.value).unrotate(state.coded)
    total = state.total[..., None]
    out = mx.where(total > 0, weighted / total, 0.0)
    # a NaN that is in sight must show: `total > 0` is false for it
    out = mx.where(mx.isnan(total), mx.nan, out)
    limit = mx.finfo(query.dtype).max
    out = mx.clip(out, -limit, limit).astype(query.dtype).reshape(batch, query_heads, new_tokens, -1)
    return Attended(out, (state.top + mx.log(state.total)).reshape(batch, query_heads, new_tokens))


def history_partial(
    state: Partial,
    scaled: Array,
    slabs: Sequence[Array],
    page_format: PageFormat,
    mask: Array | None,
    position: int,
    softcap: float | None,
) -> tuple[Partial, int]:
    """`state` with all pages of `slabs` added, and the mask column behind them.

    `mask` is `[batch or 1, kv_heads or 1, groups or 1, new_tokens, tokens]` or None (all seen);
    `position` is its column of the first page's first token.
    """
    batch, kv_heads, groups, new_tokens, _ = scaled.shape
    rotated = mlx_codec(page_format.key).rotate(scaled)
    tile_pages = _tile_tokens(batch * kv_heads * groups * new_tokens) // PAGE_TOKENS
    add = _tile_function(page_format, softcap)
    for slab in slabs:
        for first in range(0, slab.shape[2], tile_pages):
            # copied out of the slab only when the tile before is done with
            raw = mx.depends(slab, state.coded)[:, :, first : first + tile_pages]
            tokens = raw.shape[2] * PAGE_TOKENS
            seen = [] if mask is None else [mask[..., position : position + tokens]]
            state = Partial(*add(*state, rotated, raw, *seen))
            position += tokens
    return state, position


@lru_cache(maxsize=64)
def _tile_function(page_format: PageFormat, softcap: float | None) -> Callable[..., Any]:
    """Adds one tile of pages to an online softmax; the same object for the same pages."""
    key_codec, value_codec = mlx_codec(page_format.key), mlx_codec(page_format.value)

    def add(
        top: Array, total: Array, exact: Array, coded: Array, rotated: Array, raw: Array, *mask: Array
    ) -> tuple[Array, ...]:
        batch, kv_heads, groups, new_tokens, _ = rotated.shape
        parts = split_pages(raw, page_format)
        tokens = raw.shape[2] * PAGE_TOKENS

        def flat(x: Array) -> Array:
            return x.reshape(batch, kv_heads, tokens, -1)

        keys = flat(key_codec.lookup(parts.key_codes))
        rows = rotated.reshape(batch, kv_heads, groups * new_tokens, -1)
        logits = (rows @ keys.swapaxes(-1, -2)) * parts.key_scales.astype(mx.float32).reshape(
            batch, kv_heads, 1, tokens
        )
        logits = _cap(logits.reshape(batch, kv_heads, groups, new_tokens, tokens), softcap)
        logits, seen = _masked(logits, mask[0] if mask else None)
        state, weights = _weigh(Partial(top, total, exact, coded), logits)
        weights = weights * parts.value_scales.astype(mx.float32).reshape(batch, kv_heads, 1, 1, tokens)
        if seen is not None:
            # a masked token may carry a NaN scale: select, do not multiply
            weights = mx.where(seen, weights, 0.0)
        values = flat(value_codec.lookup(parts.value_codes))
        weights = weights.reshape(batch, kv_heads, groups * new_tokens, tokens)
        coded = state.coded + (weights @ values).reshape(state.coded.shape)
        return state.top, state.total, state.exact, coded

    return compiled(add)


def _add_exact(
    state: Partial, scaled: Array, tokens: ExactTokens, mask: Array | None, softcap: float | None
) -> Partial:
    keys = tokens.keys.astype(mx.float32)[:, :, None]
    values = tokens.values.astype(mx.float32)[:, :, None]
    logits, seen = _masked(_cap(scaled @ keys.swapaxes(-1, -2), softcap), mask)
    if seen is not None:
        # weight 0 times NaN is NaN: a value that no query sees must not enter the product
        values = mx.where(seen.any(axis=3).any(axis=2, keepdims=True)[..., None], values, 0.0)
    state, weights = _weigh(state, logits)
    return state._replace(exact=state.exact + weights @ values)


def _masked(logits: Array, mask: Array | None) -> tuple[Array, Array | None]:
    """The logits with -inf where a token is out of sight, and which are in sight (None: all)."""
    if mask is None:
        return logits, None
    if mask.dtype != mx.bool_:
        seen = mask > mx.finfo(mask.dtype).min / 2
        return mx.where(seen, logits + mask.astype(mx.float32), -mx.inf), seen
    return mx.where(mask, logits, -mx.inf), mask


def _weigh(state: Partial, logits: Array) -> tuple[Partial, Array]:
    """Weights of `logits` `[..., new_tokens, tokens]`, and the state shrunk and their sum added."""
    top = mx.maximum(state.top, logits.max(-1))
    # a query that has seen nothing yet keeps -inf; subtracting it from itself would give NaN
    anchor = mx.where(top == -mx.inf, 0.0, top)
    weights = mx.exp(logits - anchor[..., None])
    shrink = mx.exp(state.top - anchor)
    total = state.total * shrink + weights.sum(-1)
    wide = shrink[..., None]
    return Partial(top, total, state.exact * wide, state.coded * wide), weights


def _causal(new_tokens: int, own: int, start: int, stop: int) -> Array | None:
    """Which of the tokens start..stop-1 of `own` tokens the last `new_tokens` of them see; None: all."""
    if stop <= own - new_tokens + 1:
        return None
    seen = mx.arange(start, stop) <= mx.arange(own - new_tokens, own)[:, None]
    return seen[None, None, None]


def _cap(logits: Array, softcap: float | None) -> Array:
    return logits if softcap is None else softcap * mx.tanh(logits / softcap)


def _tile_tokens(rows: int) -> int:
    """Tokens of a tile for `rows` queries of all heads and sequences: whole pages, at least one."""
    fitting = max(TILE_SCORES // rows, PAGE_TOKENS) // PAGE_TOKENS * PAGE_TOKENS
    return min(fitting, TILE_TOKENS)
