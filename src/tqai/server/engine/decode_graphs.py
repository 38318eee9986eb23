"""`DecodeGraphs`: the decode step as CUDA graphs, one for each number of rows up to a power of two.

Launched one by one, the kernels of a step take the host longer (20 to 40 ms for 32 layers) than the GPU. A
graph replays them with one call. Whatever changes from step to step therefore lies on the device, written
there by two copies: tokens, positions, places and lengths of the rows at every step, and the table of pages
when a row has got a page or another request. A graph then serves sequences of any length that fits the
table, as they grow, come and go.

    inputs   int64 [5, rows]          token | position | place among exact tokens | exact tokens | pages
    table    int64 [rows, room]       page numbers; for codes also [layers, rows, room] byte addresses

Rows beyond the running requests attend to one token in slots that nobody uses. Pages that a step completes
are encoded after it, for all layers at a time: the step itself sees their tokens exactly.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens
from tqai.backends.cuda.capture import capture
from tqai.core.page import PAGE_TOKENS
from tqai.errors import TqaiError
from tqai.integrations.transformers.ragged import RaggedCache
from tqai.server.engine.decode_step import DecodeRow
from tqai.server.engine.page_table import DeviceRows
from tqai.server.engine.store import TokenStore

__all__ = ["DecodeGraphs", "SlotStep", "graph_rows"]

logger = logging.getLogger("tqai.server")

MOST_ROWS = 256


def graph_rows(max_running: int) -> list[int]:
    """Numbers of rows that get a graph: powers of two, between 16 and 64 multiples of 16, and the most that
    may run. Beyond `MOST_ROWS` steps are launched one by one: there the GPU is busier than the host."""
    most = min(max_running, MOST_ROWS)
    return [count for count in (1, 2, 4, 8, 16, 32, 48, 64, 128) if count < most] + [most]


class SlotStep:
    """One token of the first `rows` slots. Everything that differs between steps is on the device."""

    def __init__(self, store: TokenStore, rows: int, room: int) -> None:
        self.store, self.rows = store, rows
        device, layers = store.device, len(store.codes)
        self._host = torch.zeros((5, rows), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.inputs = torch.zeros((5, rows), dtype=torch.int64, device=device)
        lengths = torch.zeros((2, rows), dtype=torch.int32, device=device)
        self._lengths = lengths
        self._table = np.zeros((rows, room), dtype=np.int64)
        self._held: list[tuple[list[int] | None, int]] = [(None, 0)] * rows
        table = torch.zeros((rows, room), dtype=torch.int64, device=device)
        self.device_rows = DeviceRows(table, lengths[1], lengths[0], self._table)
        bases = [slab.data_ptr() for slab in store.slabs]
        strides = [slab.stride(0) for slab in store.slabs]
        self._bases = torch.tensor(bases, device=device)[:, None, None]
        self._strides = torch.tensor(strides, device=device)[:, None, None]
        self.addresses = self._bases.expand(layers, rows, room).contiguous()

    def load(self, rows: list[DecodeRow], tokens: list[int]) -> None:
        """Bring a step to the device. Waits for nothing; the step before it must have been waited for."""
        host = self._host.numpy()
        host[:] = 0
        host[2], host[3] = self.store.sinks, 1
        used = len(rows)
        positions = np.array([row.position for row in rows], dtype=np.int64)
        host[0, :used], host[1, :used] = tokens, positions
        # as `TokenStore.place_of`
        held = positions - np.maximum(positions - self.store.lead, 0) // PAGE_TOKENS * PAGE_TOKENS
        host[2, :used], host[3, :used] = held, held + 1
        host[4, :used] = [len(row.pages) for row in rows]
        self.inputs.copy_(self._host, non_blocking=True)
        if self._take_pages(rows):
            self.device_rows.table.copy_(torch.from_numpy(self._table))
            torch.mul(self.device_rows.table, self._strides, out=self.addresses)
            self.addresses += self._bases

    def _take_pages(self, rows: list[DecodeRow]) -> bool:
        """Bring the host's table up to date; whether anything has changed."""
        changed = False
        for index, row in enumerate(rows):
            pages, known = self._held[index]
            count = len(row.pages)
            # the list of a request is its own, and only grows as long as the request runs
            if pages is not row.pages or known > count:
                known = 0
            if known < count or pages is not row.pages:
                self._table[index, known:count] = row.pages[known:]
                self._held[index], changed = (row.pages, count), True
        return changed

    def forward(self, model: Any, extra: dict[str, Any]) -> Tensor:
        """Logits `[rows, vocab]`."""
        self._lengths.copy_(self.inputs[3:])
        logits: Tensor = model(
            input_ids=self.inputs[0][:, None],
            position_ids=self.inputs[1][:, None],
            past_key_values=RaggedCache(self, len(self.store.codes)),
            use_cache=True,
            **extra,
        ).logits
        return logits[:, -1]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See `RaggedStore.update`."""
        places, state = self.inputs[2][:, None, None, None], self.store.offsets[layer]
        tokens = ExactTokens(keys, values)
        if state is not None:
            tokens = state.rows(0, self.rows).taken_off(tokens)
        for held, new in zip(self.store.exact[layer], tokens, strict=True):
            held[: self.rows].scatter_(2, places.expand(new.shape), new)

    def attend_layer(self, layer: int, query: Tensor, scaling: float, softcap: float | None) -> Attended:
        """See `RaggedStore.attend_layer`."""
        store, state = self.store, self.store.offsets[layer]
        exact = ExactTokens(*(part[: self.rows] for part in store.exact[layer]))
        offsets = None if state is None else state.rows(0, self.rows)
        asked = query if offsets is None else offsets.for_query(query)
        rows, addresses = self.device_rows, self.addresses[layer]
        done = store.codes[layer].attend_rows(
            asked, store.slabs[layer], rows, addresses, exact, scaling, softcap
        )
        if offsets is None:
            return done
        return offsets.corrected(done, query, scaling if store.shape.sink_logits else None, masked=False)


class DecodeGraphs:
    """See the module's text.

    Attributes:
        captured: rows -> seconds that warming up and capturing took.
    """

    def __init__(self, model: Any, store: TokenStore, room_pages: int, extra: dict[str, Any]) -> None:
        """
        Args:
            room_pages: most pages of a sequence.
            extra: further arguments of the model's forward pass.
        """
        self._model, self._store, self._room, self._extra = model, store, room_pages, extra
        self._rows = graph_rows(store.settings.max_running)
        self._steps: dict[int, tuple[SlotStep, torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None
        self._broken = False
        self.captured: dict[int, float] = {}

    @staticmethod
    def serve(store: TokenStore) -> bool:
        """Whether the steps of this store can be captured: on a GPU, with full attention in every
        layer, and attention that reads lengths on the device."""
        return (
            store.device.type == "cuda"
            and all(layer.sliding_window is None for layer in store.shape.layers)
            and all(codes.reads_lengths for codes in store.codes)
        )

    @property
    def usable(self) -> bool:
        """Whether steps go through graphs. Not after one could not be captured, and not once a backend has
        been replaced: its kernels are in the graphs."""
        return not self._broken and all(codes.reads_lengths for codes in self._store.codes)

    def capture_all(self) -> None:
        """Capture the graphs of all numbers of rows, largest first: the smaller ones fit into its memory.
        Writes into the slots, so before the first request."""
        for rows in reversed(self._rows):
            if self.usable:
                self._capture(rows)

    @torch.inference_mode()
    def run(self, rows: list[DecodeRow], tokens: list[int]) -> Tensor | None:
        """Logits `[len(rows), vocab]`, a buffer that the next step overwrites; None where this step has to
        go the other way. Can be repeated."""
        if not self.usable or not self._steps or len(rows) > self._rows[-1]:
            return None
        if any(len(row.pages) > self._room for row in rows):
            return None
        step, graph, logits = next(self._steps[count] for count in self._rows if count >= len(rows))
        step.load(rows, tokens)
        graph.replay()
        self._store.complete_pages(rows)
        return logits[: len(rows)]

    @torch.inference_mode()
    def _capture(self, count: int) -> None:
        device = self._store.device
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            step = SlotStep(self._store, count, self._room)
            step.load([], [])
            started.record()
            graph, logits = capture(lambda: step.forward(self._model, self._extra), device, pool=self._pool)
            ended.record()
            ended.synchronize()
        except (RuntimeError, TqaiError) as error:
            # a model that asks the device something in the middle of a step (experts, say) cannot be captured
            self._broken = True
            self._steps.clear()
            logger.warning("decode steps are launched one by one, a graph cannot be captured: %s", error)
            return
        self._pool = graph.pool()
        self._steps[count] = step, graph, logits
        self.captured[count] = started.elapsed_time(ended) / 1e3
