"""Small pieces of answers that several routes send: usage, log-probabilities, events of a stream."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from tqai.server.api.context import Context
from tqai.server.api.errors import ApiError, error_body
from tqai.server.api.schemas import CachedTokens, TokenLogprob, TopLogprob, Usage
from tqai.server.engine.sampling import Chosen
from tqai.server.engine.sequence import Finished

__all__ = ["chat_logprobs", "event_stream", "usage_of"]

logger = logging.getLogger("tqai.server")
PING_SECONDS = 15


def usage_of(ends: list[list[Finished]]) -> Usage:
    """Usage of a request: per prompt, the ends of its choices."""
    prompt = sum(choices[0].prompt_tokens for choices in ends if choices)
    cached = sum(choices[0].cached_tokens for choices in ends if choices)
    output = sum(end.output_tokens for choices in ends for end in choices)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=output,
        total_tokens=prompt + output,
        prompt_tokens_details=CachedTokens(cached_tokens=cached),
    )


def chat_logprobs(context: Context, chosen: list[Chosen] | tuple[Chosen, ...]) -> list[TokenLogprob]:
    """Log-probabilities in the form of /v1/chat/completions."""
    return [
        TokenLogprob(
            **_one(context, item.token, item.logprob or 0.0).model_dump(),
            top_logprobs=[_one(context, token, logprob) for token, logprob in item.top],
        )
        for item in chosen
    ]


def _one(context: Context, token: int, logprob: float) -> TopLogprob:
    text = context.token_text(token)
    return TopLogprob(token=text, logprob=max(logprob, -9999.0), bytes=list(text.encode("utf-8", "replace")))


class _Stream(EventSourceResponse):
    """Leaves `stack` at the end, also where the client has gone before the first event was asked for."""

    def __init__(self, stack: AsyncExitStack, content: AsyncIterator[ServerSentEvent]) -> None:
        super().__init__(content, ping=PING_SECONDS, sep="\n")
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


def event_stream(
    stack: AsyncExitStack,
    body: AsyncIterator[str | tuple[str, str]],
    done: str | None = "[DONE]",
) -> EventSourceResponse:
    """A response of server-sent events with the texts of `body` (or pairs of event name and text).

    `stack` holds what must be closed at the end, however that comes: leaving it cancels the requests.
    """

    async def events() -> AsyncIterator[ServerSentEvent]:
        async with aclosing(body) as texts:  # type: ignore[type-var]
            try:
                async for item in texts:
                    name, text = item if isinstance(item, tuple) else (None, item)
                    yield ServerSentEvent(data=text, event=name)
            except ApiError as error:
                yield ServerSentEvent(
                    data=_text(error_body(error.status, error.message, error.param, error.code))
                )
            except Exception:
                logger.exception("a stream failed")
                yield ServerSentEvent(data=_text(error_body(500, "the server failed on this request")))
            if done is not None:
                yield ServerSentEvent(data=done)

    return _Stream(stack, events())


def _text(body: dict[str, Any]) -> str:
    import json

    return json.dumps(body)
