"""Launching the Metal kernels, and deciding whether they serve.

A kernel serves where MLX's default device is a Metal GPU, its sizes fit, and `checks` has found that it
agrees with the MLX operations on this very machine; everywhere else MLX operations do its work.
TQAI_MLX_KERNELS=0 turns both kernels off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from tqai.backends.mlx import pages
from tqai.backends.mlx.attention import Partial
from tqai.backends.mlx.codes import MlxCodec, mlx_codec
from tqai.backends.mlx.metal import sources
from tqai.core.page import PAGE_TOKENS, PageFormat

__all__ = ["add_slab", "encode_pages", "encode_with_kernel", "history_reader", "merged", "serves"]

Array = Any

THREADS = 128
MAX_ROWS = 16
MAX_THREADGROUP_BYTES = 32768
MAX_HEAD_DIM = 512
TARGET_THREADGROUPS = 512
"""So many threadgroups at least, where there are pages enough, keep a GPU busy."""


def serves() -> bool:
    """Whether kernels are launched at all: a Metal GPU is the default device, nothing turned them off."""
    on_gpu = mx.default_device().type == mx.DeviceType.gpu and mx.metal.is_available()
    return bool(on_gpu) and os.environ.get("TQAI_MLX_KERNELS", "1") != "0"


def encode_pages(keys: Array, values: Array, page_format: PageFormat) -> Array:
    """As `pages.encode_pages`, by the Metal kernel where it serves."""
    from tqai.backends.mlx.metal.checks import encode_is_right

    if serves() and _fits(page_format, 1) and encode_is_right(page_format):
        return encode_with_kernel(keys, values, page_format)
    return pages.encode_pages(keys, values, page_format)


def history_reader(
    slabs: Sequence[Array], page_format: PageFormat, starts: Sequence[int], stops: Sequence[int]
) -> Callable[[Array, Partial], Partial | None] | None:
    """What `attention.attend` takes as `history`: adds the tokens starts[b]..stops[b]-1 of the slabs.

    None where no kernel serves. The reader itself returns None for queries that no kernel takes.
    """
    from tqai.backends.mlx.metal.checks import attend_is_right

    if not serves():
        return None

    def read(scaled: Array, state: Partial) -> Partial | None:
        rows = scaled.shape[2]
        if scaled.shape[3] != 1 or not _fits(page_format, rows) or not attend_is_right(page_format, rows):
            return None
        at = 0
        for slab in slabs:
            tokens = slab.shape[2] * PAGE_TOKENS
            ranges = np.clip(np.array([starts, stops]).T - at, 0, tokens).astype(np.int32)
            state = add_slab(state, scaled, slab, page_format, mx.array(ranges))
            at += tokens
        return state

    return read


def encode_with_kernel(keys: Array, values: Array, page_format: PageFormat) -> Array:
    """Page records uint8 `[..., page_bytes]` of `keys` and `values` `[..., 64, head_dim]`."""
    lead = keys.shape[:-2]
    key_codec, value_codec = mlx_codec(page_format.key), mlx_codec(page_format.value)
    count = int(np.prod(lead))
    (out,) = _encode_kernel(page_format)(
        inputs=[
            *key_codec.rotated_rows(keys),
            *value_codec.rotated_rows(values),
            *_padded_tables(key_codec),
            *_padded_tables(value_codec),
        ],
        grid=(PAGE_TOKENS, count, 2),
        threadgroup=(PAGE_TOKENS, 1, 1),
        output_shapes=[(*lead, page_format.page_bytes)],
        output_dtypes=[mx.uint8],
    )
    return out


def add_slab(state: Partial, scaled: Array, slab: Array, page_format: PageFormat, ranges: Array) -> Partial:
    """`state` with the tokens `ranges` int32 `[batch, 2]` (first, last + 1) of one slab added.

    `scaled` is `[batch, kv_heads, groups, 1, head_dim]`, `slab` uint8 `[batch, kv_heads, pages, page_bytes]`.
    """
    batch, kv_heads, rows, _, _ = scaled.shape
    key_codec, value_codec = mlx_codec(page_format.key), mlx_codec(page_format.value)
    per_split, splits = division(slab.shape[2], batch * kv_heads)
    out, stats = _attend_kernel(page_format, rows)(
        inputs=[
            key_codec.rotate(scaled),
            slab,
            _padded_tables(key_codec)[1],
            _padded_tables(value_codec)[1],
            ranges,
            mx.array([kv_heads, slab.shape[2], per_split], dtype=mx.int32),
        ],
        grid=(splits * THREADS, kv_heads, batch),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[
            (batch, kv_heads, splits, rows, value_codec.head_dim),
            (batch, kv_heads, splits, rows, 2),
        ],
        output_dtypes=[mx.float32, mx.float32],
    )
    return merged(state, out, stats)


def merged(state: Partial, out: Array, stats: Array) -> Partial:
    """`state` with what the splits of a launch found: `out` `[batch, kv_heads, splits, rows, dim]`, `stats`
    the same with 2 for dim."""
    tops, totals = stats[..., 0], stats[..., 1]
    top = mx.maximum(state.top, tops.max(2)[..., None])
    anchor = mx.where(top == -mx.inf, 0.0, top)
    shrink = mx.exp(state.top - anchor)
    shares = mx.exp(tops - anchor[..., 0][:, :, None])
    total = state.total * shrink + (totals * shares).sum(2)[..., None]
    coded = state.coded * shrink[..., None] + (out * shares[..., None]).sum(2)[..., None, :]
    return Partial(top, total, state.exact * shrink[..., None], coded)


def division(slab_pages: int, heads: int) -> tuple[int, int]:
    """Pages per split and number of splits of a slab, for `heads` KV heads of all sequences."""
    wanted = max(1, min(slab_pages, TARGET_THREADGROUPS // max(heads, 1)))
    per_split = -(-slab_pages // wanted)
    return per_split, -(-slab_pages // per_split)


def _fits(page_format: PageFormat, rows: int) -> bool:
    key, value = page_format.key.spec, page_format.value.spec
    if {key.name, value.name} != {"scalar"}:
        return False
    floats = rows * key.head_dim + (1 << key.bits) + (1 << value.bits) + 3 * rows * PAGE_TOKENS + 3 * rows
    small = max(key.head_dim, value.head_dim) <= MAX_HEAD_DIM and rows <= MAX_ROWS
    return small and 4 * floats <= MAX_THREADGROUP_BYTES


@lru_cache(maxsize=64)
def _encode_kernel(page_format: PageFormat) -> Any:
    sides = ("rotated_keys", "largest_keys", "rotated_values", "largest_values")
    tables = ("key_boundaries", "key_centroids", "value_boundaries", "value_centroids")
    return mx.fast.metal_kernel(
        name="tqai_encode",
        input_names=[*sides, *tables],
        output_names=["out"],
        source=sources.body("encode"),
        header=sources.header(page_format),
    )


@lru_cache(maxsize=64)
def _attend_kernel(page_format: PageFormat, rows: int) -> Any:
    return mx.fast.metal_kernel(
        name="tqai_attend",
        input_names=["query", "pages", "key_centroids", "value_centroids", "ranges", "sizes"],
        output_names=["out", "stats"],
        source=sources.body("attend"),
        header=sources.header(page_format, rows),
    )


@lru_cache(maxsize=64)
def _padded_tables(codec: MlxCodec) -> tuple[Array, Array]:
    """Boundaries and centroids `[256]`: MLX puts inputs of fewer than 8 numbers into another address space,
    which the kernels' functions do not take."""
    boundaries, centroids = (mx.pad(x, (0, 256 - x.shape[0])) for x in (codec.boundaries, codec.centroids))
    mx.eval(boundaries, centroids)
    return boundaries, centroids
