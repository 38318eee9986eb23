"""Our layers in place of transformers' dynamic ones: the same interface over a `CompressedLayer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from tqai.cache.layer import CompressedLayer
from tqai.cache.memory import MemoryReport
from tqai.config import CacheConfig
from tqai.errors import UnsupportedError
from tqai.integrations.transformers.handles import KeyValuePair

__all__ = [
    "TurboQuantHybridLayer",
    "TurboQuantLayer",
    "TurboQuantSlidingLayer",
    "compressed_form",
    "is_compressible",
]


class _Compressed:
    """What the three layers share. `on_codes` says whether `update` may return handles."""

    store: CompressedLayer
    on_codes: bool

    def _adopt(
        self, config: CacheConfig, index: int, on_codes: bool, sliding_window: int | None = None
    ) -> None:
        self.store = CompressedLayer(config, index, sliding_window)
        self.on_codes = on_codes and config.cache_strategy in ("auto", "residual")
        self.store.expects_queries = self.on_codes

    @property
    def is_initialized(self) -> bool:
        return hasattr(self, "store") and self.store.window is not None

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """The base classes' constructors assign it; the store knows better."""

    @property
    def keys(self) -> Tensor | None:
        """All keys held, decompressed for the caller (transient); None before the first token."""
        return self._materialized(0)

    @keys.setter
    def keys(self, value: Any) -> None:
        """The base classes' constructors assign None; the store holds the tokens."""

    @property
    def values(self) -> Tensor | None:
        """All values held, decompressed for the caller (transient); None before the first token."""
        return self._materialized(1)

    @values.setter
    def values(self, value: Any) -> None:
        """The base classes' constructors assign None; the store holds the tokens."""

    def _materialized(self, part: int) -> Tensor | None:
        view = self.store.view() if hasattr(self, "store") else None
        return None if view is None else view.materialize()[part]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            self.store.prepare(key_states, value_states)

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take `[batch, kv_heads, new_tokens, head_dim]` in; returns handles, or the decompressed
        tensors where attention on codes is not to be had."""
        step = self.store.append(key_states, value_states)
        if self.on_codes:
            return KeyValuePair(self.store, step).handles()
        return tuple(self.store.materialize(step))

    def get_seq_length(self) -> int:
        return self.store.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens in sight of the next `query_length` tokens, and the position of the first of them."""
        length, sliding_window = self.store.length, self.store.sliding_window
        first = 0 if sliding_window is None else max(length - sliding_window + 1, 0)
        return length - first + query_length, first

    def crop(self, tokens_to_remove: int) -> None:
        """Remove -`tokens_to_remove` tokens; a positive number is the length to keep."""
        # assisted decoding of transformers 5.16 counts in tensors
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            tokens_to_remove = min(tokens_to_remove - self.store.length, 0)
        self.store.crop(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        self.store.record_past = True

    def reset(self) -> None:
        self.store.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.store.select(self._rows().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.store.select(self._rows()[indices.cpu()])

    def offload(self) -> None:
        raise UnsupportedError("compressed layers are not offloaded; use fewer bits or a DynamicCache")

    def prefetch(self) -> None:
        raise UnsupportedError("compressed layers are not offloaded; use fewer bits or a DynamicCache")

    def memory(self) -> MemoryReport:
        return self.store.memory()

    def _rows(self) -> Tensor:
        assert self.store.pool is not None
        return torch.arange(self.store.pool.table.shape[0])


class TurboQuantLayer(_Compressed, DynamicLayer):
    """A layer that sees everything before it."""

    def __init__(self, config: CacheConfig, index: int = 0, on_codes: bool = False) -> None:
        super().__init__()
        self._adopt(config, index, on_codes)


class TurboQuantSlidingLayer(_Compressed, DynamicSlidingWindowLayer):
    """A layer that sees the last `sliding_window` tokens: pages out of sight are dropped."""

    def __init__(
        self, sliding_window: int, config: CacheConfig, index: int = 0, on_codes: bool = False
    ) -> None:
        super().__init__(sliding_window=sliding_window)
        self._adopt(config, index, on_codes, sliding_window)

    @property
    def cumulative_length(self) -> int:
        return self.store.length if hasattr(self, "store") else 0

    @cumulative_length.setter
    def cumulative_length(self, value: int) -> None:
        """The base class's constructor assigns 0; the store counts."""

    @property
    def record_past(self) -> bool:
        return hasattr(self, "store") and self.store.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        if hasattr(self, "store"):
            self.store.record_past = value


class TurboQuantHybridLayer(_Compressed, LinearAttentionAndFullAttentionLayer):
    """A layer with both attention and a recurrent state: the attention part is compressed."""

    def __init__(
        self, config: CacheConfig, index: int = 0, on_codes: bool = False, number_of_states: int = 1
    ) -> None:
        LinearAttentionAndFullAttentionLayer.__init__(self, number_of_states=number_of_states)
        self._adopt(config, index, on_codes)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if len(args) == 2:
            _Compressed.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        _Compressed.crop(self, tokens_to_remove)

    def activate_past_recording(self) -> None:
        LinearAttentionLayer.activate_past_recording(self)
        _Compressed.activate_past_recording(self)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        _Compressed.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        _Compressed.reorder_cache(self, beam_idx)


def is_compressible(layer: Any) -> bool:
    """Whether `compressed_form` has a form of ours for an empty layer of transformers."""
    return type(layer) in _FORMS


def compressed_form(layer: Any, config: CacheConfig, index: int, on_codes: bool) -> Any:
    """Our layer in place of an empty layer of transformers; layers of other kinds as they are."""
    form = _FORMS.get(type(layer))
    return layer if form is None else form(layer, config, index, on_codes)


_FORMS: dict[type, Callable[..., Any]] = {
    DynamicLayer: lambda layer, *given: TurboQuantLayer(*given),
    DynamicSlidingWindowLayer: lambda layer, *given: TurboQuantSlidingLayer(layer.sliding_window, *given),
    LinearAttentionAndFullAttentionLayer: lambda layer, config, index, on_codes: TurboQuantHybridLayer(
        config, index, on_codes, layer.number_of_states
    ),
}
"""transformers' layer -> how ours is made of it. Exact types: a subclass may keep more than keys and
values (sparse attention keeps an index)."""
