"""`TurboQuantCache.save` and `load`: layers to and from a file, tied to the model they belong to."""

from __future__ import annotations

import hashlib
import json
from os import PathLike
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig

from tqai.cache.layer_state import export_layer, import_layer
from tqai.cache.storage import read_file, write_file
from tqai.config import CacheConfig
from tqai.errors import ConfigError, CorruptFileError, ModelMismatchError, UnsupportedError
from tqai.integrations.transformers.layers import TurboQuantLayer, TurboQuantSlidingLayer

__all__ = ["fingerprint", "load", "save"]

CacheT = TypeVar("CacheT")
SHAPING_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "vocab_size",
    "sliding_window",
    "layer_types",
    "rope_theta",
    "rope_parameters",
)
SETTINGS_OF_VERSION_1 = (
    *("bits_k", "bits_v", "sink_tokens", "residual_window", "cache_strategy", "codec", "rotation", "scale"),
    *("seed", "backend", "device", "check_finite"),
)
"""Always written; later settings only where they differ from what version 1 did."""
AS_IN_VERSION_1: dict[str, Any] = {"offsets": "off", "scale_format": "bfloat16", "layer_bits": None}
SAMPLED_PARAMETERS = 3
SAMPLED_VALUES = 64


def fingerprint(model: Any) -> dict[str, str | None]:
    """What ties a cache to its model: a digest of the config's shaping fields, and, given a model
    rather than a config, of a sample of its weights (in bfloat16, so that the dtype does not matter)."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    text_config = config.get_text_config(decoder=True)
    shaping = {name: getattr(text_config, name, None) for name in SHAPING_FIELDS}
    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True, default=str).encode()).hexdigest()
    if model is config:
        return {"config": digest, "weights": None}
    hasher = hashlib.sha256()
    parameters = list(model.named_parameters())
    for name, parameter in parameters[:SAMPLED_PARAMETERS] + parameters[-SAMPLED_PARAMETERS:]:
        sample = parameter.detach().reshape(-1)[:SAMPLED_VALUES].to("cpu", torch.bfloat16)
        hasher.update(name.encode() + sample.view(torch.uint8).numpy().tobytes())
    return {"config": digest, "weights": hasher.hexdigest()}


def save(cache: Any, path: str | PathLike[str], model: Any) -> None:
    """Write `cache`; `model` ties it to a model if the cache was made without one.

    Raises:
        UnsupportedError: a layer that is not ours (a recurrent state) cannot be saved.
    """
    tensors, layers = {}, []
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (TurboQuantLayer, TurboQuantSlidingLayer):
            raise UnsupportedError(
                f"layer {index} is a {type(layer).__name__}, whose state is not saved: "
                "allowed are caches of attention layers only"
            )
        held, about = export_layer(layer.store)
        tensors.update({f"layers.{index}.{name}": tensor for name, tensor in held.items()})
        layers.append(about)
    bits = cache.layer_bits
    decided = cache.settings
    if decided.bits_budget is not None and None not in bits:
        decided = decided.with_changes(bits_budget=None, layer_bits=bits)
    plain = {**CacheConfig().to_dict(), **AS_IN_VERSION_1}
    settings = {
        name: value
        for name, value in {**decided.to_dict(), "backend": None, "device": None}.items()
        if name in SETTINGS_OF_VERSION_1 or value != plain[name]
    }
    made_for = fingerprint(model) if model is not None else cache.made_for
    write_file(path, tensors, {"settings": settings, "layers": layers, "model": made_for})


def load(cls: type[CacheT], path: str | PathLike[str], model: Any) -> CacheT:
    """Read a cache of class `cls`, for `model` (a model, its config or None), onto the model's device.

    Raises:
        CacheFileError: see `storage.read_file`; ModelMismatchError if `model` is another one.
    """
    tensors, header = read_file(path)
    try:
        settings, layers, made_for = header["settings"], header["layers"], header["model"]
        config = CacheConfig.from_dict({**AS_IN_VERSION_1, **settings})
    except (KeyError, ConfigError) as error:
        raise CorruptFileError(
            f"{path}: the header is incomplete or holds an unknown setting: {error}"
        ) from error
    if model is not None and made_for is not None:
        here = fingerprint(model)
        for part, digest in made_for.items():
            if digest is not None and here.get(part) is not None and digest != here[part]:
                raise ModelMismatchError(
                    f"{path} belongs to another model: its {part} differs from the one given"
                )
    make: Any = cls
    cache = make(model, config=config)
    if model is None:
        cache.layer_class_to_replicate = None
        for index, about in enumerate(layers):
            window = about["sliding_window"]
            cache.layers.append(
                TurboQuantLayer(config, index)
                if window is None
                else TurboQuantSlidingLayer(window, config, index)
            )
        cache.made_for = made_for
    if len(cache.layers) != len(layers):
        raise ModelMismatchError(f"{path} has {len(layers)} layers, the model has {len(cache.layers)}")
    device = torch.device(getattr(model, "device", "cpu"))
    for index, (layer, about) in enumerate(zip(cache.layers, layers, strict=True)):
        prefix = f"layers.{index}."
        own = {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }
        import_layer(layer.store, own, about, device)
    loaded: CacheT = cache
    return loaded
