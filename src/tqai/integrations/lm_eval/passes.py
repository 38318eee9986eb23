"""Scores and continuations of tokens that read their history from a cache.

A context fills the cache in one pass, all but its last token; what follows goes through the same cache in
chunks. So every scored token sees the context as the cache gives it back, and only the tokens of its own
chunk as they were computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tqai.errors import InputError

__all__ = ["Filled", "fill", "greedy", "scores"]


class Filled:
    """A cache that holds all tokens of a context but the last, and can be used again and again.

    Attributes:
        cache: never changed; `fork` gives a copy.
        last: the last token of the context.
    """

    def __init__(self, cache: Any, last: int) -> None:
        self.cache = cache
        self.last = last

    def fork(self) -> Any:
        """A copy of the cache that can be written to."""
        with torch.inference_mode():
            return copy.deepcopy(self.cache)


def fill(model: Any, context: Sequence[int], make_cache: Callable[[], Any]) -> Filled:
    """The cache after `context`, at least one token.

    Raises:
        InputError: no tokens.
    """
    if not context:
        raise InputError("a context of no tokens: wanted at least one, such as the token of the beginning")
    cache = make_cache()
    if len(context) > 1:
        _run(model, torch.tensor([list(context[:-1])]), cache, last_only=True)
    return Filled(cache, int(context[-1]))


def scores(model: Any, filled: Filled, following: Sequence[int], chunk_tokens: int) -> tuple[float, bool]:
    """Log-likelihood in nats of the tokens `following` the context, and whether each is the likeliest."""
    cache, total, all_greedy = filled.fork(), 0.0, True
    inputs = [filled.last, *following[:-1]]
    for start in range(0, len(inputs), chunk_tokens):
        stop = min(start + chunk_tokens, len(inputs))
        logits = _run(model, torch.tensor([inputs[start:stop]]), cache)[0].float()
        targets = torch.tensor(following[start:stop], device=logits.device)
        logs = torch.log_softmax(logits, dim=-1)
        total += float(logs.gather(1, targets[:, None]).double().sum())
        all_greedy = all_greedy and bool((logits.argmax(-1) == targets).all())
    return total, all_greedy


def greedy(model: Any, filled: Filled, new_tokens: int, finished: Callable[[list[int]], bool]) -> list[int]:
    """The likeliest tokens after the context, at most `new_tokens`, until `finished` says so."""
    cache, found, step = filled.fork(), list[int](), filled.last
    while len(found) < new_tokens:
        logits = _run(model, torch.tensor([[step]]), cache, last_only=True)
        step = int(logits[0, -1].argmax())
        found.append(step)
        if finished(found):
            break
    return found


def _run(model: Any, input_ids: Tensor, cache: Any, last_only: bool = False) -> Tensor:
    with torch.inference_mode():
        output = model(input_ids=input_ids.to(model.device), past_key_values=cache, use_cache=True)
    logits: Tensor = output.logits
    return logits[:, -1:] if last_only else logits
