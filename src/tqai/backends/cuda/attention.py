"""Launches the attention kernels: any batch, pages by address, lengths per sequence on the device.

`attend_pages` never waits for the device, allocates nothing but its result (and, the first time on a
stream, a workspace), reads page addresses and lengths on the device, and can be captured in a CUDA graph.
What does not change from step to step (kernel, grid, most parameters) is prepared once and kept (`calls`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tqai.backends.cuda.calls import prepared_by_identity
from tqai.backends.cuda.params import CHANGING
from tqai.backends.cuda.plan import Shape
from tqai.backends.cuda.workspace import ABSENT, COUNTERS, workspace
from tqai.core.page import PageFormat
from tqai.errors import InputError

__all__ = ["MAX_BATCH", "Exact", "attend_pages"]

MAX_BATCH = 1024
EXACT_TOKENS = 16
"""Exact tokens of one work item."""


class Exact(NamedTuple):
    """Exact keys and values `[batch, kv_heads, tokens, head_dim]`, dense rows of 16-byte alignment.

    `counts`: int32 `[batch]` on the device, valid tokens of each sequence (the first ones), or None: all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor | None = None


def attend_pages(
    query: torch.Tensor,
    page_format: PageFormat,
    addresses: torch.Tensor,
    pages: int,
    scaling: float,
    *,
    page_counts: torch.Tensor | None = None,
    first_token: int = 0,
    sinks: Exact | None = None,
    recent: Exact | None = None,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
    early: bool = False,
    shape: Shape | None = None,
    blocks: int | None = None,
    splits: int | None = None,
    cluster: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over sinks, pages and recent tokens of every sequence, merged, in one launch.

    Args:
        query: `[batch, query_heads, new_tokens, head_dim]` float16 or bfloat16, last axis contiguous.
        addresses: int64 `[batch, >= pages]` on the device, byte address of KV head 0 of each page.
        pages: pages per sequence, or the most of them where `page_counts` is given.
        page_counts: int32 `[batch]` on the device, pages of each sequence.
        first_token: so many tokens of each first page are hidden.
        mask: bool `[batch or 1, query_heads or 1, new_tokens, sinks + history + recent]` or None.
            With a mask, recent lengths are uniform and no causal order is added.
        out_dtype: dtype of the result, by default that of `query`.
        early: addresses and pages were written before the launch that precedes this one on the stream
            was made: their copies may begin before that one has ended.
        shape, blocks, splits, cluster: form of the launch; by default the best that fits. `blocks` cuts
            the line of all work, `splits` every segment, with or without a `cluster` for each.

    Returns:
        `[batch, query_heads, new_tokens, value_head_dim]` and log-sum-exp float32
        `[batch, query_heads, new_tokens]`.

    Raises:
        InputError: too many sequences.
        BackendError: the kernel does not compile or launch.
    """
    device = query.device
    ready = prepared_by_identity(page_format, query.dtype, device)
    batch, query_heads, new_tokens, _ = query.shape
    if batch > MAX_BATCH:
        raise InputError(f"{batch} sequences in one call: at most {MAX_BATCH}")
    exact = recent if recent is not None else sinks
    if exact is None:
        raise InputError("neither recent tokens nor sinks: the number of KV heads is not known")
    kv_heads = exact.keys.shape[1]
    sink_tokens = 0 if sinks is None else sinks.keys.shape[2]
    recent_tokens = 0 if recent is None else recent.keys.shape[2]
    items = -(-recent_tokens // EXACT_TOKENS) + -(-sink_tokens // EXACT_TOKENS)
    ragged = page_counts is not None
    dtype = out_dtype or query.dtype
    group, masked = query_heads // kv_heads, mask is not None
    call = ready.call(
        (
            *(batch, kv_heads, group, new_tokens, pages, sink_tokens, items),
            *(softcap, masked, dtype, shape, blocks, splits, cluster),
        )
    )
    out, lse = torch.empty_like(call.out), torch.empty_like(call.lse)
    recent_counts = None if recent is None else recent.counts
    stream = _stream(device)
    partial = counters = 0
    if call.words:
        if call.awaited:
            partial = workspace(device, stream, ABSENT, call.words)
        else:
            counters = workspace(device, stream, COUNTERS, call.segments)
            held = query.new_empty(call.words, dtype=torch.float32)  # freed in stream order
            partial = held.data_ptr()
    changing = CHANGING.pack(
        addresses.data_ptr(),
        addresses.stride(0),
        0 if page_counts is None else page_counts.data_ptr(),
        0 if recent_counts is None else recent_counts.data_ptr(),
        query.data_ptr(),
        *query.stride()[:3],
        *_where(recent if recent_tokens else None),
        *_where(sinks if sink_tokens else None),
        *_strides(recent if recent_tokens else None),
        *_strides(sinks if sink_tokens else None),
        *_mask(mask),
        partial,
        counters,
        out.data_ptr(),
        lse.data_ptr(),
        recent_tokens,
        first_token,
        early and not ragged,
        scaling,
    )
    call.launch(changing + call.sizes, stream)
    return out, lse


def _where(exact: Exact | None) -> tuple[int, int]:
    return (0, 0) if exact is None else (exact.keys.data_ptr(), exact.values.data_ptr())


def _strides(exact: Exact | None) -> tuple[int, ...]:
    return (0,) * 6 if exact is None else exact.keys.stride()[:3] + exact.values.stride()[:3]


def _mask(mask: torch.Tensor | None) -> tuple[int, ...]:
    if mask is None:
        return (0,) * 5
    rows, heads, step, token = mask.stride()
    batch, query_heads = mask.shape[:2]
    return mask.data_ptr(), rows if batch > 1 else 0, heads if query_heads > 1 else 0, step, token


def _stream(device: torch.device) -> int:
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw is not None and device.index is not None:
        return int(raw(device.index))
    return int(torch.cuda.current_stream(device).cuda_stream)
