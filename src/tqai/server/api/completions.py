"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tqai.server.api.context import COMPLETION_TOKENS, Context, new_id
from tqai.server.api.errors import ApiError, documented
from tqai.server.api.generation import Generation, collect, generating
from tqai.server.api.schemas import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from tqai.server.api.wire import event_stream, usage_of
from tqai.server.engine.sampling import Chosen
from tqai.server.engine.sequence import Delta, Finished, GenerationRequest

__all__ = ["router_for"]


def router_for(context: Context) -> APIRouter:
    """The route over `context`."""
    router = APIRouter()

    @router.post(
        "/v1/completions",
        responses={
            200: {"model": CompletionResponse, "content": {"text/event-stream": {}}},
            **documented(400, 401, 404, 413, 429, 500, 503),
        },
        response_class=Response,
    )
    async def completions(body: CompletionRequest, http: Request) -> Response:
        prompts, requests = await _requests(context, body)
        identity: dict[str, Any] = {
            "id": new_id("cmpl"),
            "created": int(time.time()),
            "model": context.settings.model_name,
        }
        if body.stream:
            stack = AsyncExitStack()
            generation = await stack.enter_async_context(generating(context, requests))
            chunks = _chunks(context, body, prompts, requests, generation, identity)
            return event_stream(stack, chunks)
        collected = await collect(context, requests, http)
        choices, ends = [], []
        for index, (request, found) in enumerate(zip(requests, collected, strict=True)):
            assert found.end is not None
            ends.append(found.end)
            writer = _Logprobs(context, body)
            echoed = ""
            if body.echo:
                echoed = prompts[index // (body.n or 1)]
                writer.add_prompt(request.prompt, found.end.prompt_chosen)
            writer.add(found.chosen)
            choices.append(
                CompletionChoice(
                    index=index,
                    text=echoed + found.text,
                    logprobs=writer.take(),
                    finish_reason=found.end.reason,  # type: ignore[arg-type]
                )
            )
        answer = CompletionResponse(
            **identity, choices=choices, usage=usage_of(_by_prompt(ends, body.n or 1))
        )
        return Response(answer.model_dump_json(), media_type="application/json")

    return router


async def _requests(context: Context, body: CompletionRequest) -> tuple[list[str], list[GenerationRequest]]:
    """Texts of the prompts, and n requests for each."""
    context.check_model(body.model)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only with stream=true", "stream_options")
    given = body.prompt
    if isinstance(given, str):
        prompts: list[Any] = [given]
    else:
        prompts = [given] if isinstance(given[0], int) else list(given)
    n = body.n or 1
    if n * len(prompts) > context.settings.max_choices:
        raise ApiError(
            400,
            f"{len(prompts)} prompts, n={n}: at most {context.settings.max_choices} outputs at a time",
            "n",
        )
    if body.echo and body.stream and body.logprobs is not None:
        raise ApiError(400, "echo: not together with stream and logprobs", "echo")
    grammar = await context.grammar_of(body.guided_json, body.guided_regex, "guided_json")
    max_tokens = body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens=0: only with echo=true", "max_tokens")
    texts, requests = [], []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = await context.tokens_of(prompt)
            texts.append(prompt)
        else:
            ids = prompt
            if max(ids) >= context.engine.shape.vocab_size:
                raise ApiError(400, "prompt: a token id is out of range", "prompt")
            texts.append(context.tokenizer.decode(ids) if body.echo else "")
        params = context.sampling(
            body,
            len(ids),
            max_tokens,
            COMPLETION_TOKENS,
            grammar,
            body.logprobs,
            bool(body.echo and body.logprobs is not None),
        )
        requests += [GenerationRequest(ids, params, choice) for choice in range(n)]
    return texts, requests


def _by_prompt(ends: list[Finished], n: int) -> list[list[Finished]]:
    return [ends[start : start + n] for start in range(0, len(ends), n)]


async def _chunks(
    context: Context,
    body: CompletionRequest,
    prompts: list[str],
    requests: list[GenerationRequest],
    generation: Generation,
    identity: dict[str, Any],
) -> AsyncIterator[str]:
    n = body.n or 1
    ends: list[Finished | None] = [None] * len(requests)
    writers = [_Logprobs(context, body) for _ in requests]

    def chunk(index: int, text: str, logprobs: CompletionLogprobs | None, reason: str | None) -> str:
        choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)  # type: ignore[arg-type]
        return CompletionResponse(**identity, choices=[choice]).model_dump_json()

    if body.echo:
        for index in range(len(requests)):
            yield chunk(index, prompts[index // n], None, None)
    async for index, event in generation.events():
        if isinstance(event, Delta):
            writers[index].add(event.chosen)
            yield chunk(index, event.text, writers[index].take(), None)
        else:
            ends[index] = event
            yield chunk(index, "", None, event.reason)
    if body.stream_options is not None and body.stream_options.include_usage:
        usage = usage_of(_by_prompt([end for end in ends if end is not None], n))
        yield CompletionResponse(**identity, choices=[], usage=usage).model_dump_json()


class _Logprobs:
    """Log-probabilities in the form of /v1/completions, as they come."""

    def __init__(self, context: Context, body: CompletionRequest) -> None:
        self._context, self._wanted = context, body.logprobs
        self._offset = 0
        self._start()

    def _start(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add_prompt(self, prompt: list[int], chosen: tuple[Chosen, ...]) -> None:
        if self._wanted is not None:
            self._add(prompt[0], None, None)
            self.add(chosen)

    def add(self, chosen: list[Chosen] | tuple[Chosen, ...]) -> None:
        if self._wanted is not None:
            for item in chosen:
                self._add(item.token, item.logprob, item.top)

    def _add(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...] | None) -> None:
        text = self._context.token_text(token)
        self._tokens.append(text)
        self._logprobs.append(None if logprob is None else max(logprob, -9999.0))
        pairs = None if top is None else {self._context.token_text(t): max(p, -9999.0) for t, p in top}
        self._top.append(pairs)
        self._offsets.append(self._offset)
        self._offset += len(text)

    def take(self) -> CompletionLogprobs | None:
        """What was added since the last call."""
        if self._wanted is None:
            return None
        taken = CompletionLogprobs(
            text_offset=self._offsets,
            token_logprobs=self._logprobs,
            tokens=self._tokens,
            top_logprobs=self._top if self._wanted else None,
        )
        self._start()
        return taken
