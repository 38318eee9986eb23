"""Bits per layer from the first prefill, without data: `BitPlan`.

The layers hold their first tokens exact until every layer has seen them, that is, until the end of the
first forward pass that fills a page; then bits are allocated and the tokens compressed. So for the length
of that pass the prefill takes the memory of an ordinary cache; feeding the prompt in chunks bounds it.

An error is measured, on the layer's own tokens: attention of `SAMPLE_QUERIES` queries, from the last half
of the sample, over the first page and the newest `SAMPLE_TOKENS` tokens, once exact and once for each width
with the keys (or the values) coded; of it, mean |d out|^2. That compares keys with values and widths with
each other, but not layers: how much the model's output minds an error of a layer is not to be seen in the
layer (measured on the embedded model, neither the error over |out|^2 nor the plain one tells), so every
layer's errors are divided by their sum at 3 bits. A calibration measures what this cannot know. Where
queries are not seen (a cache that decompresses), |dk|^2 / |k|^2 and |dv|^2 / |v|^2 stand for the errors.
Padding in the sample is not told from text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tqai.backends.base import ExactTokens
from tqai.backends.torch_ops.codes import torch_codec
from tqai.cache.bit_plan import WIDTHS, LayerShape, SideErrors, allocate
from tqai.cache.offsets import estimate
from tqai.cache.page_format import page_format_for
from tqai.config import CacheConfig
from tqai.core.page import PAGE_TOKENS

if TYPE_CHECKING:
    from tqai.cache.layer import CompressedLayer

__all__ = ["BitPlan", "expected_errors"]

SAMPLE_TOKENS = 960
SAMPLE_QUERIES = 32


class BitPlan:
    """Decides the bits of all layers of one cache when they have seen their first pages.

    Attributes:
        config: of the cache, with `bits_budget`.
        layers: the cache's compressed layers, in order.
        with_queries: the attention function will show each layer's queries (`show_query`).
        decided: bits of keys and values per layer of `layers`, or None.
    """

    def __init__(self, config: CacheConfig, layers: list[CompressedLayer], with_queries: bool) -> None:
        self.config = config
        self.layers = layers
        self.with_queries = with_queries
        self.decided: tuple[tuple[int, int], ...] | None = None
        self._errors: dict[int, SideErrors] = {}
        for layer in layers:
            layer.follow(self)

    @property
    def pending(self) -> bool:
        """Whether the bits are still open."""
        return self.decided is None

    def forget(self) -> None:
        """Open again, for a cache that was reset."""
        self.decided = None
        self._errors.clear()

    def filled(self, layer: CompressedLayer) -> None:
        """`layer` holds a page's worth of tokens."""
        if not self.with_queries:
            self._learn(layer, None)
            self._decide_if_complete()

    def overdue(self) -> None:
        """Decide now by what is known: the pass in which the first layers were filled is over, and some
        layer was no part of it, or showed no query."""
        for layer in self.layers:
            if layer.waits and layer.layer not in self._errors:
                self._learn(layer, None)
        if self.pending and self._errors:
            self._decide()

    def show_query(self, layer: CompressedLayer, query: Tensor, scaling: float) -> None:
        """`query` `[batch, query_heads, new_tokens, head_dim]` attends to `layer`."""
        if self.pending and layer.waits and layer.layer not in self._errors:
            self._learn(layer, query, scaling)
            self._decide_if_complete()

    def _decide_if_complete(self) -> None:
        if len(self._errors) == len(self.layers):
            self._decide()

    def _decide(self) -> None:
        """Allocate and let every layer compress. Layers that have seen no page yet are taken to be like
        the average of the others."""
        known = list(self._errors.values())
        average = SideErrors(
            {width: sum(error.keys[width] for error in known) / len(known) for width in WIDTHS},
            {width: sum(error.values[width] for error in known) / len(known) for width in WIDTHS},
        )
        shape_of_first = next(shape for shape in map(_shape, self.layers) if shape is not None)
        shapes = [_shape(layer) or shape_of_first for layer in self.layers]
        errors = [self._errors.get(layer.layer, average) for layer in self.layers]
        assert self.config.bits_budget is not None
        self.decided = allocate(self.config, shapes, errors, self.config.bits_budget)
        for layer, bits in zip(self.layers, self.decided, strict=True):
            layer.adopt_bits(*bits)

    def _learn(self, layer: CompressedLayer, query: Tensor | None, scaling: float = 1.0) -> None:
        self._errors[layer.layer] = expected_errors(layer.window_tokens, query, scaling, layer.config)


def expected_errors(
    tokens: ExactTokens, query: Tensor | None, scaling: float, config: CacheConfig
) -> SideErrors:
    """What each width costs one layer (see the module's text).

    `tokens` are `[batch, kv_heads, count, head_dim]`, the last of them those of `query`
    `[batch, query_heads, new_tokens, head_dim]`.
    """
    sample = _sampled(tokens)
    if config.offsets != "off":
        offsets = estimate(sample, config.offsets)
        sample = sample if offsets is None else offsets.taken_off(sample)
    sample = ExactTokens(*(torch.nan_to_num(part.float(), nan=0.0) for part in sample))
    exact = sample.keys if query is None else _attention(sample, query, scaling)
    errors: tuple[dict[int, float], dict[int, float]] = ({}, {})
    for width in WIDTHS:
        one = config.with_changes(bits_budget=None, layer_bits=None, bits_k=width, bits_v=width)
        page_format = page_format_for(one, sample.keys.shape[3], sample.values.shape[3])
        for side, codec in enumerate((page_format.key, page_format.value)):
            form = torch_codec(codec, sample.keys.device)
            coded = form.decode(*form.encode(sample[side]), torch.float32)
            if query is None:
                errors[side][width] = _relative(coded, sample[side])
            else:
                parts = (coded, sample.values) if side == 0 else (sample.keys, coded)
                errors[side][width] = _relative(_attention(ExactTokens(*parts), query, scaling), exact)
    total = errors[0][3] + errors[1][3]
    keys, values = ({width: error / (total or 1.0) for width, error in side.items()} for side in errors)
    return SideErrors(keys, values)


def _sampled(tokens: ExactTokens) -> ExactTokens:
    """The first page, where attention sinks are, and the newest tokens."""
    count = tokens.keys.shape[2]
    if count <= SAMPLE_TOKENS + PAGE_TOKENS:
        return ExactTokens(*(part.detach() for part in tokens))
    return ExactTokens(
        *(torch.cat([part[:, :, :PAGE_TOKENS], part[:, :, -SAMPLE_TOKENS:]], 2).detach() for part in tokens)
    )


def _attention(tokens: ExactTokens, query: Tensor, scaling: float) -> Tensor:
    """Output `[batch, kv_heads, groups, queries, value_head_dim]` of the sampled queries, causal."""
    count = tokens.keys.shape[2]
    newest = min(query.shape[2], max(count // 2, 1))
    step = -(-newest // SAMPLE_QUERIES)
    position = torch.arange(count - newest, count, step, device=query.device)
    rows = position - count
    chosen = query.detach()[:, :, rows].float().unflatten(1, (tokens.keys.shape[1], -1))
    logits = scaling * chosen @ tokens.keys.unsqueeze(2).transpose(-1, -2)
    seen = torch.arange(count, device=query.device) <= position[:, None]
    return torch.softmax(torch.where(seen, logits, -torch.inf), -1) @ tokens.values.unsqueeze(2)


def _relative(found: Tensor, wanted: Tensor) -> float:
    energy = wanted.double().square().sum()
    return float((found - wanted).double().square().sum() / energy) if energy > 0 else 0.0


def _shape(layer: CompressedLayer) -> LayerShape | None:
    if layer.window is None:
        return None
    keys, values = layer.window.keys, layer.window.values
    return LayerShape(
        keys.shape[1], keys.shape[3], values.shape[3], keys.element_size(), layer.sliding_window
    )
