"""`tqai.patch` and `tqai.unpatch`: the integration that a model needs, found by its class.

Neither framework is imported to find out, so that a Mac needs no torch and everything else no MLX.
"""

from __future__ import annotations

from typing import Any

__all__ = ["patch", "unpatch"]


def patch(model: Any, *settings: Any, **named_settings: Any) -> Any:
    """Make `model` compress its KV cache by itself; returns a cache to pass along or inspect.

    A model of transformers (`tqai.integrations.transformers.patch`):

        cache = tqai.patch(model, bits_k=4, bits_v=2)
        model.generate(**inputs, past_key_values=cache)

    A model that `mlx_lm.load` returned (`tqai.integrations.mlx_lm.patch`):

        cache = tqai.patch(model, bits_k=4, bits_v=2)
        mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)

    In both cases a call without a cache makes itself a compressed one. The settings are fields of
    `CacheConfig`; what else there is, and what is raised, is said by the two functions.
    """
    if _is_mlx(model):
        from tqai.integrations.mlx_lm import patch as patch_mlx

        return patch_mlx(model, *settings, **named_settings)
    from tqai.integrations.transformers import patch as patch_transformers

    return patch_transformers(model, *settings, **named_settings)


def unpatch(model: Any) -> None:
    """Undo `patch`. Harmless when there is nothing to undo; caches made before stay usable."""
    if _is_mlx(model):
        from tqai.integrations.mlx_lm import unpatch as unpatch_mlx

        unpatch_mlx(model)
        return
    from tqai.integrations.transformers import unpatch as unpatch_transformers

    unpatch_transformers(model)


def _is_mlx(model: Any) -> bool:
    """Whether a class of MLX is among those of the model."""
    return any(base.__module__.partition(".")[0] == "mlx" for base in type(model).__mro__)
