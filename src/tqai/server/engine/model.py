"""What a model's attention layers look like to the cache, found out by running one token through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tqai.backends.base import Attended
from tqai.errors import TqaiError, UnsupportedError
from tqai.integrations.transformers.cache import TurboQuantCache
from tqai.integrations.transformers.layers import TurboQuantLayer, TurboQuantSlidingLayer
from tqai.integrations.transformers.patching import attend_on_codes
from tqai.integrations.transformers.ragged import RaggedCache

__all__ = ["LayerShape", "ModelShape", "inspect_model"]


@dataclass(frozen=True)
class LayerShape:
    """One attention layer.

    Attributes:
        kv_heads: heads of keys and values.
        key_dim, value_dim: their head dimensions.
        sliding_window: tokens in sight, or None for all.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None


@dataclass(frozen=True)
class ModelShape:
    """All attention layers, and the dtype and device of their keys. `sink_logits`: heads have one more
    logit without a value, for which attention must return its log-sum-exp."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    context_tokens: int | None
    sink_logits: bool = False


class _Probe:
    """A store that keeps the shapes of what it is given and attends to nothing but the token itself."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[torch.Size, torch.Size]] = {}
        self.values: dict[int, Tensor] = {}

    def update(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.seen[layer] = (keys.shape, values.shape)
        self.values[layer] = values

    def attend_layer(self, layer: int, query: Tensor, scaling: float, softcap: float | None) -> Attended:
        values = self.values.pop(layer)
        out = values.repeat_interleave(query.shape[1] // values.shape[1], dim=1)
        return Attended(out, query.new_zeros(query.shape[:3], dtype=torch.float32))


def inspect_model(model: Any) -> ModelShape:
    """The shape of a transformers model, which attends by tqai's function afterwards.

    Raises:
        UnsupportedError: layers other than full and sliding attention, or attention that tqai cannot
            take over.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    windows = _sliding_windows(model)
    count = len(windows)
    if not attend_on_codes(model):
        raise UnsupportedError(
            f"{name} does not let its attention be chosen, so it cannot be served on codes"
        )
    probe = _Probe()
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            token = torch.zeros((1, 1), dtype=torch.long, device=device)
            cache = RaggedCache(probe, count)
            logits = model(input_ids=token, position_ids=token, past_key_values=cache, use_cache=True).logits
    except TqaiError:
        raise
    except Exception as error:  # a model that wants another cache fails in ways of its own
        raise UnsupportedError(f"{name} cannot be served by continuous batching: {error}") from error
    if set(probe.seen) != set(range(count)) or probe.values:
        raise UnsupportedError(f"{name} does not attend to each of its {count} layers' cache by itself")
    layers = tuple(
        LayerShape(keys[1], keys[3], values[3], windows[index])
        for index, (keys, values) in sorted(probe.seen.items())
    )
    return ModelShape(
        layers,
        next(model.parameters()).dtype,
        device,
        int(logits.shape[-1]),
        getattr(config, "max_position_embeddings", None),
        any(label.endswith(".sinks") for label, _ in model.named_parameters()),
    )


def _sliding_windows(model: Any) -> list[int | None]:
    """Per layer the tokens in sight, None for all.

    Raises:
        UnsupportedError: a layer of another kind.
    """
    cache = TurboQuantCache(model.config)
    config = model.config.get_text_config(decoder=True)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise UnsupportedError(f"{type(model).__name__} attends within chunks, which batching does not serve")
    if not cache.layers:
        return [None] * int(config.num_hidden_layers)
    for layer in cache.layers:
        if type(layer) not in (TurboQuantLayer, TurboQuantSlidingLayer):
            raise UnsupportedError(
                f"{type(model).__name__} has layers of kind {type(layer).__name__}: continuous batching "
                "serves full and sliding attention"
            )
    return [layer.store.sliding_window for layer in cache.layers]
