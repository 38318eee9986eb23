"""Launches the attention kernels: any batch, pages by address, lengths per sequence on the device.

`attend_pages` never waits for the device, allocates nothing but its result (and, the first time on a
stream, a workspace), reads page addresses and lengths on the device, and can be captured in a CUDA graph.
What does not change from step to step (kernel, grid, most parameters) is prepared once and kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from tqai.backends.cuda.driver import Kernel, Launch, kernel, shared_memory_bytes
from tqai.backends.cuda.levels import integer_levels
from tqai.backends.cuda.params import CHANGING, Sizes, divisor
from tqai.backends.cuda.plan import (
    COLUMNS,
    MAX_CLUSTER,
    Shape,
    attention_shared_bytes,
    block_count,
    choose_shape,
    codec_macros,
    rotation_plan,
    split_count,
)
from tqai.backends.cuda.trellis_plan import (
    is_trellis,
    level_unit,
    table,
    table_bytes,
    table_forms,
    table_macros,
)
from tqai.backends.cuda.workspace import ABSENT, COUNTERS, workspace
from tqai.core.page import PageFormat
from tqai.errors import BackendError, InputError

__all__ = ["MAX_BATCH", "Exact", "attend_pages", "prepare"]

MAX_BATCH = 1024
DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
OUT_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
EXACT_TOKENS = 16
"""Exact tokens of one work item."""
KEPT_CALLS = 4096
"""Prepared calls that are kept; a new number of pages every 64 tokens makes new ones."""


class Exact(NamedTuple):
    """Exact keys and values `[batch, kv_heads, tokens, head_dim]`, dense rows of 16-byte alignment.

    `counts`: int32 `[batch]` on the device, valid tokens of each sequence (the first ones), or None: all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What depends on sizes alone.

    Attributes: `sizes`, the second half of the parameters; `words`, of partial results, in a buffer that is
    `awaited` or not; `segments`, counters.
    """

    launch: Launch
    sizes: bytes
    words: int
    awaited: bool
    segments: int


class _Prepared:
    """What depends on the page format, the dtype and the device: tables, rotations, kernels, calls."""

    def __init__(self, page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> None:
        self.format = page_format
        self.macros = codec_macros(page_format, DTYPE_NAMES[dtype])
        self.device = device
        self.sizes = Sizes(times256=256)
        self._kept: list[torch.Tensor] = []
        self.shared_limit = shared_memory_bytes(device.index or 0)
        self.table_bytes: int | None = None
        if is_trellis(page_format):
            self._trellis_tables()
        for side, codec in (("k", page_format.key), ("v", page_format.value)):
            if self.table_bytes is None:
                levels = integer_levels(codec)
                target = getattr(self.sizes, f"levels_{side}")
                if codec.spec.bits == 8:
                    lookup = torch.from_numpy(levels.lookup().view("int32")).to(device)
                    setattr(self.sizes, f"lut_{side}", self._keep(lookup))
                else:
                    target.tables[:] = levels.permute_tables()
                target.coefficients[:] = (levels.coef_a, levels.coef_b, levels.unit, levels.kappa)
            plan = torch.from_numpy(rotation_plan(codec)).to(device)
            setattr(self.sizes, f"plan_{side}", self._keep(plan))
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self.has_clusters = torch.cuda.get_device_capability(device) >= (9, 0)
        self._calls: dict[tuple[Any, ...], Call] = {}
        self._clusters: dict[tuple[int, ...], int] = {}
        self.value_dim = page_format.value.spec.head_dim

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _trellis_tables(self) -> None:
        forms = table_forms(self.format, self.shared_limit)
        if forms is None:
            raise BackendError(f"tables of trellis codes do not fit into {self.shared_limit} bytes")
        self.macros |= table_macros(self.format, forms)
        self.table_bytes = table_bytes(self.format, forms)
        sides = (("k", self.format.key), ("v", self.format.value))
        for (side, codec), form in zip(sides, forms, strict=True):
            entries = torch.from_numpy(table(codec, form.pair).view("int32").copy()).to(self.device)
            setattr(self.sizes, f"lut_{side}", self._keep(entries))
            getattr(self.sizes, f"levels_{side}").coefficients[:] = (1.0, 0.0, level_unit(codec), 0.0)

    def shape(self, batch: int) -> Shape:
        found = choose_shape(self.format, self.shared_limit, batch, self.table_bytes)
        if found is None:
            raise BackendError(f"a page of {self.format.page_bytes} bytes does not fit into shared memory")
        return found

    def kernel(self, file: str, shared_bytes: int, shape: Shape, **macros: int) -> Kernel:
        given = {**self.macros, "WARPS": shape.warps, "STAGES": shape.stages, **macros}
        return kernel(file, "tqai_attend", given, self.device, shared_bytes)

    def call(self, key: CallKey) -> Call:
        """The call of these sizes, prepared at first use."""
        found = self._calls.get(key)
        if found is None:
            if len(self._calls) >= KEPT_CALLS:
                self._calls.clear()
            found = self._calls[key] = self._new_call(*key)
        return found

    def _new_call(
        self,
        batch: int,
        kv_heads: int,
        group: int,
        new_tokens: int,
        pages: int,
        sinks: int,
        exact_items: int,
        softcap: float | None,
        masked: bool,
        out_dtype: torch.dtype,
        shape: Shape | None,
        blocks: int | None,
        splits: int | None,
        cluster: bool | None,
    ) -> Call:
        shape = shape or self.shape(batch)
        shared = attention_shared_bytes(self.format, shape, batch, self.table_bytes)
        col_groups = -(-group * new_tokens // COLUMNS)
        segments = batch * kv_heads * col_groups
        items = pages + exact_items
        macros = {"SOFTCAP": int(softcap is not None), "MASKED": int(masked), "OUT": OUT_CODES[out_dtype]}
        if splits is None and blocks is None:
            splits = split_count(self.multiprocessors, segments, items)
        sizes = Sizes.from_buffer_copy(self.sizes)
        threads, words = shape.warps * 32, 0
        part = COLUMNS * (self.value_dim + 2)
        if splits is not None:
            clustered = self.kernel("attend_split.cu", shared, shape, CLUSTER=1, **macros)
            fits = splits == 1 or self._fit(clustered, splits, segments, threads, shared)
            cluster = fits if cluster is None else cluster
            function = clustered
            if not cluster:
                function = self.kernel("attend_split.cu", shared, shape, CLUSTER=0, **macros)
                words = splits * segments * part
            count, grid = splits, (splits, segments)
        else:
            count = blocks or block_count(self.multiprocessors, segments, items)
            function, grid = self.kernel("attend_line.cu", shared, shape, **macros), (count, 1)
            words = count * 2 * part
        launch = Launch(
            function, grid, threads, shared, splits if splits and cluster else 1, self.has_clusters
        )
        sizes.pages, sizes.sinks, sizes.batch, sizes.kv_heads = pages, sinks, batch, kv_heads
        sizes.group, sizes.new_tokens, sizes.col_groups = group, new_tokens, col_groups
        sizes.softcap = softcap or 0.0
        sizes.by_items = divisor(max(items, 1))
        sizes.by_heads = divisor(kv_heads * col_groups)
        sizes.by_col_groups = divisor(col_groups)
        sizes.by_group = divisor(group)
        sizes.by_grid = divisor(count)
        return Call(launch, bytes(sizes), words, splits is not None, segments)

    def _fit(self, function: Kernel, splits: int, segments: int, threads: int, shared: int) -> bool:
        """Whether clusters of `splits` blocks, one for each segment, run all at a time."""
        if not self.has_clusters or splits > MAX_CLUSTER or self.table_bytes is not None:
            return False  # with trellis codes: see `copy_address` in trellis_lookup.cuh
        key = (function.address, splits, threads, shared)
        found = self._clusters.get(key)
        if found is None:
            found = self._clusters[key] = function.clusters(splits, threads, shared)
        return found >= segments


CallKey = tuple[Any, ...]


def prepare(page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> None:
    """Compile and load the kernels that decoding uses most, so that a failure shows early.

    Raises:
        BackendError: they do not compile or load.
    """
    ready = prepared(page_format, dtype, device)
    for pages in (1024, 4):
        ready.call((1, 8, 4, 1, pages, 0, 1, None, False, dtype, None, None, None, None))


@lru_cache(maxsize=64)
def prepared(page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> _Prepared:
    """Tables on the device and kernels of one combination; made once."""
    return _Prepared(page_format, dtype, device)


_BY_IDENTITY: dict[tuple[int, torch.dtype, int | None], tuple[PageFormat, _Prepared]] = {}


def _prepared_fast(page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> _Prepared:
    """As `prepared`, without hashing a page format at every step."""
    key = (id(page_format), dtype, device.index)
    found = _BY_IDENTITY.get(key)
    if found is None:
        if len(_BY_IDENTITY) >= KEPT_CALLS:
            _BY_IDENTITY.clear()
        # holds the format, so that its id stays its own
        found = _BY_IDENTITY[key] = (page_format, prepared(page_format, dtype, device))
    return found[1]


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
    ready = _prepared_fast(page_format, query.dtype, device)
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
    out = query.new_empty((batch, query_heads, new_tokens, ready.value_dim), dtype=dtype)
    lse = query.new_empty((batch, query_heads, new_tokens), dtype=torch.float32)
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
