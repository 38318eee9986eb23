"""Decode attention on uncompressed pages where they lie: the uncompressed mode on a GPU.

Gathering the pages of every sequence at every step and layer would cost twice the memory traffic of the
attention itself. Here a program takes one sequence, one KV head and every so many of its pages, reads page
numbers and lengths on the device, and leaves a partial result; a second kernel merges them.

    page of a head       | 64 keys x DK | 64 values x DV |      numbers of the model's dtype
"""

# mypy: ignore-errors
# Kernels are compiled by Triton, which gives their names meanings of its own.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["attend_exact_pages", "serves"]

TOKENS = tl.constexpr(64)
LOG2E = tl.constexpr(1.4426950408889634)
PROGRAMS = 1056
"""Programs of a launch, about: eight for each multiprocessor of the largest GPUs."""
MOST_SPLITS = 64
WARPS, STAGES = 4, 3


def serves(key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take these shapes."""
    dims = all(16 <= dim <= 256 and dim & (dim - 1) == 0 for dim in (key_dim, value_dim))
    return dims and dtype in (torch.float16, torch.bfloat16)


@triton.jit
def _take(query, keys, values, seen, scale, top, total, acc):
    """Online softmax over one tile of 64 tokens; `seen` bool `[64]`."""
    logits = tl.dot(query, keys) * scale
    logits = tl.where(seen[None, :], logits, float("-inf"))
    best = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp2(logits - best[:, None])
    shrink = tl.exp2(top - best)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
    return best, total, acc


@triton.jit
def _attend_split(
    query, slab, table, page_counts, recent_keys, recent_values, recent_counts, partial, stats,
    scale, room, q_b, q_h, page_stride, r_b, r_h, rv_b, rv_h,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    pages = tl.load(page_counts + batch)
    first = pages * split // SPLITS
    last = pages * (split + 1) // SPLITS
    row, token = tl.arange(0, ROWS), tl.arange(0, TOKENS)
    key_dim, value_dim = tl.arange(0, DK), tl.arange(0, DV)
    at = query + batch * q_b + (head * GROUP + row) * q_h
    mine = tl.load(at[:, None] + key_dim[None, :], mask=(row < GROUP)[:, None], other=0.0)
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DV), tl.float32)
    every = token >= 0
    keys_at = token[None, :] * DK + key_dim[:, None]
    values_at = TOKENS * DK + token[:, None] * DV + value_dim[None, :]
    base = slab + head * (TOKENS * (DK + DV))
    for number in range(first, last):
        page = base + tl.load(table + batch * room + number) * page_stride
        keys = tl.load(page + keys_at)
        values = tl.load(page + values_at)
        top, total, acc = _take(mine, keys, values, every, scale, top, total, acc)
    if split == SPLITS - 1:
        seen = token < tl.load(recent_counts + batch)
        held = recent_keys + batch * r_b + head * r_h
        keys = tl.load(held + keys_at, mask=seen[None, :], other=0.0)
        held = recent_values + batch * rv_b + head * rv_h
        values = tl.load(held + token[:, None] * DV + value_dim[None, :], mask=seen[:, None], other=0.0)
        top, total, acc = _take(mine, keys, values, seen, scale, top, total, acc)
    out = (batch * KV_HEADS + head) * GROUP + row
    out = out * SPLITS + split
    tl.store(partial + out[:, None] * DV + value_dim[None, :], acc, mask=(row < GROUP)[:, None])
    tl.store(stats + out * 2, top, mask=row < GROUP)
    tl.store(stats + out * 2 + 1, total, mask=row < GROUP)


@triton.jit
def _merge_splits(partial, stats, out, lse, DV: tl.constexpr, SPLITS: tl.constexpr):
    place = tl.program_id(0)
    split, value_dim = tl.arange(0, SPLITS), tl.arange(0, DV)
    top = tl.load(stats + (place * SPLITS + split) * 2)
    total = tl.load(stats + (place * SPLITS + split) * 2 + 1)
    best = tl.max(top, 0)
    weight = tl.exp2(top - best)
    whole = tl.sum(total * weight, 0)
    parts = tl.load(partial + (place * SPLITS + split)[:, None] * DV + value_dim[None, :])
    merged = tl.sum(parts * weight[:, None], 0) / whole
    tl.store(out + place * DV + value_dim, merged.to(out.dtype.element_ty))
    tl.store(lse + place, (best + tl.log2(whole)) / LOG2E)


def attend_exact_pages(
    query: Tensor,
    slab: Tensor,
    table: Tensor,
    page_counts: Tensor,
    keys: Tensor,
    values: Tensor,
    recent_counts: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention of one new token per sequence over its pages and its newest tokens, itself included.

    Args:
        query: `[batch, query_heads, 1, key_dim]` float16 or bfloat16.
        slab: of that dtype, `[pages, kv_heads, 64 * (key_dim + value_dim)]`, contiguous.
        table: int64 `[batch, room]` on the device, page numbers, contiguous.
        page_counts: int32 `[batch]` on the device, at most `room`.
        keys, values: `[batch, kv_heads, 64, dim]`, the last two axes contiguous.
        recent_counts: int32 `[batch]` on the device, 1 to 64, how many of `keys` there are.

    Returns:
        `[batch, query_heads, 1, value_dim]` and log-sum-exp float32 `[batch, query_heads, 1]`.

    Accuracy: relative L2 error 3e-3 in bfloat16 (tests/server/test_kernels.py).
    """
    batch, query_heads, _, key_dim = query.shape
    kv_heads, value_dim = keys.shape[1], values.shape[3]
    group = query_heads // kv_heads
    wanted = -(-PROGRAMS // (batch * kv_heads))
    splits = min(triton.next_power_of_2(wanted), MOST_SPLITS)
    partial = query.new_empty((batch * query_heads, splits, value_dim), dtype=torch.float32)
    stats = query.new_empty((batch * query_heads, splits, 2), dtype=torch.float32)
    out = query.new_empty((batch, query_heads, 1, value_dim))
    lse = query.new_empty((batch, query_heads, 1), dtype=torch.float32)
    _attend_split[batch * kv_heads, splits](
        query, slab, table, page_counts, keys, values, recent_counts, partial, stats,
        scaling * 1.4426950408889634, table.stride(0), query.stride(0), query.stride(1), slab.stride(0),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        kv_heads, group, max(16, triton.next_power_of_2(group)), key_dim, value_dim, splits,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    _merge_splits[(batch * query_heads,)](partial, stats, out, lse, value_dim, splits, num_warps=4)
    return out, lse
