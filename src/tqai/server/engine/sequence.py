"""One request inside the engine: its tokens, pages and slot, and what it reports as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tqai.server.engine.grammar import Constraint
from tqai.server.engine.page_table import HeldPages
from tqai.server.engine.prefix import Chunk
from tqai.server.engine.sampling import Chosen, Sampler, SamplingParams
from tqai.server.engine.text import Detokenizer, StopStrings

__all__ = ["Delta", "Finished", "GenerationRequest", "RequestFailed", "Sequence"]


@dataclass(frozen=True)
class GenerationRequest:
    """What is asked of the engine.

    Attributes:
        prompt: token ids, at least one.
        params: how to go on.
        choice: which of several outputs of one prompt this is; tells their draws apart.
    """

    prompt: list[int]
    params: SamplingParams
    choice: int = 0


@dataclass(frozen=True)
class Delta:
    """Text that came, with the tokens it came from. Without `logprobs` asked for, `chosen` still names
    the tokens."""

    text: str
    chosen: tuple[Chosen, ...]


@dataclass(frozen=True)
class Finished:
    """The last event of a request that went well.

    Attributes:
        reason: "stop" or "length".
        prompt_tokens, output_tokens, cached_tokens: counts; cached ones came from the prefix cache.
        prompt_chosen: log-probabilities of the prompt's tokens from the second on, where asked for.
    """

    reason: str
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    prompt_chosen: tuple[Chosen, ...] = ()


@dataclass(frozen=True)
class RequestFailed:
    """The last event of a request that did not. `message` is fit for clients."""

    message: str
    cancelled: bool = False


Event = Delta | Finished | RequestFailed


@dataclass
class Times:
    """Monotonic seconds at which things happened; None while they have not."""

    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None


class Sequence:
    """See the module's text. `tokens` are prompt and output; `computed` of them are in the cache. `held` are
    its pages of each kind of layer, `chunks` what it will add to the prefix cache, which knew the first
    `known_chunks` of them when it was admitted."""

    def __init__(
        self,
        number: int,
        request: GenerationRequest,
        emit: Callable[[Event], None],
        tokenizer: Any,
        end_tokens: frozenset[int],
        fallback_seed: int,
        constraint: Constraint | None,
    ) -> None:
        params = request.params
        self.number, self.request, self.params = number, request, params
        self.tokens = list(request.prompt)
        self.prompt_tokens = len(self.tokens)
        self.held: list[HeldPages] = []
        self.chunks: list[Chunk] = []
        self.known_chunks = 0
        self.computed = 0
        self.cached_tokens = 0
        self.lead_done = False
        self.preemptions = 0
        self.cancelled = False
        self.times = Times()
        self.sampler = Sampler(params, self.tokens, fallback_seed, request.choice)
        self.constraint = constraint
        self.prompt_chosen: list[Chosen] = []
        self.outcome: Finished | RequestFailed | None = None
        self._emit = emit
        self._detokenizer = Detokenizer(tokenizer, self.tokens, params.skip_special_tokens)
        self._stop_strings = StopStrings(params.stop)
        self._stop_tokens = frozenset(params.stop_token_ids)
        self._end_tokens = frozenset() if params.ignore_eos else end_tokens
        self._pending: list[Chosen] = []

    @property
    def pages(self) -> list[int]:
        """Its pages in the layers that see farthest."""
        return self.held[0].live if self.held else []

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def in_prefill(self) -> bool:
        """Whether prompt tokens are still to be computed."""
        return self.computed < self.prompt_tokens

    @property
    def is_replaying(self) -> bool:
        """Whether the next step recomputes a token that was generated before a preemption."""
        return self.computed < len(self.tokens) - 1

    def accept(self, chosen: Chosen) -> bool:
        """Take a new token in and report it; True when the request is finished."""
        now = time.monotonic()
        if self.times.first_token is None:
            self.times.first_token = now
        self.times.last_token = now
        token = chosen.token
        self.tokens.append(token)
        ended = token in self._end_tokens or token in self._stop_tokens
        if self.constraint is not None and not ended:
            self.constraint.take(token)
        self._pending.append(chosen)
        text = "" if ended else self._detokenizer.add(token)
        shown, stopped = self._stop_strings.add(text)
        if self.constraint is not None and not ended and self.constraint.is_finished:
            ended = True
        if ended or stopped or self.output_tokens >= self.params.max_tokens:
            if not stopped:
                rest, stopped = self._end_of_text()
                shown += rest
            self._report(shown)
            self.finish("stop" if ended or stopped else "length")
            return True
        if shown:
            self._report(shown)
        return False

    def finish(self, reason: str) -> None:
        """Report the end."""
        self._close(
            Finished(
                reason,
                self.prompt_tokens,
                self.output_tokens,
                self.cached_tokens,
                tuple(self.prompt_chosen),
            )
        )

    def fail(self, message: str, cancelled: bool = False) -> None:
        """Report that nothing more comes, and why."""
        self._close(RequestFailed(message, cancelled))

    def _end_of_text(self) -> tuple[str, bool]:
        shown, stopped = self._stop_strings.add(self._detokenizer.rest())
        return (shown, True) if stopped else (shown + self._stop_strings.rest(), False)

    def _report(self, text: str) -> None:
        self._emit(Delta(text, tuple(self._pending)))
        self._pending.clear()

    def _close(self, event: Finished | RequestFailed) -> None:
        if self.outcome is None:
            self.outcome = event
            self._emit(event)
