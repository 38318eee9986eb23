"""Events of the engine in asyncio: several requests as one stream, cancelled when nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.requests import Request

from tqai.errors import ConfigError, InputError
from tqai.server.api.context import Context
from tqai.server.api.errors import ApiError
from tqai.server.engine.engine import Draining, PromptTooLong, QueueFull
from tqai.server.engine.sampling import Chosen
from tqai.server.engine.sequence import Delta, Event, Finished, GenerationRequest, RequestFailed, Sequence

__all__ = ["Collected", "Generation", "collect", "generating"]


class Generation:
    """Requests in the engine, and their events in the order in which they come."""

    def __init__(self, sequences: list[Sequence], queue: asyncio.Queue[tuple[int, Event]]) -> None:
        self._sequences, self._queue = sequences, queue
        self._open = len(sequences)

    async def events(self) -> AsyncIterator[tuple[int, Delta | Finished]]:
        """Pairs of the request's index and what came.

        Raises:
            ApiError: a request failed.
        """
        while self._open:
            index, event = await self._queue.get()
            if isinstance(event, RequestFailed):
                raise ApiError(503 if event.cancelled else 500, event.message)
            self._open -= isinstance(event, Finished)
            yield index, event


@asynccontextmanager
async def generating(context: Context, requests: list[GenerationRequest]) -> AsyncIterator[Generation]:
    """Submit `requests`; whatever still runs when the block is left is cancelled.

    Raises:
        ApiError: a request is not taken: 400, 429 when the queue is full, 503 when draining.
    """
    most = context.engine.settings.max_running + context.engine.settings.max_waiting
    if len(requests) > most:
        raise ApiError(400, f"{len(requests)} outputs at a time: this server takes at most {most}", "n")
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    sequences: list[Sequence] = []
    engine, advice = context.engine, {"Retry-After": str(context.settings.retry_after_seconds)}

    def submit(index: int, request: GenerationRequest) -> Sequence:
        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is gone: nobody listens
                loop.call_soon_threadsafe(queue.put_nowait, (index, event))

        return engine.submit(request, emit)

    try:
        for index, request in enumerate(requests):
            try:
                sequences.append(submit(index, request))
            except QueueFull as error:
                raise ApiError(429, str(error), None, "queue_full", advice) from error
            except Draining as error:
                raise ApiError(503, str(error), None, "draining", advice) from error
            except PromptTooLong as error:
                raise ApiError(400, str(error), "prompt", "context_length_exceeded") from error
            except (InputError, ConfigError) as error:
                raise ApiError(400, str(error)) from error
        yield Generation(sequences, queue)
    finally:
        for sequence in sequences:
            if sequence.outcome is None:
                engine.cancel(sequence)


class Collected:
    """All that came of one request."""

    def __init__(self) -> None:
        self.text = ""
        self.chosen: list[Chosen] = []
        self.end: Finished | None = None

    def add(self, event: Delta | Finished) -> None:
        """Take an event in."""
        if isinstance(event, Delta):
            self.text += event.text
            self.chosen += event.chosen
        else:
            self.end = event


async def collect(context: Context, requests: list[GenerationRequest], http: Request) -> list[Collected]:
    """Everything that comes of `requests`; they are cancelled when the client goes away.

    Raises:
        ApiError: see `generating`, and 499 (which nobody reads) for a client that is gone.
    """
    collected = [Collected() for _ in requests]

    async def gather() -> None:
        async with generating(context, requests) as generation:
            async for index, event in generation.events():
                collected[index].add(event)

    work = asyncio.create_task(gather())
    gone = asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            return collected
        raise ApiError(499, "the client has gone")
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(http: Request) -> None:
    while True:
        message = await http.receive()
        if message["type"] == "http.disconnect":
            return
