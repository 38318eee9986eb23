"""`patch` and `unpatch` for models of mlx-lm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from tqai.config import CacheConfig
from tqai.errors import ConfigError, UnsupportedError
from tqai.integrations.mlx_lm.attention import modules_of, put_back, replace
from tqai.integrations.mlx_lm.caches import TurboQuantKVCache, TurboQuantRotatingKVCache
from tqai.integrations.mlx_lm.prompt_cache import PromptCache
from tqai.integrations.mlx_lm.settings import settings_of

__all__ = ["compressed_form", "patch", "unpatch"]

logger = logging.getLogger("tqai")

TRIED_TOKENS = 65
"""Tokens of the trial run: one page and one more."""


def patch(
    model: Any,
    bits_k: int | None = None,
    bits_v: int | None = None,
    sink_tokens: int | None = None,
    backend: str | None = None,
    device: str | None = None,
    *,
    residual_window: int | None = None,
    cache_strategy: str = "auto",
    config: CacheConfig | str | None = None,
    **settings: Any,
) -> PromptCache:
    """Make everything of mlx-lm that makes a cache for `model` make a compressed one; return one.

    `mlx_lm.generate`, `stream_generate`, `batch_generate` and the server ask `model.make_cache`; that is
    what is replaced, and the attention function in the modules of the model's classes, so that attention
    is computed on the codes. Caches of other kinds (recurrent states) stay as they are. A model that does
    anything with keys or values between its cache and that function gets decompressed arrays instead, one
    layer's at a time; a trial run, which computes nothing, finds out. Patching again changes the settings.

    Args:
        model: a model that `mlx_lm.load` returned.
        bits_k, bits_v, ...: fields of `CacheConfig`, None for what they are there. Where no argument says
            how to compress, the cache is of the default preset, or of `config.FALLBACK_PRESET` where that
            is not served here; a warning in the log says so.
        config: a `CacheConfig` or the name of a preset, instead of the single settings.
        settings: further fields of `CacheConfig`; the other arguments are fields too.

    Raises:
        ConfigError: a setting is out of range, or given beside `config`.
        UnsupportedError: a setting or a model that this cannot serve.
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
    given = {name: value for name, value in given.items() if value is not None or name in settings}
    if device is not None:
        raise ConfigError(f"device={device!r}: MLX computes on its default device, allowed is None")
    wanted = settings_of(config, given)
    if not callable(model) or not hasattr(model, "layers"):
        raise UnsupportedError(
            f"{type(model).__name__} has no layers: allowed are models that mlx-lm has loaded"
        )
    unpatch(model)
    modules = modules_of(model) if wanted.cache_strategy in ("auto", "residual") else ()
    replace(modules)
    maker = CacheMaker(
        model, vars(model).get("make_cache"), getattr(model, "make_cache", None), wanted, modules
    )
    try:
        maker.on_codes = maker.tried()
        model.make_cache = maker
        return maker()
    except BaseException:
        put_back(modules)
        vars(model).pop("make_cache", None)
        raise


def unpatch(model: Any) -> None:
    """Undo `patch`. Harmless when there is nothing to undo. Caches made before stay usable, without
    attention on codes."""
    maker = vars(model).get("make_cache")
    if isinstance(maker, CacheMaker):
        put_back(maker.modules)
        del model.make_cache
        if maker.restore is not None:
            model.make_cache = maker.restore


class CacheMaker:
    """Stands in for `model.make_cache`.

    Attributes:
        restore: what the model itself (rather than its class) held as `make_cache` before, or None.
        original: the model's `make_cache`, or None if it had none.
        modules: modules whose attention was replaced for this model.
        on_codes: whether the caches give handles to the model.
    """

    def __init__(
        self,
        model: Any,
        restore: Any,
        original: Callable[[], list[Any]] | None,
        config: CacheConfig,
        modules: Sequence[str],
    ) -> None:
        self.restore = restore
        self.original = original
        self.config = config
        self.modules = tuple(modules)
        self.on_codes = bool(modules)
        self._model = model

    def __call__(self) -> PromptCache:
        """A fresh cache."""
        modules = self.modules if self.on_codes else ()
        return PromptCache(compressed_form(cache, self.config, modules) for cache in self.plain())

    def plain(self) -> list[Any]:
        """The cache that mlx-lm would have made."""
        if self.original is not None:
            return list(self.original())
        return [mlx_lm_cache.KVCache() for _ in self._model.layers]

    def tried(self) -> bool:
        """Whether the model takes handles, found by building the graph of a short run (MLX is lazy, so
        nothing is computed).

        Raises:
            UnsupportedError: it takes neither handles nor arrays of a compressed cache.
        """
        caches = self.plain()
        if not any(_is_compressible(cache) for cache in caches):
            kinds = sorted({type(cache).__name__ for cache in caches})
            raise UnsupportedError(
                f"{type(self._model).__name__} has no attention layers with a cache that can be compressed "
                f"(it has {', '.join(kinds)}): leave tqai out"
            )
        problem: Exception | None = None
        for on_codes in (True, False) if self.modules else (False,):
            self.on_codes = on_codes
            try:
                self._run()
            except Exception as error:  # of the model's own code, so of any kind
                problem = error
                continue
            if not on_codes and self.config.cache_strategy != "full":
                logger.info(
                    "%s works on keys and values itself (%s): they are decompressed layer by layer",
                    type(self._model).__name__,
                    problem or "its modules do not call mlx-lm's attention function",
                )
            return on_codes
        raise UnsupportedError(
            f"{type(self._model).__name__} does not run with a compressed cache: {problem}"
        ) from problem

    def _run(self) -> None:
        config = self.config.with_changes(check_finite=False)
        modules = self.modules if self.on_codes else ()
        caches = [compressed_form(cache, config, modules) for cache in self.plain()]
        for tokens in (TRIED_TOKENS, 1, 2):
            self._model(mx.zeros((1, tokens), mx.int32), cache=caches)


def compressed_form(cache: Any, config: CacheConfig, modules: Sequence[str]) -> Any:
    """Our cache in place of an empty one of mlx-lm; caches of other kinds as they are."""
    form = _FORMS.get(type(cache))
    return cache if form is None else form(cache, config, modules)


def _is_compressible(cache: Any) -> bool:
    if type(cache) is mlx_lm_cache.CacheList:
        return any(_is_compressible(part) for part in cache.caches)
    return type(cache) in _FORMS and not getattr(cache, "keep", 0)


def _list_form(cache: Any, config: CacheConfig, modules: Sequence[str]) -> Any:
    return mlx_lm_cache.CacheList(*(compressed_form(part, config, modules) for part in cache.caches))


def _rotating_form(cache: Any, config: CacheConfig, modules: Sequence[str]) -> Any:
    if cache.keep:
        return cache
    return TurboQuantRotatingKVCache(cache.max_size, 0, config, modules)


_FORMS: dict[type, Callable[..., Any]] = {
    mlx_lm_cache.KVCache: lambda cache, config, modules: TurboQuantKVCache(config, modules),
    mlx_lm_cache.RotatingKVCache: _rotating_form,
    mlx_lm_cache.CacheList: _list_form,
}
"""mlx-lm's cache -> how ours is made of it. Exact types: a subclass may keep more than keys and values."""
