"""What a model's attention layers look like to the cache, found out by running one token through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tqai.backends.base import Attended
from tqai.errors import UnsupportedError
from tqai.integrations.transformers.patching import attend_on_codes
from tqai.integrations.transformers.ragged import RaggedCache

__all__ = ["LayerShape", "ModelShape", "inspect_model"]

SERVED_LAYERS = ("full_attention", "sliding_attention")


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
    """All attention layers, and the dtype and device of their keys."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    context_tokens: int | None


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
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    foreign = sorted(set(kinds) - set(SERVED_LAYERS))
    if foreign or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{name} has layers of kind {', '.join(foreign) or 'encoder-decoder'}: "
            f"continuous batching serves {', '.join(SERVED_LAYERS)}"
        )
    if not attend_on_codes(model):
        raise UnsupportedError(
            f"{name} does not let its attention be chosen, so it cannot be served on codes"
        )
    probe = _Probe()
    device = next(model.parameters()).device
    with torch.inference_mode():
        token = torch.zeros((1, 1), dtype=torch.long, device=device)
        cache = RaggedCache(probe, count)
        logits = model(input_ids=token, position_ids=token, past_key_values=cache, use_cache=True).logits
    if set(probe.seen) != set(range(count)):
        raise UnsupportedError(f"{name} fills {len(probe.seen)} of {count} layers of its cache")
    window = getattr(config, "sliding_window", None)
    layers = tuple(
        LayerShape(keys[1], keys[3], values[3], window if kinds[index] == "sliding_attention" else None)
        for index, (keys, values) in sorted(probe.seen.items())
    )
    return ModelShape(
        layers,
        logits.dtype if not layers else next(model.parameters()).dtype,
        device,
        int(logits.shape[-1]),
        getattr(config, "max_position_embeddings", None),
    )
