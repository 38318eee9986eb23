"""Launches the attention kernel: any batch, pages by address, lengths per sequence on the device.

`attend_pages` never waits for the device, allocates nothing but its result (and, the first time on a
stream, a workspace), reads page addresses and lengths on the device, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from tqai.backends.cuda.driver import Kernel, kernel, shared_memory_bytes
from tqai.backends.cuda.levels import integer_levels
from tqai.backends.cuda.plan import (
    COLUMNS,
    Shape,
    attention_shared_bytes,
    block_count,
    choose_shape,
    codec_macros,
    division,
    rotation_plan,
)
from tqai.core.page import PageFormat
from tqai.errors import BackendError, InputError

__all__ = ["MAX_BATCH", "Exact", "Workspace", "attend_pages", "prepare"]

MAX_BATCH = 1024
DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
OUT_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
EXACT_TOKENS = 16
"""Exact tokens of one work item."""


class _Levels(ctypes.Structure):
    _fields_ = [("tables", ctypes.c_uint32 * 4), ("coefficients", ctypes.c_float * 4)]


class _Divisor(ctypes.Structure):
    _fields_ = [("factor", ctypes.c_uint32), ("shift", ctypes.c_uint32)]


@lru_cache(maxsize=1024)
def _divisor(divisor: int) -> _Divisor:
    return _Divisor(*division(divisor))


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class _Params(ctypes.Structure):
    """`Params` of attention.cu, field by field."""

    _fields_ = [
        *_fields(ctypes.c_uint64, "addresses"),
        *_fields(ctypes.c_int64, "address_stride"),
        *_fields(ctypes.c_uint64, "page_counts", "recent_counts"),
        *_fields(ctypes.c_int32, "pages", "sinks", "recent", "first_token"),
        *_fields(ctypes.c_int32, "batch", "kv_heads", "group", "new_tokens", "col_groups"),
        *_fields(_Divisor, "by_items", "by_heads", "by_col_groups", "by_group", "by_grid"),
        *_fields(ctypes.c_float, "scaling", "softcap"),
        *_fields(ctypes.c_uint64, "query"),
        *_fields(ctypes.c_int64 * 3, "query_strides"),
        *_fields(ctypes.c_uint64, "plan_k", "plan_v", "lut_k", "lut_v"),
        *_fields(_Levels, "levels_k", "levels_v"),
        *_fields(ctypes.c_uint64, "recent_keys", "recent_values", "sink_keys", "sink_values"),
        *_fields(ctypes.c_int64 * 3, "recent_key_strides", "recent_value_strides"),
        *_fields(ctypes.c_int64 * 3, "sink_key_strides", "sink_value_strides"),
        *_fields(ctypes.c_uint64, "mask"),
        *_fields(ctypes.c_int64 * 4, "mask_strides"),
        *_fields(ctypes.c_uint64, "partial", "counters", "out", "lse"),
    ]


@dataclass(frozen=True)
class Exact:
    """Exact keys and values `[batch, kv_heads, tokens, head_dim]`, dense rows of 16-byte alignment.

    `counts`: int32 `[batch]` on the device, valid tokens of each sequence (the first ones), or None: all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor | None = None


class Workspace:
    """Partial results and arrival counters. One per stream: launches on it follow one another."""

    def __init__(self, device: torch.device, floats: int, segments: int) -> None:
        self.partial = torch.empty(floats, dtype=torch.float32, device=device)
        self.counters = torch.zeros(segments, dtype=torch.int32, device=device)

    def holds(self, floats: int, segments: int) -> bool:
        return self.partial.numel() >= floats and self.counters.numel() >= segments


# Workspaces are never freed: a captured graph may hold their addresses. Calls of one stream follow one
# another and share one; all captured graphs share one too, so they must not be replayed at the same time.
_WORKSPACES: dict[tuple[torch.device, int], Workspace] = {}
_CAPTURED = -1
LEAST_FLOATS = 1 << 19
LEAST_SEGMENTS = 1 << 16


def _workspace(device: torch.device, stream: int, floats: int, segments: int) -> Workspace:
    captured = torch.cuda.is_current_stream_capturing()
    key = (device, _CAPTURED if captured else stream)
    found = _WORKSPACES.get(key)
    if found is not None and found.holds(floats, segments):
        return found
    made = Workspace(device, max(floats, LEAST_FLOATS), max(2 * segments, LEAST_SEGMENTS))
    if not captured:  # one made under capture belongs to its graph, which zeroes it at every replay
        if found is not None:
            _OUTGROWN.append(found)
        _WORKSPACES[key] = made
    return made


_OUTGROWN: list[Workspace] = []


class _Prepared:
    """What depends on the page format, the dtype and the device alone: tables, rotations, parameters."""

    def __init__(self, page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> None:
        self.format = page_format
        self.macros = codec_macros(page_format, DTYPE_NAMES[dtype])
        self.device = device
        self.params = _Params()
        self._kept: list[torch.Tensor] = []
        for side, codec in (("k", page_format.key), ("v", page_format.value)):
            levels = integer_levels(codec)
            target = getattr(self.params, f"levels_{side}")
            if codec.spec.bits == 8:
                lookup = torch.from_numpy(levels.lookup().view("int32")).to(device)
                setattr(self.params, f"lut_{side}", self._keep(lookup))
            else:
                target.tables[:] = levels.permute_tables()
            target.coefficients[:] = (levels.coef_a, levels.coef_b, levels.unit, levels.kappa)
            plan = torch.from_numpy(rotation_plan(codec)).to(device)
            setattr(self.params, f"plan_{side}", self._keep(plan))
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self.shared_limit = shared_memory_bytes(device.index or 0)
        self._kernels: dict[tuple[Any, ...], Kernel] = {}
        self._shapes: dict[int, Shape] = {}
        self._shared: dict[tuple[Shape, int], int] = {}
        if (device, _CAPTURED) not in _WORKSPACES:
            _WORKSPACES[device, _CAPTURED] = Workspace(device, LEAST_FLOATS, LEAST_SEGMENTS)
        self.value_dim = page_format.value.spec.head_dim

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def shape(self, batch: int) -> Shape:
        found = self._shapes.get(batch)
        if found is None:
            found = choose_shape(self.format, self.shared_limit, batch)
            if found is None:
                raise BackendError(
                    f"a page of {self.format.page_bytes} bytes does not fit into shared memory"
                )
            self._shapes[batch] = found
        return found

    def shared(self, shape: Shape, batch: int) -> int:
        found = self._shared.get((shape, batch))
        if found is None:
            found = self._shared[shape, batch] = attention_shared_bytes(self.format, shape, batch)
        return found

    def kernel(
        self, shape: Shape, softcap: bool, masked: bool, out: torch.dtype, shared_bytes: int
    ) -> Kernel:
        key = (shape, softcap, masked, out)
        found = self._kernels.get(key)
        if found is None:
            macros = {
                **self.macros,
                "WARPS": shape.warps,
                "STAGES": shape.stages,
                "SOFTCAP": int(softcap),
                "MASKED": int(masked),
                "OUT": OUT_CODES[out],
            }
            found = kernel("attention.cu", "tqai_attend", macros, self.device, shared_bytes)
            self._kernels[key] = found
        return found


def prepare(page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> None:
    """Compile and load the kernel that decoding uses most, so that a failure shows early.

    Raises:
        BackendError: it does not compile or load.
    """
    ready = prepared(page_format, dtype, device)
    shape = ready.shape(1)
    ready.kernel(shape, False, False, dtype, attention_shared_bytes(page_format, shape, 1))


@lru_cache(maxsize=64)
def prepared(page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> _Prepared:
    """Tables on the device and kernels of one combination; made once."""
    return _Prepared(page_format, dtype, device)


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
    shape: Shape | None = None,
    blocks: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over sinks, pages and recent tokens of every sequence, merged, in one launch.

    Args:
        query: `[batch, query_heads, new_tokens, head_dim]` float16 or bfloat16, last axis contiguous.
        addresses: int64 `[batch, >= pages]` on the device, byte address of KV head 0 of each page.
        pages: pages per sequence, or the most of them where `page_counts` is given.
        page_counts: int32 `[batch]` on the device, pages of each sequence.
        first_token: so many tokens of each first page are hidden.
        mask: bool `[batch or 1, query_heads or 1, new_tokens, sinks + history + recent]` or None.
            With a mask, lengths are uniform and no causal order is added.
        out_dtype: dtype of the result, by default that of `query`.
        shape, blocks: launch shape; by default the best that fits.

    Returns:
        `[batch, query_heads, new_tokens, value_head_dim]` and log-sum-exp float32
        `[batch, query_heads, new_tokens]`.

    Raises:
        InputError: too many sequences.
        BackendError: the kernel does not compile or launch.
    """
    device = query.device
    ready = prepared(page_format, query.dtype, device)
    batch, query_heads, new_tokens, _ = query.shape
    if batch > MAX_BATCH:
        raise InputError(f"{batch} sequences in one call: at most {MAX_BATCH}")
    exact = recent if recent is not None else sinks
    if exact is None:
        raise InputError("neither recent tokens nor sinks: the number of KV heads is not known")
    kv_heads = exact.keys.shape[1]
    group = query_heads // kv_heads
    col_groups = -(-group * new_tokens // COLUMNS)
    dim = ready.value_dim
    out = torch.empty(batch, query_heads, new_tokens, dim, dtype=out_dtype or query.dtype, device=device)
    lse = torch.empty(batch, query_heads, new_tokens, dtype=torch.float32, device=device)
    params = _Params.from_buffer_copy(ready.params)
    params.query = query.data_ptr()
    params.query_strides[:] = query.stride()[:3]
    sink_tokens = recent_tokens = 0
    if sinks is not None and sinks.keys.shape[2]:
        sink_tokens = sinks.keys.shape[2]
        params.sink_keys, params.sink_values = sinks.keys.data_ptr(), sinks.values.data_ptr()
        params.sink_key_strides[:] = sinks.keys.stride()[:3]
        params.sink_value_strides[:] = sinks.values.stride()[:3]
    if recent is not None and recent.keys.shape[2]:
        recent_tokens = recent.keys.shape[2]
        params.recent_keys, params.recent_values = recent.keys.data_ptr(), recent.values.data_ptr()
        params.recent_key_strides[:] = recent.keys.stride()[:3]
        params.recent_value_strides[:] = recent.values.stride()[:3]
        if recent.counts is not None:
            params.recent_counts = recent.counts.data_ptr()
    if mask is not None:
        params.mask = mask.data_ptr()
        strides = mask.stride()
        params.mask_strides[:] = (
            strides[0] if mask.shape[0] > 1 else 0,
            strides[1] if mask.shape[1] > 1 else 0,
            strides[2],
            strides[3],
        )
    params.addresses = addresses.data_ptr()
    params.address_stride = addresses.stride(0)
    if page_counts is not None:
        params.page_counts = page_counts.data_ptr()
    params.out, params.lse = out.data_ptr(), lse.data_ptr()
    params.batch, params.kv_heads, params.group = batch, kv_heads, group
    params.new_tokens, params.col_groups = new_tokens, col_groups
    params.pages, params.sinks, params.recent, params.first_token = (
        pages,
        sink_tokens,
        recent_tokens,
        first_token,
    )
    params.scaling, params.softcap = scaling, softcap or 0.0
    segments = batch * kv_heads * col_groups
    items = pages + -(-recent_tokens // EXACT_TOKENS) + -(-sink_tokens // EXACT_TOKENS)
    grid = blocks or block_count(ready.multiprocessors, segments, items)
    for name, divisor in (
        ("by_items", max(items, 1)),
        ("by_heads", kv_heads * col_groups),
        ("by_col_groups", col_groups),
        ("by_group", group),
        ("by_grid", grid),
    ):
        setattr(params, name, _divisor(divisor))
    shape = shape or ready.shape(batch)
    shared = ready.shared(shape, batch)
    launcher = ready.kernel(shape, softcap is not None, mask is not None, out.dtype, shared)
    stream = torch.cuda.current_stream(device).cuda_stream
    workspace = _workspace(device, stream, grid * 2 * COLUMNS * (dim + 2), segments)
    params.partial, params.counters = workspace.partial.data_ptr(), workspace.counters.data_ptr()
    launcher.launch(params, (grid, 1), shape.warps * 32, shared, stream)
    return out, lse
