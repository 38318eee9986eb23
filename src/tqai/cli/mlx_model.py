"""A model of mlx-lm for the commands: `--backend mlx`.

Commands ask a model of transformers for a few things (its config, its dtype, one pass over some tokens);
`MlxModel` answers the same questions. Ids are numpy `[1, tokens]` here.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from tqai.cli.report import CommandError
from tqai.config import CacheConfig

__all__ = ["NEEDS_MLX", "MlxModel", "PlainCache", "load_mlx"]

NEEDS_MLX = "--backend mlx needs mlx and mlx-lm: pip install 'tqai[mlx]'"
PREFILL_CHUNK_TOKENS = 2048
WRONG_USAGE = 2


def load_mlx(path: str, device: str | None, dtype: str | None) -> tuple[MlxModel, Any]:
    """Model and tokenizer of a local folder that mlx-lm loads.

    Raises:
        CommandError: mlx-lm is not installed, a device was named, or the folder holds no such model.
    """
    if find_spec("mlx") is None or find_spec("mlx_lm") is None:
        raise CommandError(NEEDS_MLX)
    if device is not None:
        raise CommandError(
            f"--device {device}: MLX computes on its default device, leave it out", WRONG_USAGE
        )
    import mlx.core as mx
    import mlx_lm

    try:
        loaded: Any = mlx_lm.load(path, return_config=True)
    except Exception as error:  # a damaged or foreign folder fails in any of a dozen ways
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CommandError(f"model {path}: mlx-lm does not load it: {reason}") from error
    model, tokenizer, config = loaded
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))
    return MlxModel(model, config), tokenizer


class PlainCache(list[Any]):
    """An uncompressed cache of mlx-lm, one per layer, that counts its bytes."""

    def figures(self) -> tuple[int, int, int]:
        """Tokens, bytes held, and numbers (of keys and values) that they stand for."""
        tokens = held = values = 0
        for cache in self:
            held += cache.nbytes
            if getattr(cache, "keys", None) is not None:
                tokens = max(tokens, cache.size())
                batch, heads, _, dim = cache.keys.shape
                values += batch * heads * cache.size() * (dim + cache.values.shape[3])
        return tokens, held, values


class MlxModel:
    """See the module's text.

    Attributes:
        mlx: the model of mlx-lm itself.
    """

    def __init__(self, model: Any, config: dict[str, Any]) -> None:
        self.mlx = model
        self.device = SimpleNamespace(type="mlx")
        self.generation_config = SimpleNamespace(eos_token_id=config.get("eos_token_id"))
        text = SimpleNamespace(max_position_embeddings=config.get("max_position_embeddings"))
        self.config = SimpleNamespace(get_text_config=lambda decoder: text)

    @property
    def dtype(self) -> str:
        """Name of the floating dtype of the weights."""
        import mlx.core as mx
        from mlx.utils import tree_flatten

        dtypes = (array.dtype for _, array in tree_flatten(self.mlx.parameters()))
        return str(next(dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating))).rpartition(".")[2]

    def uncompressed_cache(self) -> PlainCache:
        """An empty cache of mlx-lm's own."""
        from mlx_lm.models.cache import make_prompt_cache

        return PlainCache(make_prompt_cache(self.mlx))

    def patch(self, config: CacheConfig) -> Any:
        """`tqai.patch` of the model."""
        import tqai

        return tqai.patch(self.mlx, config=config)

    def unpatch(self) -> None:
        """`tqai.unpatch` of the model."""
        import tqai

        tqai.unpatch(self.mlx)

    def last_logits(self, ids: Any, cache: Any) -> Any:
        """Logits after ids `[1, tokens]`, `[vocabulary]`; `cache` takes the ids in, chunk by chunk."""
        import mlx.core as mx

        for start in range(0, ids.shape[1], PREFILL_CHUNK_TOKENS):
            logits = self.mlx(mx.array(ids[:, start : start + PREFILL_CHUNK_TOKENS]), cache=cache)[0, -1]
            mx.eval(logits, [layer.state for layer in cache])
        return logits

    def decode(
        self, ids: Any, cache: Any, new_tokens: int, stop: Collection[int]
    ) -> tuple[list[int], float, float]:
        """Most likely tokens after ids, seconds to the first of them and for all others."""
        import numpy as np

        start = time.perf_counter()
        found = [int(self.last_logits(ids, cache).argmax())]
        first = time.perf_counter()
        while len(found) < new_tokens and found[-1] not in stop:
            found.append(int(self.last_logits(np.array([found[-1:]]), cache).argmax()))
        return found, first - start, time.perf_counter() - first

    def generate(
        self,
        ids: Any,
        cache: Any,
        streamer: Any,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        stop: Collection[int],
    ) -> list[int]:
        """Tokens after ids as `mlx_lm` generates them, handed to `streamer` as transformers would."""
        import mlx.core as mx
        import numpy as np
        from mlx_lm.generate import generate_step
        from mlx_lm.sample_utils import make_sampler

        if seed is not None:
            mx.random.seed(seed)
        found: list[int] = []
        streamer.put(ids)
        steps = generate_step(
            mx.array(ids[0]),
            self.mlx,
            max_tokens=max_tokens,
            sampler=make_sampler(temp=temperature),
            prompt_cache=cache,
        )
        for token, _ in steps:
            found.append(int(token))
            streamer.put(np.array(found[-1:]))
            if found[-1] in stop:
                break
        streamer.end()
        return found
