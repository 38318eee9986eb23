"""Running a model on a cache: in chunks, beside the oracle, and through `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from oracle import OracleCache, note_pages
from tiny_models import prompt

import tqai
from tqai import CacheConfig

CHUNKS = (70, 1, 1, 63, 1, 64, 1, 5, 1)
"""207 tokens: a prompt beyond one page, single tokens, a page completed exactly, two windows of 96."""


def run(model: Any, ids: torch.Tensor, cache: Any, chunks: Sequence[int]) -> torch.Tensor:
    """Logits of `ids` fed in chunks to the cache."""
    parts = []
    for chunk in ids.split(list(chunks), dim=1):
        parts.append(model(chunk, past_key_values=cache).logits)
        note_pages(cache)
    return torch.cat(parts, 1)


def both(model: Any, ids: torch.Tensor, chunks: Sequence[int], **settings: Any) -> tuple[Any, ...]:
    """Logits with a compressed cache on codes, and with the oracle; then the two caches.

    The oracle goes first, on the model's own attention and masks, which tqai has not touched yet."""
    assert model.config._attn_implementation != "tqai"
    oracle = OracleCache(model, CacheConfig.from_dict(settings))
    expected = run(model, ids, oracle, chunks)
    cache = tqai.TurboQuantCache(model, **settings)
    return run(model, ids, cache, chunks), expected, cache, oracle


def generate(model: Any, ids: torch.Tensor | None = None, **changes: Any) -> Any:
    ids = prompt(70) if ids is None else ids
    return model.generate(
        ids, **{"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, **changes}
    )
