"""From logits to a token: penalties, bias, constraint, temperature, truncation, one seeded draw.

Every request draws from a generator of its own, one number per token, and every operation works on its
row alone: the same seed gives the same tokens whatever else is in the batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tqai.errors import ConfigError

__all__ = ["Chosen", "Sampler", "SamplingParams"]

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: smallest set of tokens whose probabilities reach this, 0 < p <= 1.
        top_k: only the k most likely tokens; 0 means all.
        min_p: only tokens at least this share as likely as the most likely one.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output.
        presence_penalty, frequency_penalty: subtracted once, and per occurrence, for output tokens.
        logit_bias: token id -> what is added to its logit.
        seed: of the draws; None: the engine's.
        max_tokens: tokens of output at most.
        stop: strings that end the output and do not appear in it.
        stop_token_ids: tokens that end it, besides the end of sequence.
        ignore_eos: go on after the end of sequence.
        logprobs: how many alternatives to report per token; None: no log-probabilities.
        prompt_logprobs: report those of the prompt too.
        grammar: an llguidance grammar that the output must follow.
        skip_special_tokens: special tokens are no part of the text.

    Raises:
        ConfigError: a field is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    grammar: str | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "temperature": (0.0, 100.0),
            "top_p": (0.0, 1.0),
            "top_k": (0, 1 << 31),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (0.01, 100.0),
            "presence_penalty": (-2.0, 2.0),
            "frequency_penalty": (-2.0, 2.0),
            "max_tokens": (0, 1 << 31),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name}={value!r}: allowed are {low} to {high}")
        if self.top_p == 0.0:
            raise ConfigError("top_p=0.0: allowed is more than 0 and at most 1")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ConfigError(f"logprobs={self.logprobs}: allowed are 0 to {MAX_LOGPROBS}")
        if any(not text for text in self.stop):
            raise ConfigError("stop='': a stop string has at least one character")

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is simply the most likely one and nothing else is asked for."""
        return (
            self.temperature == 0.0
            and self.repetition_penalty == 1.0
            and self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
            and not self.logit_bias
            and self.logprobs is None
            and self.grammar is None
        )


@dataclass(frozen=True)
class Chosen:
    """A token with its log-probability and the most likely alternatives (id, log-probability)."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The sampling state of one request: its generator and the tokens that penalties count."""

    def __init__(
        self, params: SamplingParams, prompt: list[int], fallback_seed: int, choice: int = 0
    ) -> None:
        """`choice` tells the n outputs of one request apart."""
        self.params = params
        seed = fallback_seed if params.seed is None else params.seed
        digest = hashlib.sha256(f"{seed} {choice}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        self._seen = set(prompt) if params.repetition_penalty != 1.0 else set()
        self._counts: dict[int, int] = {}

    def choose(self, logits: Tensor, allowed: Tensor | None = None) -> Chosen:
        """The next token for `logits` `[vocab]`; `allowed` bool `[vocab]` is a constraint."""
        params = self.params
        logits = logits.float()
        raw = logits
        logits = self._penalized(logits)
        if allowed is not None:
            logits = torch.where(allowed, logits, -torch.inf)
        if params.temperature == 0.0:
            token = int(logits.argmax())
        else:
            token = self._draw(logits)
        if params.repetition_penalty != 1.0:
            self._seen.add(token)
        if params.presence_penalty or params.frequency_penalty:
            self._counts[token] = self._counts.get(token, 0) + 1
        if params.logprobs is None:
            return Chosen(token)
        return describe(raw, token, params.logprobs)

    def _penalized(self, logits: Tensor) -> Tensor:
        params = self.params
        if self._seen:
            index = torch.tensor(sorted(self._seen), device=logits.device)
            logits = logits.clone()
            held = logits[index]
            penalty = params.repetition_penalty
            logits[index] = torch.where(held > 0, held / penalty, held * penalty)
        if self._counts:
            index = torch.tensor(list(self._counts), device=logits.device)
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype, device=logits.device)
            logits = logits.clone()
            logits[index] -= params.presence_penalty + params.frequency_penalty * counts
        if params.logit_bias:
            index = torch.tensor(list(params.logit_bias), device=logits.device)
            bias = torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
            logits = logits.index_add(0, index, bias)
        return logits

    def _draw(self, logits: Tensor) -> int:
        """Inverse of the cumulative distribution at one uniform number."""
        params = self.params
        uniform = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        # the largest becomes 0 first: divided by a tiny temperature it would overflow
        logits = logits.double()
        probs = torch.softmax((logits - logits.amax()) / params.temperature, dim=-1)
        probs, order = probs.sort(descending=True, stable=True)
        if 0 < params.top_k < probs.numel():
            probs[params.top_k :] = 0.0
        if params.min_p:
            probs = torch.where(probs >= params.min_p * probs[0], probs, 0.0)
        if params.top_p < 1.0:
            before = probs.cumsum(0) - probs
            probs = torch.where(before < params.top_p * probs.sum(), probs, 0.0)
        reached = probs.cumsum(0)
        index = int(torch.searchsorted(reached, uniform * reached[-1], right=True))
        return int(order[min(index, int((probs > 0).sum()) - 1)])


def describe(logits: Tensor, token: int, top: int) -> Chosen:
    """`token` with its log-probability among raw `logits` `[vocab]`, and the `top` most likely ones."""
    logprobs: Any = torch.log_softmax(logits.float(), dim=-1)
    best = logprobs.topk(top) if top else None
    pairs = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Chosen(token, float(logprobs[token]), pairs)
