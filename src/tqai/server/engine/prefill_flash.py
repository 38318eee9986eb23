"""Attention of a prompt's chunk on a GPU, put together from torch's flash attention.

What a chunk sees is no mask that flash attention knows, but falls into two parts, each one call over
sequences of rows that overlap in the keys that they read, and the two are merged by their log-sum-exp:

    exact    each block of 64 tokens with the W tokens before it, causal
    coded    sinks, the pages before the chunk and the pages of the blocks before its own, decoded once per
             chunk; no mask, so that the heads that share a KV head are rows beside each other

    keys     | sinks | page 0 | page 1 | ... | pages of the chunk itself    |
    block b  | <------------- first + 64 b tokens ------------> |

Uncompressed tokens are the same in a page and outside, so there a chunk is one causal block.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens
from tqai.core.page import PAGE_TOKENS

__all__ = ["TILE_PAGES", "ChunkAttention", "ChunkBlocks", "serves"]

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


class ChunkBlocks:
    """Where the blocks of a chunk begin, as flash attention wants it told: int32 on the device.

    Attributes:
        tokens, size: of the chunk, and of a block; the last may be shorter.
        starts: `[blocks + 1]`, first token of each block, and the end.
        lengths: `[blocks]`, exact tokens that a block sees: the window before it and itself.
        before: `[blocks]`, tokens in the blocks before each.
    """

    def __init__(self, tokens: int, window: int, by_blocks: bool, device: torch.device) -> None:
        self.tokens, self.window = tokens, window
        self.size = PAGE_TOKENS if by_blocks else tokens
        starts = [*range(0, tokens, self.size), tokens]
        lengths = [window + stop - start for start, stop in pairwise(starts)]
        rows = torch.tensor([starts, [*lengths, 0]], dtype=torch.int32).to(device)
        self.starts, self.lengths = rows[0], rows[1, :-1]
        self.before = self.starts[:-1]
        self.zeros = torch.zeros_like(self.starts)


class ChunkAttention:
    """Attention of a chunk's queries `[1, heads, tokens, dim]` to what is added, each of them once."""

    def __init__(self, query: Tensor, kv_heads: int, scaling: float, blocks: ChunkBlocks) -> None:
        self.query, self.scaling, self.blocks = query, scaling, blocks
        self.group = query.shape[1] // kv_heads
        self._by_head = query[0].unflatten(0, (kv_heads, self.group))
        self._rows: Tensor | None = None
        # out [kv_heads, group, tokens, dim], lse [kv_heads, group, tokens], first token
        self._parts: list[tuple[Tensor, Tensor, int]] = []

    def add_own(self, own: ExactTokens) -> None:
        """Exact tokens `[1, kv_heads, window + tokens, dim]`, as each block sees them: the window before it
        and itself, causal."""
        blocks = self.blocks
        keys, values = (part[0].transpose(0, 1) for part in own)
        lengths = (min(blocks.size, blocks.tokens), blocks.window + min(blocks.size, blocks.tokens))
        query = self.query[0].transpose(0, 1)
        out, lse = _flash(
            query, keys, values, blocks.starts, blocks.starts, blocks.lengths, *lengths, self.scaling, True
        )
        out = out.unflatten(1, (-1, self.group)).permute(1, 2, 0, 3)
        self._parts.append((out, lse.unflatten(0, (-1, self.group)), 0))

    def add(self, seen: ExactTokens) -> None:
        """Every token sees all of `seen` `[1, kv_heads, any, dim]`."""
        count, rows = seen.keys.shape[2], self.blocks.tokens * self.group
        ends = torch.tensor([[0, rows], [count, 0]], dtype=torch.int32).to(self.query.device)
        self._add_rows(seen, ends[0], self.blocks.zeros[:2], ends[1, :1], rows, count, 0)

    def add_coded(self, coded: ExactTokens, first: int) -> None:
        """Block b sees the first `first` + 64 b tokens of `coded` `[1, kv_heads, any, dim]`."""
        blocks = self.blocks
        # a block that sees nothing is left out: flash attention has no number for that
        left = 0 if first else 1
        if len(blocks.before) == left:
            return
        starts = (blocks.starts[left:] - left * PAGE_TOKENS) * self.group
        used = blocks.before[left:] + first
        longest = first + PAGE_TOKENS * (len(blocks.before) - 1)
        zeros = blocks.zeros[left:]
        self._add_rows(coded, starts, zeros, used, PAGE_TOKENS * self.group, longest, left * PAGE_TOKENS)

    def _add_rows(
        self,
        seen: ExactTokens,
        starts: Tensor,
        key_starts: Tensor,
        used: Tensor,
        most_rows: int,
        most_keys: int,
        first_token: int,
    ) -> None:
        if self._rows is None:
            # [tokens, group, kv_heads, dim]: a KV head's rows of a block lie beside each other
            self._rows = self._by_head.permute(2, 1, 0, 3).contiguous()
        rows = self._rows[first_token:]
        keys, values = (part[0].transpose(0, 1) for part in seen)
        out, lse = _flash(
            rows.flatten(0, 1),
            keys,
            values,
            starts,
            key_starts,
            used,
            most_rows,
            most_keys,
            self.scaling,
            False,
        )
        out = out.unflatten(0, (-1, self.group)).permute(2, 1, 0, 3)
        self._parts.append((out, lse.unflatten(1, (-1, self.group)).transpose(1, 2), first_token))

    def result(self) -> Attended:
        """In the query's dtype. The part of all tokens has to be the first that was added."""
        out, lse, _ = self._parts[0]
        for number, (other, other_lse, start) in enumerate(self._parts[1:], 2):
            dtype = self.query.dtype if number == len(self._parts) else torch.float32
            # tokens first in memory, as the model goes on with them
            made = out.new_empty((out.shape[2], *out.shape[:2], out.shape[3]), dtype=dtype).permute(
                1, 2, 0, 3
            )
            made_lse = torch.empty_like(lse, dtype=torch.float32, memory_format=torch.contiguous_format)
            if start:
                made[:, :, :start], made_lse[:, :, :start] = out[:, :, :start], lse[:, :, :start]
            one, one_lse = out[:, :, start:], lse[:, :, start:]
            _merge(one, one_lse, other, other_lse, made[:, :, start:], made_lse[:, :, start:])
            out, lse = made, made_lse
        return Attended(out.flatten(0, 1)[None].to(self.query.dtype), lse.flatten(0, 1)[None])


def _merge(one: Tensor, one_lse: Tensor, other: Tensor, other_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """As `merge_kernel.merge`."""
    if out.device.type == "cuda" and _has_triton():
        from tqai.server.engine.merge_kernel import merge

        merge(one, one_lse, other, other_lse, out, lse)
        return
    total = torch.logaddexp(one_lse, other_lse)
    share, other_share = ((part - total).exp()[..., None] for part in (one_lse, other_lse))
    out.copy_(one.float() * share + other.float() * other_share)
    lse.copy_(total)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _flash(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    used: Tensor,
    most_rows: int,
    most_keys: int,
    scaling: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of sequences of rows: sequence i has rows `starts[i]` to `starts[i + 1] - 1` of `query`
    `[rows, heads, dim]` and sees `used[i]` tokens of `keys` `[tokens, kv_heads, dim]` from `key_starts[i]`
    on; causal: its last row all of them, the one before one fewer. Sequences may share keys.

    Returns `[rows, heads, dim]` and log-sum-exp `[heads, rows]`.
    """
    if query.device.type == "cpu":  # tests of the cutting
        return _plain(query, keys, values, starts, key_starts, used, scaling, causal)
    found = torch.ops.aten._flash_attention_forward(
        query, keys, values, starts, key_starts, most_rows, most_keys, 0.0, causal, False,
        scale=scaling, seqused_k=used,
    )  # fmt: skip
    return found[0], found[1]


def _plain(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    used: Tensor,
    scaling: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // keys.shape[1]
    outs, lses = [], []
    for row, until, key, count in zip(
        starts.tolist(), starts.tolist()[1:], key_starts.tolist(), used.tolist(), strict=False
    ):
        rows = query[row:until].float().transpose(0, 1)
        seen = [
            part[key : key + count].float().transpose(0, 1).repeat_interleave(group, 0)
            for part in (keys, values)
        ]
        logits = scaling * (rows @ seen[0].transpose(1, 2))
        if causal:
            hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1 + count - (until - row))
            logits = logits.masked_fill(hidden, -torch.inf)
        outs.append((logits.softmax(-1) @ seen[1]).transpose(0, 1))
        lses.append(logits.logsumexp(-1))
    return torch.cat(outs).to(query.dtype), torch.cat(lses, dim=1)
