"""`Engine`: the thread that steps the scheduler, the bounded queue in front of it, and its figures."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tqai.core.page import PAGE_TOKENS
from tqai.errors import InputError, TqaiError
from tqai.server.engine.grammar import Grammars
from tqai.server.engine.kinds import pool_sizes
from tqai.server.engine.model import inspect_model
from tqai.server.engine.runner import ModelRunner
from tqai.server.engine.scheduler import Scheduler
from tqai.server.engine.sequence import Event, GenerationRequest, Sequence
from tqai.server.engine.settings import EngineSettings
from tqai.server.engine.store import TokenStore, page_kinds

__all__ = ["Draining", "Engine", "EngineFigures", "PromptTooLong", "QueueFull"]

logger = logging.getLogger("tqai.server")

SHARE_OF_FREE_MEMORY = {"cuda": 0.85, "cpu": 0.4}
LONGEST_WITHOUT_A_LIMIT = 32768
FAILED = "the server failed on this request"


class QueueFull(TqaiError):
    """As many requests as may wait are waiting."""


class Draining(TqaiError):
    """The engine takes no more requests."""


class PromptTooLong(InputError):
    """Prompt and output together do not fit the model or the pool."""


@dataclass(frozen=True)
class EngineFigures:
    """A snapshot. Pages count 64 tokens in all layers; `cached_pages` are those of the prefix cache."""

    running: int
    waiting: int
    pages: int
    used_pages: int
    request_pages: int
    cached_pages: int
    page_bytes: int
    exact_bytes: int
    held_bytes: int
    bf16_bytes: int
    tokens: int
    counters: dict[str, float]


class Engine:
    """Generates for many requests at a time.

    Attributes:
        max_model_len: most tokens of prompt and output together.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: EngineSettings | None = None) -> None:
        """
        Args:
            model: a transformers causal language model on its device. Its attention becomes tqai's.
            tokenizer: its tokenizer.

        Raises:
            UnsupportedError: a model that continuous batching cannot serve.
            ConfigError: the pool cannot hold one page.
        """
        self.model, self.tokenizer = model, tokenizer
        self.shape = inspect_model(model)
        self.settings = settings = (settings or EngineSettings()).for_layers(len(self.shape.layers))
        self.max_model_len = settings.max_model_len or self.shape.context_tokens or LONGEST_WITHOUT_A_LIMIT
        pages = _pool_pages(settings, self.shape, self.max_model_len)
        self.store = TokenStore(settings, self.shape, pages)
        runner = ModelRunner(model, self.shape, settings.max_running)
        runner.capture(self.store, -(-self.max_model_len // PAGE_TOKENS))
        self.scheduler = Scheduler(runner, self.store, settings, self._finished)
        self.grammars = Grammars(tokenizer, self.shape.vocab_size)
        self.end_tokens = _end_tokens(model, tokenizer)
        self.on_finished: Callable[[Sequence], None] = lambda sequence: None
        self.bf16_bytes_per_token = sum(
            2 * layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in self.shape.layers
        )
        self._incoming: deque[Sequence] = deque()
        self._changed = threading.Condition()
        self._numbers = 0
        self._draining = self._stopping = False
        self._open: dict[int, Sequence] = {}
        self._thread: threading.Thread | None = None
        self._torch_threads = torch.get_num_threads()

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="tqai-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, emit: Callable[[Event], None]) -> Sequence:
        """Queue a request; `emit` is called from the engine's thread with what comes of it, the last time
        with a `Finished` or `RequestFailed`.

        Raises:
            QueueFull, Draining: no request is taken now.
            PromptTooLong, InputError: this one never can be.
            ConfigError: its output constraint cannot be used.
        """
        self.check(request)
        constraint = None
        if request.params.grammar is not None:
            constraint = self.grammars.constraint(request.params.grammar)
        with self._changed:
            if self._draining or self._stopping:
                raise Draining("the server is shutting down")
            if len(self._open) >= self.settings.max_running + self.settings.max_waiting:
                raise QueueFull(f"{len(self._open)} requests are in work or waiting")
            self._numbers += 1
            # without a seed every request draws differently, yet reproducibly from the engine's seed
            fallback = self.settings.seed * 1_000_003 + self._numbers
            sequence = Sequence(
                self._numbers, request, emit, self.tokenizer, self.end_tokens, fallback, constraint
            )
            self._open[sequence.number] = sequence
            self._incoming.append(sequence)
            self._changed.notify_all()
        return sequence

    def check(self, request: GenerationRequest) -> None:
        """Raises what `submit` would raise about the request itself."""
        prompt, params = request.prompt, request.params
        if not prompt:
            raise InputError("the prompt has no tokens; at least 1 is needed")
        vocabulary = self.shape.vocab_size
        for name, tokens in (
            ("prompt", prompt),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if tokens and not (min(tokens) >= 0 and max(tokens) < vocabulary):
                raise InputError(f"{name}: a token id is out of range, allowed are 0 to {vocabulary - 1}")
        total = len(prompt) + params.max_tokens
        if total > self.max_model_len:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens and {params.max_tokens} are to be generated, "
                f"together {total}; at most {self.max_model_len} are possible"
            )
        for kind, pool in zip(self.store.kinds, self.store.pools, strict=True):
            needed = kind.most_pages(total, self.settings.chunk_tokens)
            if needed > pool.pages:
                raise PromptTooLong(
                    f"{total} tokens need {needed} pages of the cache, which has {pool.pages}"
                )

    def cancel(self, sequence: Sequence) -> None:
        """Stop a request; its pages are free after the step that is being computed."""
        with self._changed:
            sequence.cancelled = True
            self._changed.notify_all()

    def drain(self) -> None:
        """Take no more requests; those in flight go on."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Wait until nothing is in flight; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def stop(self) -> None:
        """End the thread; requests in flight fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    @property
    def is_draining(self) -> bool:
        """Whether requests are refused because the engine shuts down."""
        return self._draining or self._stopping

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def figures(self) -> EngineFigures:
        """A snapshot, true to within one step."""
        scheduler, store = self.scheduler, self.store
        running = list(scheduler.running)
        prefilling = scheduler.prefilling
        active = [*running, prefilling] if prefilling else running
        held_of = [list(sequence.held) for sequence in active]
        held_pages = [
            len({page for held in held_of if held for page in held[number].live})
            for number in range(len(store.pools))
        ]
        request_pages = held_pages[0]
        tokens = sum(sequence.computed for sequence in active)
        cached = scheduler.prefixes.pages
        held = sum(count * pool.page_bytes for count, pool in zip(held_pages, store.pools, strict=True))
        held += len(active) * store.exact_bytes // (self.settings.max_running + 1)
        return EngineFigures(
            running=len(active),
            waiting=max(len(self._open) - len(active), 0),
            pages=store.pool.pages,
            used_pages=store.pool.used,
            request_pages=request_pages,
            cached_pages=cached,
            page_bytes=sum(kind.page_bytes for kind in store.kinds),
            exact_bytes=store.exact_bytes,
            held_bytes=held,
            bf16_bytes=tokens * self.bf16_bytes_per_token,
            tokens=tokens,
            counters=asdict(scheduler.counters),
        )

    def _finished(self, sequence: Sequence) -> None:
        with self._changed:
            self._open.pop(sequence.number, None)
            self._changed.notify_all()
        try:
            self.on_finished(sequence)
        except Exception:
            logger.exception("the end of request %d could not be noted", sequence.number)

    def _run(self) -> None:
        try:
            self._step_until_stopped()
        except Exception:
            logger.critical("the engine has ended: not even giving requests up works", exc_info=True)
            with self._changed:
                self._stopping = True
                left, self._open = list(self._open.values()), {}
                self._changed.notify_all()
            for sequence in left:
                sequence.fail(FAILED)

    def _step_until_stopped(self) -> None:
        torch.set_num_threads(self._torch_threads)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._incoming or self.scheduler.has_work)
                if self._stopping:
                    break
                while self._incoming:
                    self.scheduler.add(self._incoming.popleft())
            try:
                self.scheduler.step()
            except Exception:
                logger.exception("a step of the engine failed; every request in it is given up")
                self.scheduler.fail_all(FAILED)
        while self._incoming:
            self.scheduler.add(self._incoming.popleft())
        self.scheduler.fail_all("the server was stopped", cancelled=True)


def _pool_pages(settings: EngineSettings, shape: Any, max_model_len: int) -> list[int]:
    """Pages of each kind of layer."""
    kinds = page_kinds(settings, shape)
    sizes = settings.max_running, settings.chunk_tokens
    if settings.max_kv_bytes is not None:
        return pool_sizes(kinds, settings.max_kv_bytes, None, *sizes)
    kind = shape.device.type
    if kind == "cuda":
        free = torch.cuda.mem_get_info(shape.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # every slot at its longest: more can never be in use
    most = settings.max_running * -(-max_model_len // PAGE_TOKENS)
    held_bytes = int(free * SHARE_OF_FREE_MEMORY.get(kind, 0.4))
    return pool_sizes(kinds, max(held_bytes, sum(one.page_bytes for one in kinds)), most, *sizes)


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """End-of-sequence ids of the generation config and the tokenizer."""
    found: set[int] = set()
    for value in (
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(item) for item in value)
    return frozenset(found)
