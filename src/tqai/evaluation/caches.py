"""Makers, by name, of the caches to compare."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from tqai.config import NAMED_PRESETS, PRESETS, CacheConfig
from tqai.errors import ConfigError, UnsupportedError
from tqai.evaluation.mlx_models import MlxCausalModel, mlx_cache

__all__ = ["CacheMaker", "cache_maker", "is_tqai", "known_caches"]

_QUANTIZED_BITS = {"quanto": (4, 2), "hqq": (4, 2, 3, 8)}
_PACKAGES = {"quanto": "optimum.quanto", "hqq": "hqq"}
_ANY_BITS = re.compile(r"[Kk](\d+)/?[Vv](\d+)")


@dataclass(frozen=True)
class CacheMaker:
    """Makes empty caches of one kind for one model; call it for a new one.

    Attributes:
        name: what the cache is called in tables, such as "K4/V2" or "quanto-4".
        family: "dynamic", "quanto", "hqq", "fp8", "quantized" (mlx-lm's) or "tqai".
        make: returns a new, empty cache.
        settings: what it is made with, fit for JSON.
    """

    name: str
    family: str
    make: Callable[[], Any]
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        return self.make()


def known_caches() -> tuple[str, ...]:
    """Every name that `cache_maker` takes (presets of tqai also in other spellings, such as "k4v2")."""
    quantized = [f"{kind}-{bits}" for kind, allowed in _QUANTIZED_BITS.items() for bits in allowed]
    return ("dynamic", *quantized, "fp8", *PRESETS, *NAMED_PRESETS)


def cache_maker(name: str, model: Any, label: str | None = None, **options: Any) -> CacheMaker:
    """The maker of a cache by name, for `model`.

    "dynamic" is transformers' uncompressed `DynamicCache`; "quanto-4", "quanto-2", "hqq-4" and so on
    and "fp8" are transformers' `QuantizedCache` with its own defaults (groups of 64, newest 128 tokens
    exact); the presets of tqai ("K4/V2", ...) are `TurboQuantCache` attending on its codes. For a model of
    mlx-lm there are its own caches instead (`mlx_models.mlx_cache`), and those of tqai.

    Args:
        name: one of `known_caches()`, or bits that no preset has, such as "K5/V2".
        model: a transformers causal language model, or an `MlxCausalModel`.
        label: what to call it in tables, instead of the name.
        options: for tqai, fields of `CacheConfig` (`sink_tokens`, `residual_window`, `seed`, ...); for
            quanto and hqq, arguments of `QuantizedCache` (`residual_length`, `q_group_size`, ...).

    Raises:
        ConfigError: an unknown name or option, or one that rounds activations.
        UnsupportedError: the package that the cache needs is not installed, or too old.
    """
    called = label if label is not None else name
    if isinstance(model, MlxCausalModel):
        return _of_mlx(name, model, label, options)
    kind, _, bits = name.partition("-")
    if name == "dynamic":
        _refuse_options(name, options)
        return CacheMaker(called, "dynamic", _dynamic(model))
    if name == "fp8":
        _refuse_options(name, options)
        return CacheMaker(called, "fp8", _quantized("fp8", model, {}))
    if kind in _QUANTIZED_BITS and bits.isdigit() and int(bits) in _QUANTIZED_BITS[kind]:
        settings = {"nbits": int(bits), "q_group_size": 64, "residual_length": 128, **options}
        _require_package(kind)
        return CacheMaker(called, kind, _quantized(kind, model, settings), settings)
    config = _config(name, options)
    if config is None:
        raise ConfigError(f"cache={name!r}: allowed are {', '.join(known_caches())}")
    if config.studies_activations:
        raise ConfigError(
            f"cache={name!r} rounds activations, which `tqai.patch` does and no cache: allowed are "
            f"{', '.join(known_caches())}"
        )
    return CacheMaker(label or config.label, "tqai", _turboquant(model, config), config.to_dict())


def is_tqai(name: str) -> bool:
    """Whether `cache_maker` makes a cache of tqai of this name."""
    return _config(name, {}) is not None


def _config(name: str, options: dict[str, Any]) -> CacheConfig | None:
    """The configuration of a cache of tqai by name; None if no preset is called so."""
    bits_of = _ANY_BITS.fullmatch(name)
    if bits_of is not None:
        return CacheConfig.from_dict({"bits_k": int(bits_of[1]), "bits_v": int(bits_of[2]), **options})
    try:
        return CacheConfig.preset(name, **options)
    except ConfigError as error:
        if "preset=" in str(error):
            return None
        raise


def _of_mlx(name: str, model: MlxCausalModel, label: str | None, options: dict[str, Any]) -> CacheMaker:
    config = _config(name, options)
    if config is None:
        _refuse_options(name, options)
    family, make, settings = mlx_cache(name, model, config)
    return CacheMaker(label or (config.label if config else name), family, make, settings)


def _dynamic(model: Any) -> Callable[[], Any]:
    from transformers import DynamicCache

    return lambda: DynamicCache(config=model.config)


def _quantized(backend: str, model: Any, settings: dict[str, Any]) -> Callable[[], Any]:
    from transformers import QuantizedCache

    def make() -> Any:
        return QuantizedCache(backend, model.config, **settings)

    try:
        layer = make().layers[0]
    except ValueError as error:
        raise UnsupportedError(f"transformers makes no {backend} cache of {settings}: {error}") from error
    except TypeError as error:
        raise ConfigError(f"a {backend} cache does not take {settings}: {error}") from error
    _try_out(layer, backend, settings.get("q_group_size", 64))
    return make


def _try_out(layer: Any, backend: str, group: int) -> None:
    """Quantize one token and read it back. quanto compiles its kernel at the first use: that must fail,
    or take its time, here and not in the middle of a measurement."""
    token = torch.zeros(1, 1, 1, group)
    try:
        layer.update(token, token)
        layer.update(token, token)
    except (RuntimeError, OSError) as error:
        raise UnsupportedError(f"the {backend} cache does not work on this machine: {error}") from error


def _turboquant(model: Any, config: CacheConfig) -> Callable[[], Any]:
    from tqai import TurboQuantCache

    return lambda: TurboQuantCache(model, config=config)


def _require_package(kind: str) -> None:
    package = _PACKAGES[kind]
    try:
        found = find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise UnsupportedError(f"the {kind} cache needs the package {package}, which is not installed")


def _refuse_options(name: str, options: dict[str, Any]) -> None:
    if options:
        raise ConfigError(f"the {name} cache takes no options, but was given {', '.join(sorted(options))}")
