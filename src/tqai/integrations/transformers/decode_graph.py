"""`DecodeGraph`: the decode step of a model with a compressed cache as one CUDA graph.

Eager transformers spends more time of the host than of the GPU on a short step. A graph replays the whole
step with one call. What changes from step to step therefore lies on the device: the place of the new token in
each layer's window, the tokens in it, the position, and the pages of each layer (their number and their
addresses, in a table with room for more). The graph is captured anew only when the room is used up.

Between steps the host does what is left: every 64 tokens it has the oldest page of each window compressed.
The cache is the same object before, during and afterwards; eager steps may follow.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens, History
from tqai.backends.cuda.capture import capture
from tqai.cache.layer import CompressedLayer
from tqai.cache.step import Step
from tqai.core.page import PAGE_TOKENS
from tqai.errors import UnsupportedError
from tqai.integrations.transformers.cache import TurboQuantCache
from tqai.integrations.transformers.handles import KeyValuePair
from tqai.integrations.transformers.layers import TurboQuantLayer

__all__ = ["DecodeGraph"]


class DecodeGraph:
    """Decodes one token per call and sequence, by replaying a captured step.

        cache = TurboQuantCache(model, bits_k=4, bits_v=2)
        logits = model(prompt_ids, past_key_values=cache).logits[:, -1]
        step = DecodeGraph(model, cache)
        for _ in range(512):
            logits = step(logits.argmax(-1, keepdim=True))

    Equal positions for all sequences (no padding), full attention in every layer, backend "cuda".
    """

    def __init__(self, model: Any, cache: TurboQuantCache, room_tokens: int = 4096) -> None:
        """
        Args:
            model: the transformers model that `cache` was made for, in evaluation mode.
            cache: filled by a prompt; the steps go on from it.
            room_tokens: for how many tokens more a captured graph serves before it is captured anew.

        Raises:
            UnsupportedError: a layer that is not compressed full attention on backend "cuda", or is empty.
        """
        self._model = model
        self._cache = cache
        self._stores: list[CompressedLayer] = [_store(layer) for layer in cache.layers]
        self._room_pages = max(1, -(-room_tokens // PAGE_TOKENS))
        window = self._stores[0].window
        assert window is not None
        self._batch, self._device = window.keys.shape[0], window.keys.device
        self._ids = torch.zeros((self._batch, 1), dtype=torch.int64, device=self._device)
        self._positions = torch.zeros_like(self._ids)
        self._fill = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._counts = torch.zeros(self._batch, dtype=torch.int32, device=self._device)
        self._page_counts = torch.zeros(self._batch, dtype=torch.int32, device=self._device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._length = -1
        self._room = 0
        self._layers: list[_GraphLayer] = []
        self._signature: list[tuple[int, ...]] = []

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits `[batch, vocabulary]` of the next token, after `input_ids` `[batch, 1]`.

        The result is a buffer that the next call overwrites.
        """
        if self._stores[0].length != self._length or _signature(self._stores[0]) != self._signature[0]:
            self._take_over()
        self._ids.copy_(input_ids)
        if self._graph is None:
            self._capture()
        assert self._graph is not None and self._logits is not None
        self._graph.replay()
        for store in self._stores:
            assert store.window is not None
            store.window.stop += 1
            store.length += 1
        self._length += 1
        first = self._stores[0].window
        assert first is not None
        if first.stop == first.capacity:
            self._compress()
        return self._logits

    def _take_over(self) -> None:
        """Begin, or go on after others have changed the cache."""
        lengths = {store.length for store in self._stores}
        if len(lengths) > 1:
            raise UnsupportedError(f"layers of {sorted(lengths)} tokens: a graph needs them equal")
        self._length = lengths.pop()
        self._compress()

    def _compress(self) -> None:
        """Put full pages where they belong, and tell the device what the windows and pages are now."""
        for store in self._stores:
            assert store.window is not None and store.pool is not None
            store.pool.recycle()
            store.window.fix()  # the captured step knows the buffer's address
            store.expects_queries = False  # nor does anybody see its queries
            store.settle(store.window.tokens, in_window=True)
            store.window.move_to_front()
        first = self._stores[0]
        assert first.window is not None and first.pool is not None
        pages = first.pool.pages
        signature = [_signature(store) for store in self._stores]
        if self._graph is None or pages > self._room or signature != self._signature:
            self._graph, self._signature = None, signature
            self._room = pages + self._room_pages
            self._layers = [_GraphLayer(store, self, self._room) for store in self._stores]
        for layer in self._layers:
            layer.take_pages()
        self._page_counts.fill_(pages)
        self._fill.fill_(first.window.stop)
        self._counts.fill_(first.window.stop + 1)
        self._positions.fill_(self._length)

    def _forward(self) -> Tensor:
        cache = copy.copy(self._cache)
        cache.layers = list(self._layers)
        logits: Tensor = self._model(
            input_ids=self._ids, position_ids=self._positions, past_key_values=cache, use_cache=True
        ).logits[:, -1]
        self._fill.add_(1)
        self._counts.add_(1)
        self._positions.add_(1)
        return logits

    def _capture(self) -> None:
        changing = (self._fill, self._counts, self._positions)
        before = [tensor.clone() for tensor in changing]

        def put_back() -> None:
            for tensor, value in zip(changing, before, strict=True):
                tensor.copy_(value)

        self._graph, self._logits = capture(self._forward, self._device, after_warm_up=put_back)


class _GraphLayer(TurboQuantLayer):
    """A layer whose new token goes to a place that the device knows."""

    def __init__(self, store: CompressedLayer, graph: DecodeGraph, room: int) -> None:
        # no call of the base class: this is another view of a store that exists
        assert store.pool is not None
        self.store = store
        self.on_codes = True
        self._graph = graph
        table = np.zeros((graph._batch, 0), dtype=np.int32)
        addresses = torch.zeros((graph._batch, room), dtype=torch.int64, device=graph._device)
        self._history = History(store.pool.page_format, (), (), table, addresses)
        self._pages = -1

    def take_pages(self) -> None:
        """Bring the addresses on the device up to date."""
        assert self.store.pool is not None
        pages = self.store.pool.pages
        if pages and pages != self._pages:
            self._history.addresses[:, :pages].copy_(self.store.pool.history().addresses[:, :pages])
        self._pages = pages

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        window, offsets = self.store.window, self.store.offsets
        assert window is not None and self.store.serving is not None
        new = ExactTokens(key_states, value_states)
        if offsets is not None:
            new = offsets.taken_off(new)
        window.keys.index_copy_(2, self._graph._fill, new.keys)
        window.values.index_copy_(2, self._graph._fill, new.values)
        recent = ExactTokens(window.keys, window.values)
        step = Step(self.store.serving, self.store.sinks, self._history, recent, 1, offsets)
        pair: Any = KeyValuePair(self, step)
        return tuple(pair.handles())

    def attend(
        self,
        step: Step,
        query: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        with_lse: bool = True,
    ) -> Attended:
        """As `CompressedLayer.attend`, with lengths read on the device."""
        from tqai.backends.cuda.attention import Exact, attend_pages

        assert step.history is not None
        if mask is not None:
            raise UnsupportedError("a mask in a captured step: allowed are sequences without padding")
        graph = self._graph
        out, lse = attend_pages(
            query if step.offsets is None else step.offsets.for_query(query),
            step.history.page_format,
            step.history.addresses,
            step.history.addresses.shape[1],
            scaling,
            page_counts=graph._page_counts,
            sinks=None if step.sinks is None else Exact(*step.sinks),
            recent=Exact(*step.recent, graph._counts),
            softcap=softcap,
        )
        attended = Attended(out, lse)
        if step.offsets is None:
            return attended
        return step.offsets.corrected(attended, query, scaling if with_lse else None, False)


def _signature(store: CompressedLayer) -> tuple[int, ...]:
    """What a captured step has built in: which tensors the exact tokens and the offsets lie in."""
    assert store.window is not None
    sinks = 0 if store.sinks is None else store.sinks.keys.data_ptr()
    return store.window.keys.data_ptr(), store.window.values.data_ptr(), sinks, id(store.offsets)


def _store(layer: Any) -> CompressedLayer:
    store = getattr(layer, "store", None)
    reason = None
    if type(layer) is not TurboQuantLayer or store is None:
        reason = f"a {type(layer).__name__}: allowed is compressed full attention"
    elif store.window is None or store.pool is None:
        reason = "an empty layer: run the prompt first"
    elif not layer.on_codes:
        reason = "a cache without attention on codes: make it with the model"
    elif store.backend.name != "cuda":
        reason = f"backend {store.backend.name!r}: allowed is 'cuda'"
    elif store.plan is not None and store.plan.pending:
        reason = "bits that are not decided yet"
    if reason is not None:
        raise UnsupportedError(f"a graph of the decode step cannot serve {reason}")
    assert isinstance(store, CompressedLayer)
    return store
