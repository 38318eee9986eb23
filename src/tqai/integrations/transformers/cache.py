"""`TurboQuantCache`: a transformers cache whose attention layers are compressed."""

from __future__ import annotations

from functools import partial
from os import PathLike
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from tqai.cache.calibration import Calibration
from tqai.cache.memory import MemoryReport
from tqai.config import CacheConfig
from tqai.errors import ConfigError, UnsupportedError
from tqai.integrations.transformers.bits import plan_bits, with_bits, with_calibration
from tqai.integrations.transformers.default import why_not_default
from tqai.integrations.transformers.layers import TurboQuantLayer, compressed_form, is_compressible
from tqai.integrations.transformers.saving import fingerprint, load, save

__all__ = ["TurboQuantCache"]


class TurboQuantCache(DynamicCache):
    """A compressed key-value cache, passed to a model as `past_key_values`.

    Constructed with the model, attention is computed on the codes (the model's attention
    implementation becomes "tqai", which serves every other cache as before; `tqai.unpatch(model)`
    undoes it). Constructed with the model's config or with nothing, it works with any attention
    implementation by decompressing one layer at a time, for the duration of that layer.

        cache = TurboQuantCache(model, bits=4)
        out = model.generate(**inputs, past_key_values=cache)
        print(cache.memory().bits_per_value)
    """

    layers: list[Any]
    layer_class_to_replicate: Any

    def __init__(
        self,
        model: Any = None,
        bits: int | str | None = None,
        *,
        config: CacheConfig | str | None = None,
        calibration: Calibration | str | PathLike[str] | None = None,
        offloading: bool = False,
        **settings: Any,
    ) -> None:
        """
        Args:
            model: a transformers model, its config, or None.
            bits: bits for keys and values alike; `bits_k` and `bits_v` set them apart. "auto" gives
                each layer 2, 3 or 4 bits for keys and for values within `bits_budget` bits per value.
            calibration: file of `tqai calibrate` by which the budget is spent; without it the first
                prefill decides.
            config: a `CacheConfig` or the name of a preset; further settings change its fields.
            offloading: not supported; only there to be refused with a reason.
            settings: fields of `CacheConfig`. Where nothing says how to compress, it is the default preset
                (`config.DEFAULT_PRESET`).

        Raises:
            ConfigError: a setting is out of range, or contradicts another.
            UnsupportedError: offloading, an encoder-decoder model, or one without layers to compress.
        """
        if offloading:
            raise UnsupportedError(
                "offloading=True: a compressed cache is not offloaded; allowed is False. It is already a "
                "fraction of the size; use fewer bits, or transformers' own offloaded DynamicCache"
            )
        self.settings = _settings(bits, config, settings, model)
        if calibration is not None:
            known = None if model is None else fingerprint(model)
            self.settings = with_calibration(self.settings, calibration, known)
        model_config = model if model is None or isinstance(model, PreTrainedConfig) else _config_of(model)
        if model_config is not None and getattr(model_config, "is_encoder_decoder", False):
            raise UnsupportedError(
                f"{type(model).__name__} is of an encoder-decoder model: allowed are decoder-only models"
            )
        super().__init__(config=model_config)
        if self.layer_class_to_replicate is not None:
            self.layer_class_to_replicate = self._next_layer
        elif not any(is_compressible(layer) for layer in self.layers) or not _takes_dynamic_cache(model):
            raise UnsupportedError(
                f"{type(model).__name__} has no attention layers with a dynamic cache, so there is nothing "
                "to compress: leave tqai out"
            )
        self.on_codes = False
        if model is not None and model is not model_config:
            from tqai.integrations.transformers.patching import attend_on_codes

            self.on_codes = attend_on_codes(model)
        self.made_for = None if model is None else fingerprint(model)
        self.settings = self._by_layer(self.settings)
        self.layers = [
            compressed_form(layer, self.settings, index, self.on_codes)
            for index, layer in enumerate(self.layers)
        ]
        self._plan = plan_bits(self.settings, self.layers)
        if model_config is not None and _soft_caps(model_config):
            self._without_key_offsets(model_config)

    @property
    def layer_bits(self) -> tuple[tuple[int, int] | None, ...]:
        """(bits_k, bits_v) of every layer; None for layers that are not compressed, or not decided yet."""
        undecided = self._plan is not None and self._plan.pending
        return tuple(
            (layer.store.config.bits_k, layer.store.config.bits_v)
            if hasattr(layer, "store") and not undecided
            else None
            for layer in self.layers
        )

    def memory(self) -> MemoryReport:
        """Bytes held and bits per value, all layers added up; see `MemoryReport`."""
        reports = []
        for layer in self.layers:
            if hasattr(layer, "store"):
                reports.append(layer.memory())
            reports.append(MemoryReport(other_bytes=_state_bytes(layer)))
        return MemoryReport.sum(reports)

    def save(self, path: str | PathLike[str], model: Any = None) -> None:
        """Write the cache to a safetensors file; see `tqai.cache.storage`."""
        if self._plan is not None:
            self._plan.overdue()
        save(self, path, model)

    @classmethod
    def load(cls, path: str | PathLike[str], model: Any = None) -> TurboQuantCache:
        """Read a cache that `save` wrote; see `tqai.cache.storage` for what is refused, and how."""
        return load(cls, path, model)

    def _without_key_offsets(self, model_config: PreTrainedConfig) -> None:
        if self.settings.offsets == "on":
            raise UnsupportedError(
                f"offsets='on': {model_config.model_type} soft-caps its attention logits, which an offset of "
                "the keys would change: allowed are 'auto' (offsets of the values only) and 'off'"
            )
        for layer in self.layers:
            if hasattr(layer, "store"):
                layer.store.soft_capped = True

    def _by_layer(self, settings: CacheConfig) -> CacheConfig:
        """`settings` with the bits of the last layer written out, now that the layers are known."""
        if settings.last_layer_bits is None:
            return settings
        compressible = [index for index, layer in enumerate(self.layers) if is_compressible(layer)]
        if not compressible:
            raise ConfigError(
                f"last_layer_bits={settings.last_layer_bits!r}: which layer is the last is not known yet, so "
                "the cache must be made with the model or its config"
            )
        return settings.by_layer(len(self.layers), compressible[-1])

    def _next_layer(self) -> TurboQuantLayer:
        return TurboQuantLayer(self.settings, len(self.layers), self.on_codes)


def _settings(
    bits: int | str | None, config: CacheConfig | str | None, changes: dict[str, Any], model: Any
) -> CacheConfig:
    changes = with_bits(bits, changes, config is not None)
    if config is None:
        return CacheConfig.asked(changes, partial(why_not_default, model=model))
    if isinstance(config, str):
        return CacheConfig.preset(config, **changes)
    if isinstance(config, CacheConfig):
        return CacheConfig.from_dict({**config.to_dict(), **changes})
    raise ConfigError(f"config={config!r}: allowed are a CacheConfig, the name of a preset and None")


def _soft_caps(config: PreTrainedConfig) -> bool:
    """Whether attention logits go through a soft cap, which is not blind to a shift of all of them."""
    return getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None


def _takes_dynamic_cache(model: Any) -> bool:
    """Whether `generate` of the model's class would make it a `DynamicCache`: a few models keep a cache
    of their own kind, which only the class knows."""
    asked = getattr(model, "_supports_default_dynamic_cache", None)
    return asked is None or bool(asked())


def _config_of(model: Any) -> PreTrainedConfig:
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ConfigError(
            f"model={type(model).__name__}: allowed are a transformers model, its config and None"
        )
    return config


def _state_bytes(layer: Any) -> int:
    """Bytes of recurrent and convolution states, and of layers that are not compressed."""
    tensors = []
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, None) or {}
        tensors += list(states.values()) if isinstance(states, dict) else list(states)
    if not hasattr(layer, "store"):
        tensors += [getattr(layer, "keys", None), getattr(layer, "values", None)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
