"""One model, one prompt, two caches: fill, decode greedily, count bytes and time, find the difference."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqai.config import CacheConfig

if TYPE_CHECKING:
    import torch

__all__ = [
    "CacheFigures",
    "Decoded",
    "compressed_cache",
    "decode",
    "figures_of",
    "fill",
    "speed_of",
    "stop_ids",
    "uncompressed_cache",
]


@dataclass(frozen=True)
class Decoded:
    """Greedily decoded tokens.

    Attributes:
        ids: token ids, without the prompt.
        first_token_seconds: until the first of them, the prompt's rest included.
        later_seconds: for all others together.
    """

    ids: list[int]
    first_token_seconds: float
    later_seconds: float


@dataclass(frozen=True)
class CacheFigures:
    """What a cache holds, counted, fit for a table and for JSON.

    Attributes:
        label: "uncompressed" or a short name such as "K4/V2".
        tokens: tokens held.
        held_bytes: all bytes held for keys and values.
        bits_per_value: held bits over the numbers they stand for.
        compression_factor: bytes of the same tokens in bfloat16 over `held_bytes`.
        details: the parts, of a compressed cache (`MemoryReport.to_dict()`).
    """

    label: str
    tokens: int
    held_bytes: int
    bits_per_value: float
    compression_factor: float
    details: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def uncompressed_cache(model: Any) -> Any:
    """An empty cache of transformers' own, or of mlx-lm's."""
    if hasattr(model, "mlx"):
        return model.uncompressed_cache()
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@contextmanager
def compressed_cache(model: Any, config: CacheConfig) -> Iterator[Any]:
    """An empty compressed cache; the model is patched while the context lasts."""
    import tqai

    if hasattr(model, "mlx"):
        try:
            yield model.patch(config)
        finally:
            model.unpatch()
        return
    cache = tqai.patch(model, config=config)
    try:
        yield cache
    finally:
        tqai.unpatch(model)


def fill(model: Any, input_ids: torch.Tensor, cache: Any) -> float:
    """Prefill `cache` with `[1, tokens]` ids in one pass and return the seconds taken."""
    if not input_ids.shape[1]:
        return 0.0
    if hasattr(model, "mlx"):
        start = time.perf_counter()
        model.last_logits(input_ids, cache)
        return time.perf_counter() - start
    from tqai.evaluation.chunked import run_tokens

    start = _now(model)
    run_tokens(model, input_ids, cache, last_only=True)
    return _now(model) - start


def decode(
    model: Any, input_ids: torch.Tensor, cache: Any, new_tokens: int, stop: Collection[int]
) -> Decoded:
    """Decode greedily after what `cache` holds and `input_ids` `[1, tokens]`; at least one token."""
    if hasattr(model, "mlx"):
        return Decoded(*model.decode(input_ids, cache, new_tokens, stop))
    from tqai.evaluation.chunked import run_tokens

    start = _now(model)
    best = run_tokens(model, input_ids, cache, last_only=True)[:, -1].argmax(-1)
    ids = [int(best)]
    first = _now(model)
    while len(ids) < new_tokens and ids[-1] not in stop:
        best = run_tokens(model, best[:, None], cache, last_only=True)[:, -1].argmax(-1)
        ids.append(int(best))
    return Decoded(ids, first - start, _now(model) - first)


def speed_of(answers: Collection[Decoded]) -> float | None:
    """Tokens per second over all decoded tokens but each answer's first; None if there are none."""
    later = sum(len(answer.ids) - 1 for answer in answers)
    seconds = sum(answer.later_seconds for answer in answers)
    return later / seconds if later and seconds else None


def figures_of(cache: Any, label: str) -> CacheFigures:
    """The figures of a compressed cache (from its own report), a `DynamicCache` (from its tensors) or an
    uncompressed cache of mlx-lm."""
    if hasattr(cache, "memory"):
        memory = cache.memory()
        return CacheFigures(
            label,
            memory.tokens,
            memory.total_bytes,
            memory.bits_per_value,
            memory.compression_factor,
            memory.to_dict(),
        )
    if hasattr(cache, "figures"):
        tokens, held, values = cache.figures()
        if not values:
            return CacheFigures(label, tokens, held, 0.0, 1.0)
        return CacheFigures(label, tokens, held, 8 * held / values, 2 * values / held)
    from tqai.evaluation.held import held_bytes

    values = 0
    for layer in cache.layers:
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            values += 0 if tensor is None else tensor.numel()
    held = held_bytes(cache)
    if not values or not held:
        return CacheFigures(label, cache.get_seq_length(), held, 0.0, 1.0)
    return CacheFigures(label, cache.get_seq_length(), held, 8 * held / values, 2 * values / held)


def stop_ids(loaded_model: Any, tokenizer: Any) -> set[int]:
    """Ids that end an answer."""
    found = set[int]()
    for ids in (getattr(loaded_model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        found |= set(ids) if isinstance(ids, list) else ({ids} if ids is not None else set())
    return found


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        import torch

        torch.cuda.synchronize(model.device)
    return time.perf_counter()
