"""Attention of a prompt's chunk on a GPU, put together from torch's flash attention.

What a chunk sees is no mask that flash attention knows, but falls into parts without masks, which are merged
by their log-sum-exp:

    sinks and pages before the chunk    every token sees all of them; the pages are decoded once per chunk
    the 64 tokens of its own block      exact, causal
    earlier blocks of the chunk         their pages, decoded; a strict lower triangle of blocks, cut into
                                        rectangles: of 2 s neighbouring blocks the last s see the first s,
                                        for s = 1, 2, 4, ...

Uncompressed tokens are the same in a page and outside, so there a chunk is one causal part.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens
from tqai.core.page import PAGE_TOKENS

__all__ = ["ChunkAttention", "rectangles", "serves"]

TILE_PAGES = 512
"""Pages of history that are decoded at a time."""


def serves(query: Tensor, values: Tensor, softcap: float | None) -> bool:
    """Whether torch's flash attention takes these heads."""
    value_dim = values.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and softcap is None
        and query.shape[-1] == value_dim
        and value_dim % 8 == 0
        and value_dim <= 256
    )


def rectangles(blocks: int) -> list[tuple[int, int, int, int]]:
    """The strict lower triangle of `blocks` blocks as groups of equal rectangles, without overlap.

    Returns (first block, rectangles, columns, rows) of each group: rectangle i has the rows
    first + i (columns + rows) + columns ..., and the `columns` blocks before them as columns.
    """
    found, size = [], 1
    while size < blocks:
        whole, rest = divmod(blocks, 2 * size)
        if whole:
            found.append((0, whole, size, size))
        if rest > size:
            found.append((whole * 2 * size, 1, size, rest - size))
        size *= 2
    return found


class ChunkAttention:
    """Running result of a chunk's queries `[1, heads, tokens, dim]`, which begins with what every token
    sees at least: itself."""

    def __init__(self, query: Tensor, own: ExactTokens, scaling: float, by_blocks: bool) -> None:
        """`own`: the chunk's exact tokens, seen causally: all of them, or within blocks of 64."""
        self.query, self.scaling = query, scaling
        tokens = query.shape[2]
        self.out = query.new_empty((*query.shape[:3], own.values.shape[3]), dtype=torch.float32)
        self.lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        whole = tokens // PAGE_TOKENS * PAGE_TOKENS if by_blocks else tokens
        block = PAGE_TOKENS if by_blocks else whole
        for start, stop, size in ((0, whole, block), (whole, tokens, tokens - whole)):
            if start < stop:
                parts = (query, *own, self.out, self.lse)
                rows, keys, values, out, lse = (_blocks(part[:, :, start:stop], size) for part in parts)
                _take_into(out, lse, *_flash(rows, keys, values, scaling, True), first=True)

    def add(self, seen: ExactTokens) -> None:
        """Every token sees all of `seen`."""
        _take_into(self.out, self.lse, *_flash(self.query, *seen, self.scaling, False))

    def add_lower_blocks(self, coded: ExactTokens) -> None:
        """Each token sees the blocks before its own among `coded`, whole blocks of 64 tokens."""
        tokens, size = self.query.shape[2], PAGE_TOKENS
        blocks = coded.keys.shape[2] // size
        # a last block that is not whole is one more row of the triangle
        rows = -(-tokens // size)
        for first, count, columns, height in rectangles(rows):
            step = (columns + height) * size
            start, stop = first * size, min((first + count * (columns + height)) * size, tokens)
            if count > 1 and stop - start < count * step:
                # the last rectangle is cut short by the end of the prompt
                self._add_rectangles(coded, start, count - 1, columns * size, step)
                start += (count - 1) * step
                self._add_rectangles(coded, start, 1, columns * size, stop - start)
            else:
                self._add_rectangles(coded, start, count, columns * size, min(step, stop - start))
        assert blocks >= rows - 1

    def _add_rectangles(self, coded: ExactTokens, start: int, count: int, columns: int, step: int) -> None:
        stop = start + count * step
        query = _blocks(self.query[:, :, start:stop], step)[:, :, columns:]
        keys, values = (
            _blocks(part[:, :, start : start + columns], columns)
            if count == 1
            else _blocks(part[:, :, start:stop], step)[:, :, :columns]
            for part in coded
        )
        out, lse = _flash(query, keys, values, self.scaling, False)
        held_out = _blocks(self.out[:, :, start:stop], step)[:, :, columns:]
        held_lse = _blocks(self.lse[:, :, start:stop], step)[:, :, columns:]
        _take_into(held_out, held_lse, out, lse)

    def result(self) -> Attended:
        """In the query's dtype."""
        return Attended(self.out.to(self.query.dtype), self.lse)


def _take_into(held: Tensor, held_lse: Tensor, out: Tensor, lse: Tensor, first: bool = False) -> None:
    """As `merge_kernel.take_into`."""
    if out.device.type == "cuda" and _has_triton():
        from tqai.server.engine.merge_kernel import take_into

        take_into(held, held_lse, out, lse, first)
        return
    if first:
        held.copy_(out)
        held_lse.copy_(lse)
        return
    total = torch.logaddexp(held_lse, lse)
    held.mul_((held_lse - total).exp_()[..., None]).add_(out * (lse - total).exp_()[..., None])
    held_lse.copy_(total)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _blocks(part: Tensor, size: int) -> Tensor:
    """`[1, heads, n * size, ...]` as `[n, heads, size, ...]`, a view."""
    return part[0].unflatten(1, (-1, size)).transpose(0, 1)


def _flash(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, causal: bool
) -> tuple[Tensor, Tensor]:
    if query.device.type == "cpu":  # tests of the cutting
        return _plain(query, keys, values, scaling, causal)
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, 0.0, causal, False, scale=scaling
    )
    return found[0], found[1]


def _plain(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, causal: bool
) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1).float(), values.repeat_interleave(group, 1).float()
    logits = scaling * (query.float() @ keys.transpose(-1, -2))
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
    return (logits.softmax(-1) @ values).to(query.dtype), logits.logsumexp(-1)
