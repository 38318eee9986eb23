"""All-in bits of a cache at any length, without a model pass: the cache is filled with random vectors.

The bytes of the caches here depend on how many tokens they hold, never on which, with one exception that
the random vectors respect: offsets are only held where there is something to take off, so the vectors have
a common mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tqai.errors import InputError
from tqai.evaluation.held import held_bytes, values_per_token

__all__ = ["PERIOD_TOKENS", "CacheSize", "size_at"]

PERIOD_TOKENS = 128
MEAN = 2.0


@dataclass(frozen=True)
class CacheSize:
    """Bits per value held, everything counted, while the last 128 tokens up to a length come in.

    Exact windows fill and empty again as tokens arrive, so one length alone would flatter a cache or wrong
    it.

    Attributes:
        tokens: the length.
        mean, most: over the lengths `tokens - 127` to `tokens`, reached token by token.
    """

    tokens: int
    mean: float
    most: float


def size_at(
    make: Callable[[], Any],
    config: Any,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    layers: int | None = None,
) -> CacheSize:
    """Bits per value of a cache of `make` that holds `tokens` tokens of one sequence.

    Args:
        make: returns a new, empty cache.
        config: configuration of the model (full attention only).
        tokens: at least 256.
        dtype: of the keys and values that come in, and so of what the cache keeps exact.
        layers: how many layers to fill, None for all; one is enough where all are alike.

    Raises:
        InputError: fewer tokens.
        UnsupportedError: see `values_per_token`.
    """
    if tokens < 2 * PERIOD_TOKENS:
        raise InputError(f"tokens={tokens}: allowed are whole numbers from {2 * PERIOD_TOKENS}")
    text = config.get_text_config(decoder=True)
    of_all = text.num_hidden_layers
    filled = of_all if layers is None else min(layers, of_all)
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    values = values_per_token(config) * filled // of_all
    head_dim = values // (2 * filled * kv_heads)
    generator = torch.Generator(device).manual_seed(0)
    cache, bits, held_tokens = make(), [], 0
    while held_tokens < tokens:
        step = 1 if held_tokens else tokens - PERIOD_TOKENS
        step = min(step, tokens - held_tokens)
        shape = (1, kv_heads, step, head_dim)
        with torch.inference_mode():
            for layer in range(filled):
                keys, new = (
                    (torch.randn(shape, generator=generator, device=device) + MEAN).to(dtype)
                    for _ in range(2)
                )
                cache.update(keys, new, layer)
        held_tokens += step
        bits.append(8 * held_bytes(cache) / (values * held_tokens))
    period = bits[1:]
    return CacheSize(tokens, sum(period) / len(period), max(period))
