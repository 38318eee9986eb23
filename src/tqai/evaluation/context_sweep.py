"""Caches at growing context lengths: peak memory, bytes held, speed, quality. One branch at a time.

A branch is one cache at one length. Fair by construction:

* every branch does the same: a warm-up on a cache of its own kind that is thrown away, one prefill of the
  whole context, then the same given tokens one by one, timed;
* nothing of a branch is alive when the next one begins: its cache is checked to be gone, and the logits
  that later branches are compared with lie in a file, which is read when a branch's figures are taken.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqai.errors import InputError
from tqai.evaluation.caches import cache_maker
from tqai.evaluation.chunked import as_batch, run_tokens
from tqai.evaluation.held import bits_per_value, held_bytes
from tqai.evaluation.peak_memory import PeakMemory, give_back
from tqai.evaluation.scores import score_logits

__all__ = ["BranchReport", "sweep_contexts"]

WARM_UP_TOKENS, WARM_UP_STEPS = 160, 3
REFERENCE = "dynamic"


@dataclass(frozen=True)
class BranchReport:
    """Figures of one cache at one context length, batch 1.

    Attributes:
        cache: its name; "dynamic" is the uncompressed one.
        context_tokens: tokens of the one prefill.
        decoded_tokens: tokens decoded after it, each given, so that all caches decode the same.
        peak_bytes: most memory above what the model held, over prefill and decoding; None if unknown.
        held_bytes: bytes that the cache holds at the end.
        bits_per_value: the same over the numbers they stand for.
        prefill_seconds: time of the prefill.
        tokens_per_second: 1 / median time of a decoded token.
        kl_mean: KL against the uncompressed cache's predictions, nats per decoded token.
        top1_agreement: share of decoded tokens whose likeliest successor is the uncompressed cache's.
        nll_mean: negative log-likelihood of the tokens that really follow, nats.
    """

    cache: str
    context_tokens: int
    decoded_tokens: int
    peak_bytes: int | None
    held_bytes: int
    bits_per_value: float
    prefill_seconds: float
    tokens_per_second: float
    kl_mean: float
    top1_agreement: float
    nll_mean: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON."""
        return asdict(self)


def sweep_contexts(
    model: Any,
    input_ids: Tensor,
    contexts: Sequence[int],
    caches: Sequence[str],
    new_tokens: int,
    begin: Callable[[str], None] | None = None,
) -> list[BranchReport]:
    """The uncompressed cache and each of `caches` at each context length, in that order.

    Args:
        model: a transformers causal language model.
        input_ids: int64 `[tokens]`, at least the longest context plus `new_tokens` + 1.
        contexts: lengths, each at least 1.
        caches: names as `cache_maker` takes them, "dynamic" left out.
        new_tokens: tokens decoded after each prefill, at least 2.
        begin: called with a few words before each branch.

    Raises:
        InputError: lengths that do not fit.
        ConfigError: an unknown cache.
    """
    batch = as_batch(input_ids, model)
    if not contexts or min(contexts) < 1 or new_tokens < 2 or max(contexts) + new_tokens >= batch.shape[1]:
        raise InputError(
            f"contexts={list(contexts)} and new_tokens={new_tokens} with a text of {batch.shape[1]} tokens: "
            "wanted contexts from 1, new_tokens from 2, and together less than the text"
        )
    makers = {name: cache_maker(name, model) for name in [REFERENCE, *caches]}
    reports = []
    with tempfile.TemporaryDirectory(prefix="tqai-sweep-") as folder:
        for context in contexts:
            expected = Path(folder) / f"{context}.npy"
            for name, maker in makers.items():
                if begin is not None:
                    begin(f"{context} tokens, {name}")
                figures, logits = _branch(model, batch, maker, context, new_tokens)
                if name == REFERENCE:
                    np.save(expected, logits)
                reports.append(_scored(name, context, figures, logits, np.load(expected), batch))
                del logits
    return reports


def _branch(
    model: Any, batch: Tensor, maker: Callable[[], Any], context: int, new_tokens: int
) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Figures and logits `[new_tokens, vocabulary]`, the latter on the host; the cache is gone after it, and
    the model's attention is its own again, which a `TurboQuantCache` replaces."""
    from tqai import unpatch

    try:
        return _measured(model, batch, maker, context, new_tokens)
    finally:
        unpatch(model)


def _measured(
    model: Any, batch: Tensor, maker: Callable[[], Any], context: int, new_tokens: int
) -> tuple[dict[str, Any], NDArray[np.float32]]:
    _warm_up(model, batch, maker)
    logits = np.empty((new_tokens, _vocabulary(model)), dtype=np.float32)
    times = []
    with PeakMemory(model.device) as memory:
        cache = maker()
        prefill_seconds, _ = _timed(model, batch[:, :context], cache)
        for step in range(new_tokens):
            token = batch[:, context + step : context + step + 1]
            seconds, out = _timed(model, token, cache)
            times.append(seconds)
            logits[step] = out[0].float().cpu().numpy()
        del out
    held = held_bytes(cache)
    figures = {
        "decoded_tokens": new_tokens,
        "peak_bytes": memory.peak_bytes,
        "held_bytes": held,
        "bits_per_value": bits_per_value(cache, model.config, context + new_tokens),
        "prefill_seconds": prefill_seconds,
        "tokens_per_second": 1 / statistics.median(times[1:]),
    }
    trace = weakref.ref(cache)
    del cache
    give_back(model.device)
    assert trace() is None, "something keeps a measured cache alive"
    return figures, logits


def _warm_up(model: Any, batch: Tensor, maker: Callable[[], Any]) -> None:
    cache = maker()
    tokens = min(WARM_UP_TOKENS, batch.shape[1] - WARM_UP_STEPS)
    run_tokens(model, batch[:, :tokens], cache, last_only=True)
    for step in range(WARM_UP_STEPS):
        run_tokens(model, batch[:, tokens + step : tokens + step + 1], cache, last_only=True)


def _scored(
    name: str,
    context: int,
    figures: dict[str, Any],
    logits: NDArray[np.float32],
    expected: NDArray[np.float32],
    batch: Tensor,
) -> BranchReport:
    follows = batch[0, context + 1 : context + 1 + len(logits)].cpu()
    scores = score_logits(torch.from_numpy(expected), torch.from_numpy(logits), follows)
    return BranchReport(
        cache=name,
        context_tokens=context,
        kl_mean=float(scores.kl.mean()),
        top1_agreement=float(scores.agrees.mean()),
        nll_mean=float(scores.nll.mean()),
        **figures,
    )


def _vocabulary(model: Any) -> int:
    head = model.get_output_embeddings()
    return int(head.weight.shape[0])


def _timed(model: Any, input_ids: Tensor, cache: Any) -> tuple[float, Tensor]:
    """Seconds of a forward pass, to the end of its work on the device, and the last token's logits."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    start = time.perf_counter()
    logits = run_tokens(model, input_ids, cache, last_only=True)[:, -1]
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start, logits
