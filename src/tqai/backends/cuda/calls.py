"""Calls of the attention kernels, prepared: what does not change from step to step.

Tables and rotations on the device, kernels, the form of a launch and most of its parameters depend on the
page format and on sizes alone. They are made at first use and kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from tqai.backends.cuda.code_params import DTYPE_NAMES, OUT_CODES
from tqai.backends.cuda.driver import Kernel, Launch, kernel, shared_memory_bytes
from tqai.backends.cuda.levels import integer_levels
from tqai.backends.cuda.params import Sizes, divisor
from tqai.backends.cuda.plan import (
    COLUMNS,
    MAX_CLUSTER,
    Shape,
    attention_shared_bytes,
    block_count,
    choose_shape,
    codec_macros,
    has_long_stretches,
    rotation_plan,
    split_count,
)
from tqai.backends.cuda.trellis_plan import (
    Forms,
    is_trellis,
    level_unit,
    table,
    table_bytes,
    table_forms,
    table_macros,
)
from tqai.core.page import PageFormat
from tqai.errors import BackendError

__all__ = ["Call", "CallKey", "Prepared", "prepare", "prepared", "prepared_by_identity"]

KEPT_CALLS = 4096
"""Prepared calls that are kept; a new number of pages every 64 tokens makes new ones."""
CallKey = tuple[Any, ...]
"""The arguments of `Prepared._new_call`."""


@dataclass(frozen=True)
class Call:
    """What depends on sizes alone.

    Attributes: `sizes`, the second half of the parameters; `words`, of partial results, in a buffer that is
    `awaited` or not; `segments`, counters; `out` and `lse`, what the results are like: of one element each,
    expanded, so that `torch.empty_like`, the fastest way to make a tensor, makes them contiguous.
    """

    launch: Launch
    sizes: bytes
    words: int
    awaited: bool
    segments: int
    out: torch.Tensor
    lse: torch.Tensor


class Prepared:
    """What depends on the page format, the dtype and the device: tables, rotations, kernels, calls."""

    def __init__(self, page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> None:
        self.format = page_format
        self.macros = codec_macros(page_format, DTYPE_NAMES[dtype])
        self.device = device
        self.sizes = Sizes(times256=256)
        self._kept: list[torch.Tensor] = []
        self.shared_limit = shared_memory_bytes(device.index or 0)
        self.forms: Forms | None = None
        if is_trellis(page_format):
            self._trellis_tables()
        for side, codec in (("k", page_format.key), ("v", page_format.value)):
            if self.forms is None:
                levels = integer_levels(codec)
                target = getattr(self.sizes, f"levels_{side}")
                if codec.spec.bits == 8:
                    lookup = torch.from_numpy(levels.lookup().view("int32")).to(device)
                    setattr(self.sizes, f"lut_{side}", self._keep(lookup))
                else:
                    target.tables[:] = levels.permute_tables()
                target.coefficients[:] = (levels.coef_b, levels.unit)
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
        self.forms = forms = table_forms(self.format, self.shared_limit)
        if forms is None:
            raise BackendError(f"tables of trellis codes do not fit into {self.shared_limit} bytes")
        self.macros |= table_macros(self.format, forms)
        sides = (("k", self.format.key), ("v", self.format.value))
        for (side, codec), form in zip(sides, forms, strict=True):
            entries = torch.from_numpy(table(codec, form).view("int32").copy()).to(self.device)
            setattr(self.sizes, f"lut_{side}", self._keep(entries))
            getattr(self.sizes, f"levels_{side}").coefficients[:] = (0.0, level_unit(codec))

    def shape(self, batch: int, one_buffer: bool, line: bool) -> Shape:
        found = choose_shape(self.format, self.shared_limit, batch, self.forms, one_buffer, line)
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
        col_groups = -(-group * new_tokens // COLUMNS)
        segments = batch * kv_heads * col_groups
        items = pages + exact_items
        macros = {"SOFTCAP": int(softcap is not None), "MASKED": int(masked), "OUT": OUT_CODES[out_dtype]}
        if splits is None and blocks is None:
            splits = split_count(self.multiprocessors, segments, items)
        if shape is None:
            apart = splits is not None and self.has_clusters
            long = apart and has_long_stretches(self.format, pages // (splits or 1))
            shape = self.shape(batch, long, line=splits is None)
        shared = attention_shared_bytes(self.format, shape, batch, self.forms)
        sizes = Sizes.from_buffer_copy(self.sizes)
        threads, words = shape.warps * 32, 0
        part = COLUMNS * (self.value_dim + 2)
        if splits is not None:
            if splits > 1 and self._refuses_clusters(splits):
                if cluster:
                    raise BackendError(f"clusters of {splits} blocks: {self._refuses_clusters(splits)}")
                cluster = False
            if cluster is not False:
                function = self.kernel("attend_split.cu", shared, shape, CLUSTER=1, **macros)
                fits = splits == 1 or self._fit(function, splits, segments, threads, shared)
                cluster = fits if cluster is None else cluster
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
        shape_of_lse = (batch, kv_heads * group, new_tokens)
        out = torch.empty(1, dtype=out_dtype, device=self.device).expand(*shape_of_lse, self.value_dim)
        lse = torch.empty(1, dtype=torch.float32, device=self.device).expand(shape_of_lse)
        return Call(launch, bytes(sizes), words, splits is not None, segments, out, lse)

    def _refuses_clusters(self, splits: int) -> str | None:
        """Why blocks of a segment never form a cluster, or None."""
        if not self.has_clusters:
            return "the device has none"
        if splits > MAX_CLUSTER:
            return f"at most {MAX_CLUSTER}"
        if self.forms and table_bytes(self.format, self.forms):  # see `copy_address` in trellis_lookup.cuh
            return "tables of trellis codes are for single blocks"
        return None

    def _fit(self, function: Kernel, splits: int, segments: int, threads: int, shared: int) -> bool:
        """Whether clusters of `splits` blocks, one for each segment, run all at a time."""
        key = (function.address, splits, threads, shared)
        found = self._clusters.get(key)
        if found is None:
            found = self._clusters[key] = function.clusters(splits, threads, shared)
        return found >= segments


def prepare(page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> None:
    """Compile and load the kernels that decoding uses most, so that a failure shows early.

    Raises:
        BackendError: they do not compile or load.
    """
    ready = prepared(page_format, dtype, device)
    for pages in (1024, 4):
        ready.call((1, 8, 4, 1, pages, 0, 1, None, False, dtype, None, None, None, None))


@lru_cache(maxsize=64)
def prepared(page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Tables on the device and kernels of one combination; made once."""
    return Prepared(page_format, dtype, device)


_BY_IDENTITY: dict[tuple[int, torch.dtype, int | None], tuple[PageFormat, Prepared]] = {}


def prepared_by_identity(page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> Prepared:
    """As `prepared`, without hashing a page format at every step."""
    key = (id(page_format), dtype, device.index)
    found = _BY_IDENTITY.get(key)
    if found is None:
        if len(_BY_IDENTITY) >= KEPT_CALLS:
            _BY_IDENTITY.clear()
        # holds the format, so that its id stays its own
        found = _BY_IDENTITY[key] = (page_format, prepared(page_format, dtype, device))
    return found[1]
