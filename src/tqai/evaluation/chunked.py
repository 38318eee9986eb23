"""Running a model over a text so that the cache is read: prefill once, then small chunks.

A model evaluated in one forward pass attends to the keys and values it has just computed and never to
what a cache gives back, so a compressed cache looks perfect whatever it holds. Here the first
`prefill_tokens` fill the cache and are not scored; the rest goes through the same cache in chunks, so
that each scored token sees the history as the cache returns it, but for the tokens of its own chunk.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tqai.errors import InputError

__all__ = [
    "CHUNK_TOKENS",
    "CacheNeverReadWarning",
    "as_batch",
    "check_lengths",
    "chunk_bounds",
    "chunked_logits",
    "history_read_back",
    "run_tokens",
    "warn_if_never_read",
]

CHUNK_TOKENS = 32
LEAST_HISTORY_READ_BACK = 0.5

MakeCache = Callable[[], Any]


class CacheNeverReadWarning(UserWarning):
    """An evaluation was asked for in which the scored tokens hardly read the cache, or not at all."""


def chunked_logits(
    model: Any,
    input_ids: Tensor,
    make_cache: MakeCache,
    prefill_tokens: int,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Logits of every token after the prefill, each computed with the history read from the cache.

    Args:
        model: a transformers causal language model.
        input_ids: int64 `[tokens]` or `[batch, tokens]`, without padding.
        make_cache: returns a new, empty cache.
        prefill_tokens: tokens that fill the cache in one pass and are not scored, 0 to tokens - 1.
            With 0 the first chunk finds an empty cache.
        chunk_tokens: tokens per forward pass after it, at least 1.

    Returns:
        `[tokens - prefill_tokens, vocabulary]` (with a batch axis in front if `input_ids` has one), in
        the model's dtype; row i is the distribution of what follows token `prefill_tokens + i`.

    Raises:
        InputError: lengths that do not fit.

    Warns:
        CacheNeverReadWarning: less than half of the history of the scored tokens is read from the cache.
    """
    batch = as_batch(input_ids, model)
    tokens = batch.shape[1]
    warn_if_never_read(tokens, prefill_tokens, chunk_tokens)
    cache = make_cache()
    if prefill_tokens:
        run_tokens(model, batch[:, :prefill_tokens], cache, last_only=True)
    parts = [
        run_tokens(model, batch[:, start:stop], cache)
        for start, stop in chunk_bounds(tokens, prefill_tokens, chunk_tokens)
    ]
    logits = torch.cat(parts, dim=1)
    return logits[0] if input_ids.dim() == 1 else logits


def run_tokens(model: Any, input_ids: Tensor, cache: Any, last_only: bool = False) -> Tensor:
    """One forward pass of `[batch, tokens]` ids through `cache`, which grows by them.

    Returns logits `[batch, tokens, vocabulary]`, or `[batch, 1, vocabulary]` with `last_only`.
    """
    options: dict[str, Any] = {}
    if last_only and "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    with torch.inference_mode():
        output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, **options)
    logits: Tensor = output.logits
    return logits[:, -1:] if last_only else logits


def as_batch(input_ids: Tensor, model: Any) -> Tensor:
    """`input_ids` as `[batch, tokens]` on the model's device.

    Raises:
        InputError: not one or two axes, or no tokens.
    """
    if input_ids.dim() not in (1, 2) or input_ids.numel() == 0:
        raise InputError(
            f"input_ids of shape {list(input_ids.shape)}: wanted [tokens] or [batch, tokens], not empty"
        )
    batch = input_ids if input_ids.dim() == 2 else input_ids[None]
    return batch.to(model.device)


def chunk_bounds(tokens: int, prefill_tokens: int, chunk_tokens: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the chunks after the prefill; the last one may be shorter."""
    for start in range(prefill_tokens, tokens, chunk_tokens):
        yield start, min(start + chunk_tokens, tokens)


def history_read_back(tokens: int, prefill_tokens: int, chunk_tokens: int) -> float:
    """Of the tokens that a scored token attends to, the fraction that comes from the cache (mean, 0 to 1).

    0 for one forward pass; 0.98 for 2048 tokens with a prefill of 512 and chunks of 32.
    """
    total = 0.0
    for start, stop in chunk_bounds(tokens, prefill_tokens, chunk_tokens):
        total += sum(start / (position + 1) for position in range(start, stop))
    return total / (tokens - prefill_tokens)


def check_lengths(tokens: int, prefill_tokens: int, chunk_tokens: int) -> None:
    """Refuse lengths that leave nothing to score.

    Raises:
        InputError: `prefill_tokens` is not within 0 to tokens - 1, or `chunk_tokens` is below 1.
    """
    if not 0 <= prefill_tokens < tokens:
        raise InputError(
            f"prefill_tokens={prefill_tokens} for {tokens} tokens: allowed are 0 to {tokens - 1}, "
            "so that something is left to score"
        )
    if chunk_tokens < 1:
        raise InputError(f"chunk_tokens={chunk_tokens}: allowed are whole numbers from 1")


def warn_if_never_read(tokens: int, prefill_tokens: int, chunk_tokens: int) -> float:
    """Check lengths and return `history_read_back`, warning when it is below one half.

    Raises:
        InputError: see `check_lengths`.
    """
    check_lengths(tokens, prefill_tokens, chunk_tokens)
    fraction = history_read_back(tokens, prefill_tokens, chunk_tokens)
    if fraction < LEAST_HISTORY_READ_BACK:
        warnings.warn(
            f"{tokens} tokens with prefill_tokens={prefill_tokens} and chunk_tokens={chunk_tokens}: the "
            f"scored tokens read {fraction:.0%} of their history from the cache, so this says little "
            "about the cache; use a longer prefill and chunks of about 32 tokens",
            CacheNeverReadWarning,
            stacklevel=3,
        )
    return fraction
