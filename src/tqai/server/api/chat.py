"""/v1/chat/completions."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from tqai.server.api.context import Context, new_id
from tqai.server.api.errors import ApiError, documented
from tqai.server.api.generation import Generation, collect, generating
from tqai.server.api.schemas import (
    AnsweredToolCall,
    CalledFunction,
    ChatChoice,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    Tool,
    ToolChoice,
)
from tqai.server.api.tools import ToolFormat, ToolReader
from tqai.server.api.wire import chat_logprobs, event_stream, usage_of
from tqai.server.engine.sequence import Delta, Finished, GenerationRequest

__all__ = ["CALLS_EXCLUDE", "ToolUse", "check_tools", "router_for", "tool_calls"]

ANY_OBJECT: dict[str, Any] = {"type": "object"}
CALLS_EXCLUDE = "tool_choice: calls that are forced, or strict, exclude"


@dataclass(frozen=True)
class ToolUse:
    """Which tools a request may call.

    Attributes:
        tools: those that the prompt shows.
        reads: the format in which calls are read; None: no calls.
        grammar: forces a call, or keeps those that are made to strict schemas; or None.
    """

    tools: list[Tool] | None
    reads: ToolFormat | None
    grammar: str | None


def router_for(context: Context) -> APIRouter:
    """The route over `context`."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        responses={
            200: {"model": ChatResponse, "content": {"text/event-stream": {}}},
            **documented(400, 401, 404, 413, 429, 500, 503),
        },
        response_class=Response,
    )
    async def chat(body: ChatRequest, http: Request) -> Response:
        requests, use = await _requests(context, body)
        identity: dict[str, Any] = {
            "id": new_id("chatcmpl"),
            "created": int(time.time()),
            "model": context.settings.model_name,
        }
        if body.stream:
            stack = AsyncExitStack()
            generation = await stack.enter_async_context(generating(context, requests))
            return event_stream(stack, _chunks(context, body, use, generation, identity))
        collected = await collect(context, requests, http)
        choices, ends = [], []
        for index, found in enumerate(collected):
            assert found.end is not None
            ends.append(found.end)
            content, reason, calls = found.text, found.end.reason, None
            read = use.reads.read(content) if use.reads is not None else None
            if read is not None:
                content, reason, calls = read[0], "tool_calls", tool_calls(read[1])
            choices.append(
                ChatChoice(
                    index=index,
                    message=ChatMessage(content=None if calls and not content else content, tool_calls=calls),
                    logprobs=_logprobs(context, body, found.chosen),
                    finish_reason=reason,  # type: ignore[arg-type]
                )
            )
        answer = ChatResponse(**identity, choices=choices, usage=usage_of([ends]))
        return Response(answer.model_dump_json(), media_type="application/json")

    return router


async def _requests(context: Context, body: ChatRequest) -> tuple[list[GenerationRequest], ToolUse]:
    context.check_model(body.model)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only with stream=true", "stream_options")
    n = body.n or 1
    if n > context.settings.max_choices:
        raise ApiError(400, f"n={n}: at most {context.settings.max_choices} outputs at a time", "n")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs=true", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens: not together with max_completion_tokens", "max_tokens")
    if body.max_tokens == 0:
        raise ApiError(400, "max_tokens=0: at least 1 is generated", "max_tokens")
    schema = body.guided_json
    if body.response_format is not None and body.response_format.type != "text":
        if schema is not None or body.guided_regex is not None:
            raise ApiError(
                400, "response_format: not together with guided_json or guided_regex", "response_format"
            )
        wanted = body.response_format.json_schema
        schema = ANY_OBJECT if wanted is None else wanted.schema_
    param = "response_format" if body.response_format is not None else "guided_json"
    grammar = await context.grammar_of(schema, body.guided_regex, param)
    use = await check_tools(context, body.tools, body.tool_choice)
    if use.grammar is not None and grammar is not None:
        raise ApiError(400, f"{CALLS_EXCLUDE} a response format", "tool_choice")
    ids = await context.tokens_of_chat(body.messages, use.tools)
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = context.sampling(
        body,
        len(ids),
        max_tokens,
        None,
        grammar or use.grammar,
        logprobs,
        reads_calls=use.reads is not None,
    )
    return [GenerationRequest(ids, params, choice) for choice in range(n)], use


async def check_tools(context: Context, tools: list[Tool] | None, choice: str | ToolChoice | None) -> ToolUse:
    """What `tools` and `tool_choice` mean for the model served.

    Raises:
        ApiError: 400, the model's template takes no tools in a known format, or the choice names none.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice: there are no tools", "tool_choice")
        return ToolUse(None, None, None)
    known = context.tool_format
    if known is None:
        raise ApiError(
            400,
            "tools: the chat template of this model takes no tools in a known format",
            "tools",
            "unsupported_parameter",
        )
    if choice == "none":
        return ToolUse(tools, None, None)
    if choice in (None, "auto") and not any(tool.function.strict for tool in tools):
        return ToolUse(tools, known, None)
    wanted = tools
    if isinstance(choice, ToolChoice):
        wanted = [tool for tool in tools if tool.function.name == choice.function.name]
        if not wanted:
            raise ApiError(400, f"tool_choice: no tool is named {choice.function.name!r}", "tool_choice")
    if choice in (None, "auto"):
        functions = [(t.function.name, _parameters(t) if t.function.strict else ANY_OBJECT) for t in tools]
        grammar = known.optional_grammar(functions, context.tool_token)
    else:
        grammar = known.grammar([(t.function.name, _parameters(t)) for t in wanted], context.tool_token)
    try:
        await run_in_threadpool(context.engine.grammars.check, grammar)
    except (ValueError, NotImplementedError) as error:
        raise ApiError(400, f"tools: {error}", "tools") from error
    return ToolUse(tools, known, grammar)


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or ANY_OBJECT


def tool_calls(calls: list[tuple[str, str]]) -> list[AnsweredToolCall]:
    """Calls with fresh ids."""
    return [
        AnsweredToolCall(id=new_id("call"), function=CalledFunction(name=name, arguments=arguments))
        for name, arguments in calls
    ]


def _logprobs(context: Context, body: ChatRequest, chosen: Any) -> ChatLogprobs | None:
    return ChatLogprobs(content=chat_logprobs(context, chosen)) if body.logprobs else None


async def _chunks(
    context: Context, body: ChatRequest, use: ToolUse, generation: Generation, identity: dict[str, Any]
) -> AsyncIterator[str]:
    n = body.n or 1
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    ends: list[Finished] = []
    readers = [ToolReader(use.reads) if use.reads is not None else None for _ in range(n)]

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": reason}
        choice["logprobs"] = None if logprobs is None else logprobs.model_dump()
        return whole([choice])

    def whole(choices: list[dict[str, Any]], usage: Any = None) -> str:
        body_text = {**identity, "object": "chat.completion.chunk", "choices": choices}
        if wants_usage:
            body_text["usage"] = None if usage is None else usage.model_dump()
        return json.dumps(body_text)

    for index in range(n):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, event in generation.events():
        reader = readers[index]
        if isinstance(event, Delta):
            text = event.text if reader is None else reader.add(event.text)
            logprobs = _logprobs(context, body, event.chosen)
            if text or logprobs is not None:
                yield chunk(index, {"content": text}, None, logprobs)
            continue
        ends.append(event)
        reason = event.reason
        if reader is not None:
            text, calls = reader.rest()
            if text:
                yield chunk(index, {"content": text})
            for number, call in enumerate(tool_calls(calls)):
                yield chunk(index, {"tool_calls": [{"index": number, **call.model_dump()}]})
            reason = "tool_calls" if calls else reason
        yield chunk(index, {}, reason)
    if wants_usage:
        yield whole([], usage_of([ends]))
