"""Launches the attention kernels: queries rotated, splits of the pages, merge with the exact tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens, History
from tqai.backends.triton import attention_kernels, merge_kernels, slice_kernels
from tqai.backends.triton.slices import SLICES, is_sliced
from tqai.backends.triton.tables import padded, tables

__all__ = ["attend_pages", "split_count"]

LEAST_ROWS = 16
LEAST_SLICED_ROWS = 8
COLUMNS = 64
MERGED_SPLITS = 64
"""Splits whose results are read at once."""
WARPS = {8: 1, 16: 2, 32: 4, 64: 4}
"""Warps of a program on sliced pages, by padded rows; 8 for more."""
REGISTERS = 168
"""Of a lane of a program of one warp, so that 12 fit a multiprocessor."""
STAGES = 3
PROGRAMS_PER_MULTIPROCESSOR = {1: 12, 2: 8}
PLANE_PROGRAMS_PER_MULTIPROCESSOR = 4


def attend_pages(
    query: Tensor,
    history: History,
    sinks: ExactTokens | None,
    recent: ExactTokens,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Attended:
    """As `Backend.attend`, for few new tokens: three launches, partial results of each split in float32."""
    batch, query_heads, new_tokens, dim = query.shape
    page_format = history.page_format
    query, *exact = (
        part if part.stride(-1) == 1 else part.contiguous() for part in (query, *(sinks or recent), *recent)
    )
    kv_heads = recent.keys.shape[1]
    group = query_heads // kv_heads
    segments, rows = batch * kv_heads, group * new_tokens
    value_dim, value_bits = page_format.value.spec.head_dim, page_format.value.spec.bits
    key, value = (tables(codec.spec, query.device) for codec in (page_format.key, page_format.value))
    sliced = is_sliced(page_format)
    row_tile = max(LEAST_SLICED_ROWS if sliced else LEAST_ROWS, padded(rows))
    warps = WARPS.get(row_tile, 8) if sliced else 4
    programs = PROGRAMS_PER_MULTIPROCESSOR.get(warps, 4) if sliced else PLANE_PROGRAMS_PER_MULTIPROCESSOR
    splits = split_count(query.device, segments, history.pages, programs)
    flags = {"MASKED": mask is not None, "SOFTCAP": softcap is not None}
    masked = query if mask is None else mask.view(torch.uint8)
    mask_strides = (0, 0, 0, 0) if mask is None else _mask_strides(mask)
    sink_tokens = sinks.keys.shape[2] if sinks is not None else 0

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    partial, stats = floats(segments * splits * row_tile, value_dim), floats(segments * splits * row_tile, 2)
    out = torch.empty(batch, query_heads, new_tokens, value_dim, dtype=query.dtype, device=query.device)
    lse = floats(batch, query_heads, new_tokens)
    if splits:
        rotated = torch.empty(segments * rows, dim, dtype=torch.float16, device=query.device)
        norms = floats(segments * rows)
        columns = min(COLUMNS, padded(dim))
        merge_kernels.rotate_queries[(segments * rows, -(-dim // columns))](
            query, key.forward, rotated, norms, kv_heads, group, rows, *query.stride()[:3], scaling,
            DIM=dim, DIMP=padded(dim), COLUMNS=columns,
        )  # fmt: skip
        places = (
            page_format.page_bytes, page_format.key_scales_at, page_format.value_codes_at,
            page_format.value_scales_at, history.pages, history.first_token, sink_tokens, kv_heads, group,
            rows, splits, *mask_strides, softcap or 1.0,
        )  # fmt: skip
        shape: dict[str, Any] = {
            "DK": dim, "DV": value_dim, "ROWS": row_tile, **flags,
            "BITS_K": page_format.key.spec.bits, "BITS_V": value_bits,
            "WORDS_K": key.words, "WORDS_V": value.words,
        }  # fmt: skip
        grid = (segments, splits)
        arrays = (history.addresses, history.addresses.stride(0), rotated, norms, masked, partial, stats)
        if sliced:
            options: dict[str, int] = {"num_warps": warps, "num_stages": STAGES}
            if warps == 1 and key.instructions is not None:
                options["maxnreg"] = REGISTERS
            slice_kernels.attend_sliced[grid](
                *arrays, *places, key.sliced_unit, value.sliced_unit, **shape,
                SK=SLICES[shape["BITS_K"]], SV=SLICES[shape["BITS_V"]],
                PTX_K=key.instructions, PTX_V=value.instructions, CUT=history.first_token > 0, **options,
            )  # fmt: skip
        else:
            attention_kernels.attend_split[grid](
                *arrays, key.centroids, value.centroids, *places, key.unit, value.unit, **shape,
                DKP=padded(dim), DVP=padded(value_dim), num_stages=1,
            )  # fmt: skip
    columns = min(COLUMNS, padded(value_dim))
    merge_kernels.merge_splits[(segments * rows, -(-value_dim // columns))](
        query, *exact, masked, partial, stats, value.back, out, lse, history.tokens, sink_tokens,
        recent.keys.shape[2], kv_heads, group, rows, new_tokens, splits, *query.stride()[:3],
        *(stride for part in exact for stride in part.stride()[:3]), *mask_strides, scaling, softcap or 1.0,
        DK=dim, DV=value_dim, DKP=padded(dim), DVP=padded(value_dim), ROWS=row_tile, COLUMNS=columns,
        SPLITS=padded(max(splits, 1)), CHUNK=min(MERGED_SPLITS, padded(max(splits, 1))), **flags, num_warps=8,
    )  # fmt: skip
    return Attended(out, lse)


def split_count(device: torch.device, segments: int, pages: int, programs: int) -> int:
    """Programs among which the pages of a segment are divided: `programs` for each multiprocessor."""
    if device.type != "cuda":
        return min(pages, 3)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    most = min(pages, max(1, multiprocessors * programs // segments))
    # not more than end together: 512 pages among 100 programs take as long as among 86
    return -(-pages // -(-pages // most)) if most else 0


def _mask_strides(mask: Tensor) -> tuple[int, int, int, int]:
    batch, heads, rows, tokens = mask.stride()
    return batch if mask.shape[0] > 1 else 0, heads if mask.shape[1] > 1 else 0, rows, tokens
