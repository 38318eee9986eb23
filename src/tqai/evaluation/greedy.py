"""Greedy decoding on a cache that is already filled, and where two answers part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tqai.evaluation.caches import CacheMaker, cache_maker
from tqai.evaluation.chunked import as_batch, run_tokens
from tqai.evaluation.prefill import prefill_caches

__all__ = ["first_divergence", "greedy_decode", "greedy_divergence"]


def greedy_decode(
    model: Any,
    input_ids: Tensor,
    cache: Any,
    new_tokens: int,
    finished: Callable[[list[int]], bool] | None = None,
) -> list[int]:
    """The most likely tokens after what `cache` holds and `input_ids` `[1, tokens]` adds to it.

    Args:
        model: a transformers causal language model.
        input_ids: int64 `[1, tokens]`, at least one token, not yet in the cache.
        cache: is changed: it holds the new tokens afterwards, but for the last one.
        new_tokens: how many at most, at least 1.
        finished: told the tokens so far after each of them, says whether that is enough.

    Returns:
        token ids, without `input_ids`.
    """
    step, result = input_ids.to(model.device), list[int]()
    while len(result) < new_tokens:
        best = run_tokens(model, step, cache, last_only=True)[:, -1].argmax(-1)
        result.append(int(best))
        if finished is not None and finished(result):
            break
        step = best[:, None]
    return result


def first_divergence(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Index of the first token in which two sequences differ; None if they are equal.

    Where one is the beginning of the other, they differ at the end of the shorter.
    """
    for index, (left, right) in enumerate(zip(expected, got, strict=False)):
        if left != right:
            return index
    return None if len(expected) == len(got) else min(len(expected), len(got))


def greedy_divergence(
    model: Any, prompts: Sequence[Tensor], makers: Sequence[CacheMaker], new_tokens: int
) -> dict[str, list[int | None]]:
    """Where each cache's greedy continuation of each prompt leaves the uncompressed model's.

    All tokens of a prompt but the last fill the cache, so that every decoded token reads it.

    Args:
        prompts: int64 `[tokens]` each, at least 2 tokens.
        new_tokens: length of the continuations.

    Returns:
        name -> for each prompt the `first_divergence`, None where all tokens are equal.
    """
    everyone = [cache_maker("dynamic", model, label="reference"), *makers]
    result: dict[str, list[int | None]] = {maker.name: [] for maker in makers}
    for prompt in prompts:
        batch = as_batch(prompt, model)
        caches = prefill_caches(model, batch[:, :-1], everyone)
        expected = greedy_decode(model, batch[:, -1:], caches[0], new_tokens)
        for maker, cache in zip(makers, caches[1:], strict=True):
            got = greedy_decode(model, batch[:, -1:], cache, new_tokens)
            result[maker.name].append(first_divergence(expected, got))
    return result
