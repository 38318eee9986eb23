"""`Scheduler`: who is admitted, prefilled, decoded, preempted. One step at a time, in one thread.

A step is at most `chunk_tokens` prompt tokens of waiting requests and one token of every running one, so
the gap between two tokens of a request is bounded by the two together, however long the prompts are.

A request is admitted when the pool has pages for all of it that is known. When a running one needs a page
and there is none, unused prefixes go first, then the newest request: it loses its pages, waits at the
front, and is computed again, its prompt in the same chunks and its output token by token, so that it
continues exactly as it would have.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tqai.server.engine.decode_step import DecodeRow, DecodeStep
from tqai.server.engine.prefill_step import PrefillStep
from tqai.server.engine.prefix import PrefixCache
from tqai.server.engine.request_pages import RequestPages
from tqai.server.engine.runner import ModelRunner
from tqai.server.engine.sampling import Chosen, describe
from tqai.server.engine.sequence import Sequence
from tqai.server.engine.settings import EngineSettings
from tqai.server.engine.store import TokenStore

__all__ = ["Counters", "Scheduler"]

logger = logging.getLogger("tqai.server")

INTERNAL_ERROR = "the model failed on this request"
NOT_FINITE = "the model computed no finite probabilities for this request"


@dataclass
class Counters:
    """What has happened since the start."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    replayed_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    decode_steps: int = 0
    prefill_steps: int = 0
    longest_step_seconds: float = 0.0


class Scheduler:
    """See the module's text. `running[i]` lies in slot i."""

    def __init__(
        self,
        runner: ModelRunner,
        store: TokenStore,
        settings: EngineSettings,
        on_finished: Callable[[Sequence], None] = lambda sequence: None,
    ) -> None:
        self.runner, self.store, self.settings = runner, store, settings
        self.pages = RequestPages(store, settings)
        self.waiting: deque[Sequence] = deque()
        self.prefilling: Sequence | None = None
        self.running: list[Sequence] = []
        self.counters = Counters()
        self._on_finished = on_finished

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self.waiting or self.prefilling or self.running)

    @property
    def prefixes(self) -> PrefixCache:
        """The prefix cache."""
        return self.pages.prefixes

    def add(self, sequence: Sequence) -> None:
        """Put a request at the end of the queue."""
        self.waiting.append(sequence)

    def step(self) -> None:
        """One step; see the module's text."""
        started = time.monotonic()
        self._drop_cancelled()
        self._prefill()
        self._decode()
        self.counters.longest_step_seconds = max(
            self.counters.longest_step_seconds, time.monotonic() - started
        )

    def fail_all(self, message: str, cancelled: bool = False) -> None:
        """End every request."""
        for sequence in [*self._active(), *self.waiting]:
            sequence.fail(message, cancelled)
            self._remove(sequence)

    def _active(self) -> list[Sequence]:
        return [*self.running, *([self.prefilling] if self.prefilling else [])]

    def _drop_cancelled(self) -> None:
        for sequence in [*self._active(), *self.waiting]:
            if sequence.cancelled:
                sequence.fail("cancelled", cancelled=True)
                self._remove(sequence)

    # prefill

    def _prefill(self) -> None:
        budget = self.settings.chunk_tokens
        while budget > 0 and (self.prefilling is not None or self._admit()):
            sequence = self.prefilling
            assert sequence is not None
            start, stop = self._next_chunk(sequence)
            if stop - start > budget and budget < self.settings.chunk_tokens:
                break
            budget -= stop - start
            try:
                self._prefill_chunk(sequence, start, stop)
            except Exception:
                logger.exception("prefill of request %d failed", sequence.number)
                sequence.fail(INTERNAL_ERROR)
                self._remove(sequence)

    def _admit(self) -> bool:
        """Move the first of the waiting to prefill, if there is room."""
        if not self.waiting or len(self.running) >= self.settings.max_running:
            return False
        sequence = self.waiting[0]
        shares = self.settings.prefix_caching and not sequence.params.prompt_logprobs
        # a page in hand for every running request, so that admitting one does not preempt another at once
        if not self.pages.begin(sequence, shares, in_hand=len(self.running)):
            return False
        self.prefilling = self.waiting.popleft()
        if sequence.times.admitted is None:
            sequence.times.admitted = time.monotonic()
            sequence.cached_tokens = sequence.computed
            if shares:
                self.counters.prefix_queried_tokens += sequence.prompt_tokens
                self.counters.prefix_hit_tokens += sequence.cached_tokens
        return True

    def _next_chunk(self, sequence: Sequence) -> tuple[int, int]:
        """Where the next chunk starts and stops: always at the same places, whatever was found cached."""
        if not sequence.lead_done:
            return 0, min(self.store.lead, sequence.prompt_tokens)
        return sequence.computed, min(sequence.computed + self.settings.chunk_tokens, sequence.prompt_tokens)

    def _prefill_chunk(self, sequence: Sequence, start: int, stop: int) -> None:
        wants_all = sequence.params.prompt_logprobs
        while not self.pages.take_for_chunk(sequence, stop):
            self._give_up_something()
            if self.prefilling is not sequence:
                return
        step = PrefillStep(self.store, start, stop - start, sequence.held)
        logits = self.runner.prefill(step, sequence.tokens[start:stop], wants_all)
        self.counters.prefill_steps += 1
        self.counters.prompt_tokens += stop - start
        if wants_all and len(sequence.prompt_chosen) < sequence.prompt_tokens - 1:
            following = sequence.tokens[start + 1 : min(stop + 1, sequence.prompt_tokens)]
            top = sequence.params.logprobs or 0
            sequence.prompt_chosen += [
                describe(row, token, top) for row, token in zip(logits, following, strict=False)
            ]
        sequence.lead_done = True
        sequence.computed = max(sequence.computed, stop)
        self.pages.give_back_unseen(sequence)
        self.pages.note_chunk(sequence)
        if sequence.in_prefill:
            return
        last = logits[-1:]
        if not _finite_rows(last)[0]:
            sequence.fail(NOT_FINITE)
            self._remove(sequence)
            return
        self.pages.share(sequence)
        self.prefilling = None
        self.store.move_slot(self.store.staging, len(self.running))
        self.running.append(sequence)
        if sequence.params.max_tokens == 0:
            sequence.finish("length")
            self._remove(sequence)
        elif len(sequence.tokens) == sequence.prompt_tokens:
            self._continue([sequence], last)

    # decode

    def _decode(self) -> None:
        new_pages = self._pages_for_step()
        rows = list(self.running)
        if not rows:
            return
        try:
            logits = self._decode_rows(rows, new_pages)
        except Exception:
            logger.exception("a decode step of %d requests failed; each is tried alone", len(rows))
            for sequence in rows:
                self._decode_alone(sequence, new_pages)
            return
        self._advance(rows, logits, new_pages)

    def _decode_rows(self, rows: list[Sequence], new_pages: dict[int, list[int]]) -> Tensor:
        """Logits of the next token of the first `rows` of the running requests. Can be repeated."""
        step = DecodeStep(
            self.store,
            [
                DecodeRow(sequence.computed, sequence.held, new_pages.get(sequence.number))
                for sequence in rows
            ],
        )
        tokens = [sequence.tokens[sequence.computed] for sequence in rows]
        logits = self.runner.decode(step, tokens, [sequence.computed for sequence in rows])
        self.counters.decode_steps += 1
        return logits

    def _decode_alone(self, sequence: Sequence, new_pages: dict[int, list[int]]) -> None:
        """One step of one of the running requests, which fails alone if it does."""
        slot = self.running.index(sequence)
        if slot:
            self.store.swap_slots(0, slot)
            self.running[0], self.running[slot] = sequence, self.running[0]
        try:
            logits = self._decode_rows([sequence], new_pages)
        except Exception:
            logger.exception("request %d failed", sequence.number)
            for pool, page in zip(self.store.pools, new_pages.get(sequence.number, ()), strict=False):
                pool.release([page])
            sequence.fail(INTERNAL_ERROR)
            self._remove(sequence)
            return
        self._advance([sequence], logits, new_pages)

    def _advance(self, rows: list[Sequence], logits: Tensor, new_pages: dict[int, list[int]]) -> None:
        """What a decode step of `rows` means for them."""
        sampled = []
        for index, sequence in enumerate(rows):
            if sequence.is_replaying:
                self.counters.replayed_tokens += 1
            else:
                sampled.append(index)
            sequence.computed += 1
            if sequence.number in new_pages:
                self.pages.completed(sequence, new_pages[sequence.number])
        if sampled:
            chosen_rows = logits if len(sampled) == len(rows) else logits[sampled]
            self._continue([rows[index] for index in sampled], chosen_rows)

    def _pages_for_step(self) -> dict[int, list[int]]:
        """Fresh pages, one of each kind, for each running request whose next token completes one, after
        preempting as many requests as that takes."""
        while (taken := self.pages.take_for_step(self.running)) is None:
            self._give_up_something()
        return taken

    def _give_up_something(self) -> None:
        """Have pages, where evicting was not enough: what a prefill keeps for others, else a request."""
        if self.prefilling is not None and self.pages.drop_kept(self.prefilling):
            return
        self._preempt(max(self._active(), key=lambda sequence: sequence.number))

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self.waiting.appendleft(sequence)

    def _continue(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Choose the next token of each sequence from its row of logits."""
        finite = _finite_rows(logits)
        greedy: list[int] | None = None
        if any(sequence.params.is_plain_greedy for sequence in sequences):
            greedy = logits.argmax(dim=-1).tolist()
        for index, sequence in enumerate(sequences):
            try:
                if not finite[index]:
                    sequence.fail(NOT_FINITE)
                    self._remove(sequence)
                    continue
                if greedy is not None and sequence.params.is_plain_greedy:
                    chosen = Chosen(greedy[index])
                else:
                    allowed = None
                    if sequence.constraint is not None:
                        allowed = sequence.constraint.allowed().to(logits.device)
                    chosen = sequence.sampler.choose(logits[index], allowed)
                self.counters.generated_tokens += 1
                finished = sequence.accept(chosen)
            except Exception:
                logger.exception("request %d failed", sequence.number)
                sequence.fail(INTERNAL_ERROR)
                finished = True
            if finished:
                self._remove(sequence)

    # leaving

    def _remove(self, sequence: Sequence) -> None:
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._leave(sequence)
        self._on_finished(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Give pages and slot back."""
        self.pages.leave(sequence)
        if self.prefilling is sequence:
            self.prefilling = None
        if sequence in self.running:
            slot, last = self.running.index(sequence), len(self.running) - 1
            if slot != last:
                self.store.move_slot(last, slot)
                self.running[slot] = self.running[last]
            self.running.pop()


def _finite_rows(logits: Tensor) -> list[bool]:
    """Whether each row has a finite largest value. -inf elsewhere is a model's way of forbidding tokens."""
    finite: list[bool] = torch.isfinite(logits.amax(dim=-1)).tolist()
    return finite
