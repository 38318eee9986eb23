"""`LayerReading`: how a layer's tokens are read: by attention, as tensors, and to be counted."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import Tensor

from tqai.backends import Choice, load
from tqai.backends.base import Attended, Backend, ExactTokens
from tqai.backends.torch_ops.attention import attend as attend_exact
from tqai.cache.memory import MemoryReport
from tqai.cache.offsets import Offsets
from tqai.cache.pages import PagePool
from tqai.cache.step import Serving, Step
from tqai.cache.window import Window, joined
from tqai.config import CacheConfig
from tqai.core.page import PAGE_TOKENS
from tqai.errors import BackendError

__all__ = ["LayerReading"]

logger = logging.getLogger("tqai")


class LayerReading:
    """The state of a layer that `CompressedLayer` keeps, and everything that reads it without aging it."""

    config: CacheConfig
    layer: int
    sliding_window: int | None
    sinks: ExactTokens | None
    window: Window | None
    pool: PagePool | None
    offsets: Offsets | None
    _energy: Tensor | None
    serving: Serving | None
    _decoded: ExactTokens | None

    @property
    def held_tokens(self) -> int:
        """Tokens held per sequence."""
        raise NotImplementedError

    @property
    def waits(self) -> bool:
        """Whether there is a page's worth of tokens that waits to be compressed."""
        raise NotImplementedError

    @property
    def backend(self) -> Backend:
        """The backend in use."""
        assert self.serving is not None
        return self.serving.choice.backend

    def attend(
        self,
        step: Step,
        query: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        with_lse: bool = True,
    ) -> Attended:
        """Attention of `query` over a step of this layer; see `Backend.attend`.

        A backend that fails at run time is replaced, once and with a warning, by the torch backend;
        the codes are kept. Without `with_lse` the log-sum-exp may be that of keys without their
        offsets, which spares a product.
        """
        offsets = step.offsets
        if offsets is None:
            return self._attend(step, query, mask, scaling, softcap)
        balanced = offsets.for_query(query)
        if softcap is not None and offsets.keys is not None:
            # nobody said so (`soft_capped`): right, and slow
            return attend_exact(query, None, None, self.materialize(step), mask, scaling, softcap)
        attended = self._attend(step, balanced, mask, scaling, softcap)
        return offsets.corrected(attended, query, scaling if with_lse else None, mask is not None)

    def _attend(
        self, step: Step, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> Attended:
        """Attention over what is held, without the offsets."""
        if step.history is None:
            return attend_exact(query, None, step.sinks, step.recent, mask, scaling, softcap)
        arguments = (query, step.history, step.sinks, step.recent, mask, scaling, softcap)
        try:
            return self.backend.attend(*arguments)
        except BackendError as error:
            self._fall_back(error)
            return self.backend.attend(*arguments)

    def materialize(self, step: Step) -> ExactTokens:
        """Keys and values of a step, decompressed; "incremental" keeps the history's copy for the next.

        A sliding layer keeps none: which pages a step sees moves on.
        """
        if self.config.cache_strategy != "incremental" or step.history is None:
            return step.materialize()
        if self.sliding_window is not None:
            return step.materialize()
        known = 0 if self._decoded is None else self._decoded.keys.shape[2] // PAGE_TOKENS
        if known < step.history.pages:
            fresh = step.decode_history(replace(step.history, table=step.history.table[:, known:]))
            self._decoded = fresh if self._decoded is None else joined(self._decoded, fresh)
        return step.materialize(self._decoded)

    def view(self) -> Step | None:
        """Everything held, as a step without own tokens; None before the first token."""
        if self.window is None or self.pool is None or self.serving is None:
            return None
        history = self.pool.history() if self.pool.pages else None
        return Step(self.serving, self.sinks, history, self.window.tokens, 0, self.offsets)

    def memory(self) -> MemoryReport:
        """Bytes that this layer holds."""
        if self.window is None or self.pool is None or self.serving is None:
            return MemoryReport()
        page_format, pool = self.pool.page_format, self.pool
        heads, batch = pool.kv_heads, pool.table.shape[0]
        row_bytes = page_format.key.row_bytes + page_format.value.row_bytes
        codes_bytes = pool.used * heads * PAGE_TOKENS * row_bytes
        scales_bytes = pool.used * heads * page_format.scales_bytes
        slabs_bytes = pool.capacity * heads * page_format.page_bytes
        exact = [self.window.keys, self.window.values, *(self.sinks or ())]
        dims = page_format.key.spec.head_dim + page_format.value.spec.head_dim
        return MemoryReport(
            tokens=self.held_tokens,
            values=batch * heads * self.held_tokens * dims,
            codes_bytes=codes_bytes,
            scales_bytes=scales_bytes,
            window_bytes=sum(tensor.nbytes for tensor in exact),
            table_bytes=pool.table_bytes,
            slack_bytes=slabs_bytes - codes_bytes - scales_bytes,
            offsets_bytes=sum(part.nbytes for part in (self.offsets, self._energy) if part is not None),
            copy_bytes=sum(part.nbytes for part in self._decoded or ()),
            layer_bits=() if self.waits else ((self.config.bits_k, self.config.bits_v),),
            backend=self.backend.name,
            backend_reason=self.serving.choice.reason,
        )

    def _fall_back(self, error: BackendError) -> None:
        assert self.serving is not None and self.pool is not None
        failed, torch_backend = self.serving.choice.backend, load("torch")
        if failed is torch_backend:
            raise error
        logger.warning("backend %s failed (%s); layer %d goes on with torch", failed.name, error, self.layer)
        self.pool.convert(failed, torch_backend)
        self.serving.choice = Choice(torch_backend, f"{failed.name} failed: {error}")
