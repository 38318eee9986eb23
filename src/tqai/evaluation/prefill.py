"""Filling several caches with the same prompt at the price of one forward pass.

Every cache here attends to the raw keys and values while an empty cache is filled, so what enters it
does not depend on what it is. One pass over an uncompressed cache therefore yields the keys and values
for all: each layer's go into each cache through its own `update`, exactly as the model would call it. A
cache of tqai that decides by queries too (`balance`, `bits_budget`) gets a pass of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tqai.config import CacheConfig
from tqai.evaluation.chunked import run_tokens
from tqai.evaluation.mlx_models import MlxCausalModel

__all__ = ["fill_from", "fork_cache", "prefill_caches"]


def prefill_caches(model: Any, input_ids: Tensor, makers: Sequence[Callable[[], Any]]) -> list[Any]:
    """A new cache of each maker, filled with `input_ids` `[batch, tokens]`.

    One forward pass serves all where every layer of the model is full attention, but for caches that look
    at queries; otherwise (and for a model of mlx-lm) each cache gets a pass of its own. With no tokens the
    caches stay empty.
    """
    caches = [make() for make in makers]
    if not input_ids.shape[1]:
        return caches
    if isinstance(model, MlxCausalModel):
        for cache in caches:
            run_tokens(model, input_ids, cache, last_only=True)
        return caches
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    source = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in source.layers):
        for cache in caches:
            run_tokens(model, input_ids, cache, last_only=True)
        return caches
    run_tokens(model, input_ids, source, last_only=True)
    for cache in caches:
        if _looks_at_queries(cache):
            run_tokens(model, input_ids, cache, last_only=True)
        else:
            fill_from(source, cache)
    return caches


def _looks_at_queries(cache: Any) -> bool:
    settings = getattr(cache, "settings", None)
    return isinstance(settings, CacheConfig) and (
        settings.balance != "off" or settings.bits_budget is not None
    )


def fill_from(source: Any, target: Any) -> None:
    """Put all tokens of `source`, a `DynamicCache` of full-attention layers, into the empty `target`."""
    with torch.inference_mode():
        for index, layer in enumerate(source.layers):
            target.update(layer.keys, layer.values, index)


def fork_cache(filled: Any, make: Callable[[], Any], source: Any) -> Any:
    """A copy of the cache `filled` that can be written to.

    Where it cannot be copied (optimum-quanto's tensors refuse `copy.deepcopy` with a RuntimeError), a new
    one of `make`, filled from `source`: a `DynamicCache` of full-attention layers with the same tokens.
    """
    try:
        with torch.inference_mode():
            return copy.deepcopy(filled)
    except RuntimeError:
        fresh = make()
        fill_from(source, fresh)
        return fresh
