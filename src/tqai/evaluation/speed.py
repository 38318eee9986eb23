"""Seconds of prefill and tokens per second of decoding, at given context lengths.

All caches decode the same given tokens, so that their outputs can be compared with the uncompressed
model's before any speed is reported, and take turns in short bursts, so that whatever else the machine
does falls on all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tqai.errors import InputError
from tqai.evaluation.caches import CacheMaker, cache_maker
from tqai.evaluation.chunked import as_batch, run_tokens
from tqai.evaluation.held import bits_per_value, held_bytes
from tqai.evaluation.scores import score_logits

__all__ = ["SpeedReport", "measure_speed"]

BURSTS = 4
BURST_TOKENS = 8


@dataclass(frozen=True)
class SpeedReport:
    """Speed of one cache at one context length, batch 1.

    Attributes:
        name: the cache.
        context_tokens: tokens in the cache when decoding begins.
        prefill_seconds: one forward pass over them with an empty cache.
        tokens_per_second: 1 / median time of a decoded token.
        token_ms: median, lower and upper quartile of the time of a decoded token, in milliseconds.
        timed_tokens: tokens that the median is of (the first of each burst is warm-up and not among
            them).
        held_bytes, bits_per_value: of the cache after the prefill.
        kl_mean: of the decoded tokens against the uncompressed model, nats per token.
    """

    name: str
    context_tokens: int
    prefill_seconds: float
    tokens_per_second: float
    token_ms: tuple[float, float, float]
    timed_tokens: int
    held_bytes: int
    bits_per_value: float
    kl_mean: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON."""
        return asdict(self)


def measure_speed(
    model: Any,
    input_ids: Tensor,
    makers: Sequence[CacheMaker],
    context_tokens: int,
    bursts: int = BURSTS,
    burst_tokens: int = BURST_TOKENS,
) -> dict[str, SpeedReport]:
    """Prefill each cache with the first `context_tokens` of a text and decode the tokens that follow.

    Args:
        model: a transformers causal language model.
        input_ids: int64 `[tokens]`, at least `context_tokens + bursts * burst_tokens`.
        makers: the caches, with different names.
        context_tokens: at least 1.
        bursts: how often each cache has its turn, at least 1.
        burst_tokens: tokens decoded in a turn, at least 2; the first is not timed.

    Returns:
        name -> report, in the order of `makers`.

    Raises:
        InputError: lengths that do not fit.
    """
    decoded = bursts * burst_tokens
    batch = as_batch(input_ids, model)
    if bursts < 1 or burst_tokens < 2 or context_tokens < 1 or batch.shape[1] < context_tokens + decoded:
        raise InputError(
            f"context_tokens={context_tokens}, bursts={bursts}, burst_tokens={burst_tokens} with a text of "
            f"{batch.shape[1]} tokens: wanted context_tokens + bursts * burst_tokens at most, each from 1 "
            "(burst_tokens from 2)"
        )
    prompt, forced = batch[:, :context_tokens], batch[:, context_tokens : context_tokens + decoded]
    everyone = [cache_maker("dynamic", model, label="reference"), *makers]
    caches, prefill_seconds, sizes = [], [], []
    for maker in everyone:
        cache = maker()
        prefill_seconds.append(_seconds(model, prompt, cache)[0])
        caches.append(cache)
        sizes.append((held_bytes(cache), bits_per_value(cache, model.config, context_tokens)))
    times: list[list[float]] = [[] for _ in everyone]
    kl: list[list[float]] = [[] for _ in everyone]
    for first in range(0, decoded, burst_tokens):
        expected: list[Tensor] = []
        for index, cache in enumerate(caches):
            for step in range(burst_tokens):
                token = forced[:, first + step : first + step + 1]
                seconds, logits = _seconds(model, token, cache)
                if step:
                    times[index].append(seconds)
                if not index:
                    expected.append(logits)
                nothing = token[0, :0]
                kl[index].append(float(score_logits(expected[step], logits, nothing).kl[0]))
    reports = {}
    for index, maker in enumerate(everyone[1:], start=1):
        low, middle, high = (float(q) for q in np.quantile(times[index], (0.25, 0.5, 0.75)))
        reports[maker.name] = SpeedReport(
            name=maker.name,
            context_tokens=context_tokens,
            prefill_seconds=prefill_seconds[index],
            tokens_per_second=1 / middle,
            token_ms=(1e3 * middle, 1e3 * low, 1e3 * high),
            timed_tokens=len(times[index]),
            held_bytes=sizes[index][0],
            bits_per_value=sizes[index][1],
            kl_mean=statistics.fmean(kl[index]),
        )
    return reports


def _seconds(model: Any, input_ids: Tensor, cache: Any) -> tuple[float, Tensor]:
    """Time of one forward pass, to the end of its work on the device, and the last token's logits."""
    on_cuda = model.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(model.device)
    start = time.perf_counter()
    logits = run_tokens(model, input_ids, cache, last_only=True)[:, -1]
    if on_cuda:
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start, logits
