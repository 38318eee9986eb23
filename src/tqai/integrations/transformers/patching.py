"""`patch` and `unpatch`: a model that compresses its cache by itself, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from tqai.config import CacheConfig
from tqai.errors import ConfigError, UnsupportedError
from tqai.integrations.transformers.attention import NAME, register
from tqai.integrations.transformers.cache import TurboQuantCache

__all__ = ["attend_on_codes", "patch", "unpatch"]

CACHE_IMPLEMENTATION = "turboquant"
_original_attention: WeakKeyDictionary[nn.Module, str | dict[str, str]] = WeakKeyDictionary()


def patch(
    model: Any,
    bits_k: int = 4,
    bits_v: int = 2,
    sink_tokens: int = 0,
    residual_window: int | None = None,
    cache_strategy: str = "auto",
    backend: str | None = None,
    device: str | None = None,
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
        config: a `CacheConfig` or the name of a preset, instead of the single settings.
        settings: further fields of `CacheConfig`; the other arguments are fields too.

    Raises:
        ConfigError: a setting is out of range, or given beside `config`.
        UnsupportedError: an encoder-decoder model.
    """
    given = {
        "bits_k": bits_k,
        "bits_v": bits_v,
        "sink_tokens": sink_tokens,
        "residual_window": residual_window,
        "cache_strategy": cache_strategy,
        "backend": backend,
        "device": device,
        **settings,
    }
    if config is not None:
        defaults = CacheConfig().to_dict()
        changed = sorted(name for name, value in given.items() if value != defaults.get(name, object()))
        if changed:
            raise ConfigError(f"config={config!r} is given beside {', '.join(changed)}: allowed is one of the two")
        given = {"config": config}
    cache = TurboQuantCache(model, **given)
    unpatch_generate(model)
    model.generate = PatchedGenerate(model, cache.settings)
    return cache


def unpatch(model: Any) -> None:
    """Undo `patch`, and what constructing a `TurboQuantCache` with the model did. Harmless when
    there is nothing to undo. Caches made before stay usable, without attention on codes."""
    unpatch_generate(model)
    original = _original_attention.pop(model, None)
    if original is not None:
        model.set_attn_implementation(original)


def unpatch_generate(model: Any) -> None:
    """Give the model its own `generate` back."""
    if isinstance(model.__dict__.get("generate"), PatchedGenerate):
        del model.generate


def attend_on_codes(model: Any) -> bool:
    """Switch the model's attention to tqai's; False if the model does not take one (its cache then
    decompresses one layer at a time)."""
    register()
    current = getattr(model.config, "_attn_implementation", None)
    if current == NAME:
        return True
    if not hasattr(model, "set_attn_implementation"):
        return False
    original: dict[str, str] = {"": current}
    for name in getattr(model.config, "sub_configs", {}):
        sub_config = getattr(model.config, name, None)
        if sub_config is not None:
            original[name] = sub_config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        return False
    _original_attention[model] = original if len(original) > 1 else current
    return True


@dataclass
class PatchedGenerate:
    """Stands in for `model.generate`: gives a call without a cache a fresh compressed one."""

    model: Any
    settings: CacheConfig

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, with `past_key_values` filled in where the caller left it open."""
        original = type(self.model).generate
        config = kwargs.get("generation_config")
        wanted = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
        if wanted == CACHE_IMPLEMENTATION:
            kwargs.pop("cache_implementation", None)
            if getattr(config, "cache_implementation", None) == CACHE_IMPLEMENTATION:
                config = type(config).from_dict({**config.to_dict(), "cache_implementation": None})
                kwargs["generation_config"] = config
        elif wanted is not None:
            return original(self.model, *args, **kwargs)
        use_cache = kwargs.get("use_cache", getattr(config, "use_cache", True))
        if kwargs.get("past_key_values") is None and use_cache is not False:
            kwargs["past_key_values"] = TurboQuantCache(self.model, config=self.settings)
        return original(self.model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchedGenerate:
        """A copied model generates with itself, not with the model it was copied from."""
        copied = memo.get(id(self.model))
        if copied is None:
            raise UnsupportedError("copy the model, not its generate")
        return PatchedGenerate(copied, self.settings)
