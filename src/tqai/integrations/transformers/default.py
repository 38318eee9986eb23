"""Where the default preset gives way to the plain one: what only the model and its device can tell."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from tqai.backends import resolve
from tqai.cache.page_format import page_format_for
from tqai.config import CacheConfig
from tqai.errors import TqaiError

__all__ = ["why_not_default"]

SLOW_ENCODERS = ("torch",)
"""Backends that encode trellis codes hundreds of times more slowly than scalar ones."""


def why_not_default(config: CacheConfig, model: Any) -> str | None:
    """Why a cache that is made with `model` (a model, its config or None) should not have `config`, which
    nobody asked for, or None."""
    if model is None:
        if config.last_layer_bits is None:
            return None
        return "the cache was made without the model or its config, so its last layer is not known"
    if isinstance(model, PreTrainedConfig) or not config.codec.startswith("trellis"):
        return None
    device = getattr(model, "device", None)
    head_dim = _head_dim(model.config.get_text_config(decoder=True)) if hasattr(model, "config") else None
    if device is None or head_dim is None:
        return None
    device_type = device.type if config.device is None else config.device.split(":")[0]
    dtype = str(model.dtype).removeprefix("torch.")
    uniform = config.with_changes(last_layer_bits=None)
    try:
        choice = resolve(page_format_for(uniform, head_dim, head_dim), device_type, dtype, config.backend)
    except TqaiError:
        return None  # said in full where the cache is used
    if choice.backend.name in SLOW_ENCODERS:
        return f"backend {choice.backend.name!r} encodes {config.codec} codes slowly: {choice.reason}"
    return None


def _head_dim(config: Any) -> int | None:
    dim = getattr(config, "head_dim", None)
    if dim is None and getattr(config, "num_attention_heads", None):
        dim = config.hidden_size // config.num_attention_heads
    return dim
