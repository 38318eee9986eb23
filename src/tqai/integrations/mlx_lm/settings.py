"""Which settings of `CacheConfig` the caches for mlx-lm serve."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tqai.config import CacheConfig
from tqai.errors import ConfigError, UnsupportedError

__all__ = ["refuses", "served", "settings_of"]

SERVED = (
    *("bits_k", "bits_v", "sink_tokens", "residual_window", "cache_strategy", "codec", "rotation"),
    *("rotation_v", "scale", "seed", "backend", "check_finite"),
)
UNUSED = ("qjl_sketch_size", "bits_hidden", "bits_ffn", "bits_attn")
"""Numbers that mean something only beside a setting that is refused."""
STRATEGIES = ("auto", "residual", "full")


def served(config: CacheConfig | None) -> CacheConfig:
    """`config` (None: the default) with `backend="mlx"`, if the caches for mlx-lm serve it.

    Raises:
        UnsupportedError: a setting that they do not serve; the message names it.
    """
    config = CacheConfig.asked({}, refuses) if config is None else config
    if config.backend not in (None, "mlx"):
        raise UnsupportedError(f"backend={config.backend!r}: a model of mlx-lm is served by 'mlx' (or None)")
    if config.cache_strategy not in STRATEGIES:
        raise UnsupportedError(
            f"cache_strategy={config.cache_strategy!r}: with mlx-lm allowed are {', '.join(STRATEGIES)}"
        )
    allowed = {"offsets": "off"}
    for field in fields(CacheConfig):
        value = getattr(config, field.name)
        wanted = allowed.get(field.name, field.default)
        if field.name not in SERVED + UNUSED and value != wanted:
            raise UnsupportedError(f"{field.name}={value!r}: with mlx-lm allowed is {wanted!r}")
    return config.with_changes(backend="mlx")


def settings_of(config: CacheConfig | str | None, given: dict[str, Any]) -> CacheConfig:
    """The configuration of `patch`'s arguments: a `CacheConfig`, a preset's name, or single fields.

    Raises:
        ConfigError: a setting is out of range, or given beside `config`.
        UnsupportedError: as `served`.
    """
    defaults = CacheConfig().to_dict()
    changed = {name: value for name, value in given.items() if value != defaults.get(name, object())}
    backend = changed.get("backend")
    if config is None:
        return served(CacheConfig.asked(given, refuses))
    others = sorted(set(changed) - ({"backend"} if backend == "mlx" else set()))
    if others:
        raise ConfigError(f"config={config!r} is given beside {', '.join(others)}: allowed is one of the two")
    if isinstance(config, str):
        config = CacheConfig.preset(config)
    if not isinstance(config, CacheConfig):
        raise ConfigError(f"config={config!r}: allowed are a CacheConfig, the name of a preset and None")
    return served(config)


def refuses(config: CacheConfig) -> str | None:
    """Why `config` is not served, or None."""
    if config.codec != "scalar":
        return f"codec={config.codec!r}: there is no kernel for these codes in MLX, so they are not a default"
    try:
        served(config)
    except UnsupportedError as error:
        return str(error)
    return None
