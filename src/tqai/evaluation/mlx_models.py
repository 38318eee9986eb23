"""Models of mlx-lm under the measures of this package: same documents, same scores, same bits.

The measures ask a model of transformers for little: one pass of some tokens through a cache, its config,
its dtype, its device. `MlxCausalModel` answers the same of a model that mlx-lm has loaded; ids and logits are
torch tensors on the CPU, everything between them is MLX's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tqai.config import NAMED_PRESETS, PRESETS, CacheConfig
from tqai.errors import ConfigError

__all__ = ["MlxCache", "MlxCausalModel", "known_mlx_caches", "mlx_cache"]

QUANTIZED_BITS = (8, 4, 2)
GROUP = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class MlxCache:
    """What mlx-lm calls a prompt cache, one object per layer, as one. `copy.deepcopy` copies it.

    Attributes:
        layers: mlx-lm's caches, or ours.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return int(self.layers[0].offset)

    def update(self, keys: Tensor, values: Tensor, layer: int) -> None:
        """Take keys and values `[batch, kv_heads, tokens, head_dim]` into one layer, without a model."""
        import mlx.core as mx

        self.layers[layer].update_and_fetch(_to_mlx(keys), _to_mlx(values))
        mx.eval(self.layers[layer].state)


class MlxCausalModel:
    """A model of mlx-lm where the functions of `tqai.evaluation` take one of transformers.

    Attributes:
        mlx: the model that `mlx_lm.load` returned.
        config: a transformers configuration of the same model.
    """

    device = torch.device("cpu")

    def __init__(self, model: Any, config: Any) -> None:
        self.mlx = model
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of what a cache keeps exact."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        dtypes = (array.dtype for _, array in tree_flatten(self.mlx.parameters()))
        name = str(next(dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating)))
        return DTYPES[name.rpartition(".")[2]]

    def forward(
        self, input_ids: Tensor, past_key_values: MlxCache, use_cache: bool = True
    ) -> SimpleNamespace:
        """One pass of ids `[batch, tokens]` through the cache; its `logits` are float32 `[batch, tokens,
        vocabulary]`."""
        import mlx.core as mx
        import numpy as np

        logits = self.mlx(mx.array(input_ids.numpy()), cache=past_key_values.layers).astype(mx.float32)
        mx.eval(logits, [layer.state for layer in past_key_values.layers])
        return SimpleNamespace(logits=torch.from_numpy(np.array(logits)))

    __call__ = forward

    def plain_layers(self) -> list[Any]:
        """Caches of mlx-lm itself, also while the model is patched."""
        from mlx_lm.models.cache import KVCache

        make = inspect.getattr_static(type(self.mlx), "make_cache", None)
        return list(make(self.mlx)) if make is not None else [KVCache() for _ in self.mlx.layers]


def known_mlx_caches() -> tuple[str, ...]:
    """Every name that `mlx_cache` takes, but for bits that no preset has."""
    return ("dynamic", *(f"quantized-{bits}" for bits in QUANTIZED_BITS), *PRESETS, *NAMED_PRESETS)


def mlx_cache(
    name: str, model: MlxCausalModel, config: CacheConfig | None
) -> tuple[str, Callable[[], MlxCache], dict[str, Any]]:
    """Family, maker and settings of a cache: "dynamic" is mlx-lm's own `KVCache`, "quantized-4" and so on its
    `QuantizedKVCache` (groups of 64); with `config` one of tqai.

    Raises:
        ConfigError: a name that is none of these.
        UnsupportedError: a setting that is not served with mlx-lm.
    """
    if config is not None:
        from tqai.integrations.mlx_lm.settings import served

        return "tqai", _turboquant(model, served(config)), config.to_dict()
    if name == "dynamic":
        return "dynamic", lambda: MlxCache(model.plain_layers()), {}
    kind, _, bits = name.partition("-")
    if kind == "quantized" and bits.isdigit() and int(bits) in QUANTIZED_BITS:
        settings = {"bits": int(bits), "group_size": GROUP}
        return "quantized", lambda: _quantized(model, settings), settings
    raise ConfigError(f"cache={name!r}: with mlx-lm allowed are {', '.join(known_mlx_caches())}")


def _quantized(model: MlxCausalModel, settings: dict[str, int]) -> MlxCache:
    from mlx_lm.models.cache import QuantizedKVCache

    return MlxCache([QuantizedKVCache(**settings) for _ in model.plain_layers()])


def _turboquant(model: MlxCausalModel, config: CacheConfig) -> Callable[[], MlxCache]:
    import tqai

    # The model stays patched: attention on the codes of this cache, mlx-lm's own on everything else.
    return lambda: MlxCache(tqai.patch(model.mlx, config=config))


def _to_mlx(tensor: Tensor) -> Any:
    import mlx.core as mx

    if tensor.dtype == torch.bfloat16:  # unknown to numpy
        return mx.array(tensor.contiguous().view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())
