"""`patch` and `unpatch`: a model that compresses its cache by itself, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

from tqai.config import COMPRESSION_FIELDS, CacheConfig
from tqai.errors import ConfigError
from tqai.integrations.transformers.activations import ActivationStudy
from tqai.integrations.transformers.attention import NAME, register
from tqai.integrations.transformers.cache import TurboQuantCache
from tqai.integrations.transformers.converted import converted_settings

__all__ = ["attend_on_codes", "is_taken_over", "patch", "release_attention", "unpatch"]

COMPRESSION_SETTINGS = COMPRESSION_FIELDS | {"bits", "calibration"}
CACHE_IMPLEMENTATION = "turboquant"
DYNAMIC_BY_DEFAULT = "hybrid"
"""Some checkpoints name this in their generation config, and transformers reads it as "none named"."""
ORIGINAL_ATTENTION = "_tqai_original_attention"
"""Attribute of a model whose attention is tqai's: what it was before. On the model, so that a copy
of the model can be unpatched too."""
STUDY = "_tqai_activation_study"
"""Attribute of a patched model whose activations are rounded: the `ActivationStudy`."""


def patch(
    model: Any,
    bits_k: int | None = None,
    bits_v: int | None = None,
    sink_tokens: int | None = None,
    backend: str | None = None,
    device: str | None = None,
    config_path: str | PathLike[str] | None = None,
    compress_hidden: bool = False,
    bits_hidden: int = 8,
    compress_ffn: bool = False,
    bits_ffn: int = 8,
    compress_attn_logits: bool = False,
    bits_attn: int = 8,
    use_qjl: bool | None = None,
    qjl_sketch_size: int | None = None,
    cache_strategy: str = "auto",
    residual_window: int | None = None,
    *,
    config: CacheConfig | str | None = None,
    **settings: Any,
) -> TurboQuantCache:
    """Make `model.generate` use a compressed cache, and return one to pass along or inspect.

    After this, `model.generate(**inputs, past_key_values=cache)` uses the returned cache;
    `model.generate(**inputs)` and `cache_implementation="turboquant"` use a fresh one each call.
    Other caches and plain forward passes work as before. Patching again changes the settings.

    Args:
        model: a decoder-only transformers model.
        bits_k, bits_v, ...: fields of `CacheConfig`, None for what they are there. Where no argument says
            how to compress, the cache is of the default preset (`config.DEFAULT_PRESET`).
        config_path: a folder that `tqai convert` wrote; its settings are the defaults of the others.
        compress_hidden, compress_ffn, compress_attn_logits: round activations of every forward pass until
            `unpatch` (`integrations.transformers.activations`): a study, which saves no memory.
        config: a `CacheConfig` or the name of a preset, instead of settings of compression. What else is
            given (`backend`, `device`, studies of activations) goes before what it says.
        settings: further fields of `CacheConfig`, and what `TurboQuantCache` takes beside them
            (`bits="auto"`, `calibration=`); the other arguments are fields too.

    Raises:
        ConfigError: a setting is out of range, or one of compression is given beside `config`;
            `config_path` is no such folder, or belongs to a model with other shapes; `model` has no
            `generate`.
        UnsupportedError: an encoder-decoder model, or one without attention layers to compress.
    """
    if not callable(getattr(_uncompiled(model), "generate", None)):
        raise ConfigError(
            f"model={type(model).__name__}: allowed are transformers models with `generate`, such as "
            "AutoModelForCausalLM gives"
        )
    given = {
        "bits_k": bits_k,
        "bits_v": bits_v,
        "sink_tokens": sink_tokens,
        "backend": backend,
        "device": device,
        "compress_hidden": compress_hidden,
        "bits_hidden": bits_hidden,
        "compress_ffn": compress_ffn,
        "bits_ffn": bits_ffn,
        "compress_attn_logits": compress_attn_logits,
        "bits_attn": bits_attn,
        "use_qjl": use_qjl,
        "qjl_sketch_size": qjl_sketch_size,
        "cache_strategy": cache_strategy,
        "residual_window": residual_window,
        **settings,
    }
    given = {name: value for name, value in given.items() if value is not None or name in settings}
    defaults = CacheConfig().to_dict()
    changed = {name: value for name, value in given.items() if value != defaults.get(name, object())}
    if config is not None:
        # what is said of compression counts even where it is the default of its field: not of the preset
        said = {name for name, value in given.items() if value is not None}
        beside = sorted(said & COMPRESSION_SETTINGS) + (["config_path"] if config_path is not None else [])
        if beside:
            raise ConfigError(
                f"config={config!r} is given beside {', '.join(beside)}: allowed is one of the two"
            )
        given = {"config": config, **changed}
    elif config_path is not None:
        held = converted_settings(config_path, model)
        if {"bits", "bits_k", "bits_v"} & set(given):
            held = held.with_changes(
                layer_bits=None, last_layer_bits=None
            )  # bits asked for go before those of a calibration
        asked = {name: value for name, value in given.items() if name in COMPRESSION_FIELDS}
        given = {"config": held, **changed, **asked}
    cache = TurboQuantCache(model, **given)
    model = _uncompiled(model)
    _unpatch_generate(model)
    _detach_study(model)
    if cache.settings.studies_activations:
        setattr(model, STUDY, ActivationStudy(model, cache.settings).attach())
    model.generate = PatchedGenerate(model, model.generate, vars(model).get("generate"), cache.settings)
    return cache


def unpatch(model: Any) -> None:
    """Undo `patch`, and what constructing a `TurboQuantCache` with the model did. Harmless when
    there is nothing to undo. Caches made before stay usable, without attention on codes."""
    model = _uncompiled(model)
    _unpatch_generate(model)
    _detach_study(model)
    release_attention(model)


def release_attention(model: Any) -> None:
    """Undo `attend_on_codes`."""
    model = _uncompiled(model)
    original = vars(model).get(ORIGINAL_ATTENTION)
    if original is not None:
        delattr(model, ORIGINAL_ATTENTION)
        model.set_attn_implementation(original)


def is_taken_over(model: Any) -> bool:
    """Whether the model's attention is tqai's now."""
    return bool(_uncompiled(model).config.get_text_config(decoder=True)._attn_implementation == NAME)


def attend_on_codes(model: Any) -> bool:
    """Switch the model's attention to tqai's; False if the model does not take one (its cache then
    decompresses one layer at a time)."""
    register()
    model = _uncompiled(model)
    decoder = model.config.get_text_config(decoder=True)
    if decoder._attn_implementation == NAME:
        return True
    if not hasattr(model, "set_attn_implementation"):
        return False
    original = _attention_of(model.config)
    model.set_attn_implementation(NAME)
    if decoder._attn_implementation != NAME:
        model.set_attn_implementation(original)
        return False
    setattr(model, ORIGINAL_ATTENTION, original)
    return True


@dataclass
class PatchedGenerate:
    """Stands in for `model.generate`: gives a call without a cache a fresh compressed one.

    Attributes:
        original: the model's own `generate`.
        restore: what the model itself (rather than its class) held as `generate` before, or None.
        settings: the fresh caches' settings.
    """

    model: Any
    original: Callable[..., Any]
    restore: Any
    settings: CacheConfig

    def __call__(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, with `past_key_values` filled in where the caller left it open.

        Raises:
            ConfigError: `cache_implementation="turboquant"` beside a cache of another kind.
        """
        defaults = getattr(self.model, "generation_config", None)
        wanted, by_default = kwargs.get("cache_implementation"), False
        if wanted is None and generation_config is not None:
            wanted = generation_config.cache_implementation
        if wanted is None:
            wanted, by_default = getattr(defaults, "cache_implementation", None), True
        if wanted == CACHE_IMPLEMENTATION:
            kwargs.pop("cache_implementation", None)
            if by_default and generation_config is None:
                generation_config = defaults
            generation_config = _without_implementation(generation_config)
        elif wanted is not None and not (by_default and wanted == DYNAMIC_BY_DEFAULT):
            return self.original(inputs, generation_config, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        if cache is None and self._uses_cache(generation_config, kwargs):
            cache = kwargs["past_key_values"] = TurboQuantCache(self.model, config=self.settings)
            if getattr(generation_config, "is_assistant", None):
                # as transformers does for the cache that it makes for an assistant
                cache.activate_past_recording()
        elif cache is not None and wanted == CACHE_IMPLEMENTATION and not isinstance(cache, TurboQuantCache):
            raise ConfigError(
                f"cache_implementation={wanted!r} beside past_key_values of {type(cache).__name__}: "
                "allowed is one of the two"
            )
        if getattr(defaults, "cache_implementation", None) == CACHE_IMPLEMENTATION:
            return self._with_clean_defaults(inputs, generation_config, *args, **kwargs)
        return self.original(inputs, generation_config, *args, **kwargs)

    def _uses_cache(self, generation_config: Any, kwargs: dict[str, Any]) -> bool:
        sources = (generation_config, getattr(self.model, "generation_config", None))
        given = [kwargs.get("use_cache"), *(getattr(source, "use_cache", None) for source in sources)]
        return next((value for value in given if value is not None), True) is not False

    def _with_clean_defaults(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` while the model's own generation config does not name a cache of ours, which
        transformers would refuse."""
        held = self.model.generation_config
        self.model.generation_config = _without_implementation(held)
        try:
            return self.original(*args, **kwargs)
        finally:
            self.model.generation_config = held


def _without_implementation(generation_config: Any) -> Any:
    if getattr(generation_config, "cache_implementation", None) != CACHE_IMPLEMENTATION:
        return generation_config
    generation_config = copy.copy(generation_config)
    generation_config.cache_implementation = None
    return generation_config


def _unpatch_generate(model: Any) -> None:
    """Give the model its own `generate` back."""
    patched = vars(model).get("generate")
    if isinstance(patched, PatchedGenerate):
        del model.generate
        if patched.restore is not None:
            model.generate = patched.restore


def _detach_study(model: Any) -> None:
    """Take away the rounding of activations that `patch` attached."""
    study = vars(model).pop(STUDY, None)
    if study is not None:
        study.detach()


def _attention_of(config: Any) -> str | dict[str, Any]:
    """The attention implementation of a config and its sub-configs, as `set_attn_implementation` takes it."""
    own: str = config._attn_implementation
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    parts = {name: part for name, part in parts.items() if part is not None}
    return {"": own, **{name: _attention_of(part) for name, part in parts.items()}} if parts else own


def _uncompiled(model: Any) -> Any:
    """The model inside what `torch.compile(model)` returns; any other model as it is."""
    return getattr(model, "_orig_mod", model)
