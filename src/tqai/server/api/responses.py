"""/v1/responses: the same generation as chat, in the items and events of the Responses interface.

Nothing is stored: every request brings its whole conversation.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tqai.server.api.chat import ANY_OBJECT, CALLS_EXCLUDE, ToolUse, check_tools
from tqai.server.api.context import Context, new_id
from tqai.server.api.errors import ApiError, documented, error_body
from tqai.server.api.generation import Generation, collect, generating
from tqai.server.api.responses_schemas import (
    ChosenTool,
    FunctionCallItem,
    FunctionOutputItem,
    ResponseBody,
    ResponsesRequest,
)
from tqai.server.api.schemas import (
    Function,
    FunctionCall,
    Message,
    NamedFunction,
    SamplingFields,
    Tool,
    ToolCall,
    ToolChoice,
)
from tqai.server.api.tools import ToolReader
from tqai.server.api.wire import chat_logprobs, event_stream
from tqai.server.engine.sequence import Delta, Finished, GenerationRequest

__all__ = ["router_for"]


def router_for(context: Context) -> APIRouter:
    """The route over `context`."""
    router = APIRouter()

    @router.post(
        "/v1/responses",
        responses={
            200: {"model": ResponseBody, "content": {"text/event-stream": {}}},
            **documented(400, 401, 404, 413, 429, 500, 503),
        },
        response_class=Response,
    )
    async def respond(body: ResponsesRequest, http: Request) -> Response:
        request, use = await _request(context, body)
        answer = _Answer(context, body)
        if body.stream:
            stack = AsyncExitStack()
            generation = await stack.enter_async_context(generating(context, [request]))
            return event_stream(stack, _events(context, body, answer, use, generation), done=None)
        (found,) = await collect(context, [request], http)
        assert found.end is not None
        text, calls = found.text, list[tuple[str, str]]()
        read = use.reads.read(text) if use.reads is not None else None
        if read is not None:
            text, calls = read
        logprobs = _logprobs(context, body, found.chosen)
        output = [_message(new_id("msg"), text, logprobs)] if text or not calls else []
        output += [_call(new_id("fc"), name, arguments) for name, arguments in calls]
        return Response(json.dumps(answer.whole(output, found.end)), media_type="application/json")

    return router


async def _request(context: Context, body: ResponsesRequest) -> tuple[GenerationRequest, ToolUse]:
    context.check_model(body.model)
    messages = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        messages.append(Message(role="user", content=body.input))
    else:
        messages += [_as_message(item) for item in body.input]
    schema = None
    wanted = body.text.format if body.text is not None else None
    if wanted is not None and wanted.type != "text":
        schema = ANY_OBJECT if wanted.schema_ is None else wanted.schema_
    grammar = await context.grammar_of(schema, None, "text")
    tools = None
    if body.tools:
        tools = [
            Tool(
                type="function",
                function=Function(
                    name=tool.name,
                    description=tool.description,
                    parameters=tool.parameters,
                    strict=tool.strict,
                ),
            )
            for tool in body.tools
        ]
    choice: Any = body.tool_choice
    if isinstance(choice, ChosenTool):
        choice = ToolChoice(type="function", function=NamedFunction(name=choice.name))
    use = await check_tools(context, tools, choice)
    if use.grammar is not None and grammar is not None:
        raise ApiError(400, f"{CALLS_EXCLUDE} a text format", "tool_choice")
    ids = await context.tokens_of_chat(messages, use.tools)
    fields = SamplingFields.model_validate(
        {"model": body.model, "temperature": body.temperature, "top_p": body.top_p}
    )
    if body.top_logprobs is not None and not body.include:
        raise ApiError(
            400, "top_logprobs: only with include=['message.output_text.logprobs']", "top_logprobs"
        )
    params = context.sampling(
        fields,
        len(ids),
        body.max_output_tokens,
        None,
        grammar or use.grammar,
        (body.top_logprobs or 0) if body.include else None,
        reads_calls=use.reads is not None,
    )
    return GenerationRequest(ids, params), use


def _as_message(item: Any) -> Message:
    if isinstance(item, FunctionCallItem):
        call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
        return Message(role="assistant", tool_calls=[call])
    if isinstance(item, FunctionOutputItem):
        return Message(role="tool", tool_call_id=item.call_id, content=item.output)
    content = item.content
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content)
    return Message(role=item.role, content=content)


class _Answer:
    """The response object as it grows."""

    def __init__(self, context: Context, body: ResponsesRequest) -> None:
        self.id = new_id("resp")
        wanted = body.text.format if body.text is not None else None
        shown = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)
        self._fixed: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": context.settings.model_name,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_logprobs": body.top_logprobs,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "text": {"format": shown},
            "tool_choice": "auto" if body.tool_choice is None else _dumped(body.tool_choice),
            "tools": [{"strict": None, **_dumped(tool)} for tool in body.tools or []],
            "truncation": "disabled",
        }

    def whole(
        self, output: list[dict[str, Any]], end: Finished | None = None, error: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The response object with these items; without `end` it is in progress."""
        status = "in_progress" if end is None else "completed" if end.reason == "stop" else "incomplete"
        usage = None
        if end is not None:
            usage = {
                "input_tokens": end.prompt_tokens,
                "input_tokens_details": {"cached_tokens": end.cached_tokens},
                "output_tokens": end.output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": end.prompt_tokens + end.output_tokens,
            }
        return {
            **self._fixed,
            "status": "failed" if error is not None else status,
            "output": output,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": usage,
        }


async def _events(
    context: Context, body: ResponsesRequest, answer: _Answer, use: ToolUse, generation: Generation
) -> AsyncIterator[tuple[str, str]]:
    numbers = iter(range(1 << 62))

    def event(kind: str, **fields: Any) -> tuple[str, str]:
        return kind, json.dumps({"type": kind, "sequence_number": next(numbers), **fields})

    yield event("response.created", response=answer.whole([]))
    yield event("response.in_progress", response=answer.whole([]))
    item, text, opened = new_id("msg"), "", False
    place = {"item_id": item, "output_index": 0, "content_index": 0}
    reader = ToolReader(use.reads) if use.reads is not None else None
    output: list[dict[str, Any]] = []
    end: Finished | None = None
    calls: list[tuple[str, str]] = []
    logprobs: list[dict[str, Any]] = []

    def opening() -> list[tuple[str, str]]:
        return [
            event(
                "response.output_item.added",
                output_index=0,
                item={**_message(item, ""), "status": "in_progress", "content": []},
            ),
            event("response.content_part.added", **place, part=_part("")),
        ]

    try:
        async for _, found in generation.events():
            new: list[dict[str, Any]] = []
            if isinstance(found, Delta):
                shown = found.text if reader is None else reader.add(found.text)
                new = _logprobs(context, body, found.chosen)
                logprobs += new
            else:
                end, shown = found, ""
                if reader is not None:
                    shown, calls = reader.rest()
            if (shown or (end is not None and not calls)) and not opened:
                opened = True
                for added in opening():
                    yield added
            if shown:
                text += shown
                yield event("response.output_text.delta", **place, delta=shown, logprobs=new)
    except ApiError as error:
        reason = error_body(error.status, error.message)["error"]
        failure = {"code": "server_error", "message": reason["message"]}
        yield event("response.failed", response=answer.whole(output, None, failure))
        return
    if opened:
        whole_item = _message(item, text, logprobs)
        yield event("response.output_text.done", **place, text=text, logprobs=logprobs)
        yield event("response.content_part.done", **place, part=whole_item["content"][0])
        yield event("response.output_item.done", output_index=0, item=whole_item)
        output.append(whole_item)
    for name, arguments in calls:
        index, call = len(output), _call(new_id("fc"), name, arguments)
        started = {**call, "status": "in_progress", "arguments": ""}
        yield event("response.output_item.added", output_index=index, item=started)
        yield event(
            "response.function_call_arguments.done",
            item_id=call["id"],
            output_index=index,
            name=name,
            arguments=arguments,
        )
        yield event("response.output_item.done", output_index=index, item=call)
        output.append(call)
    whole = answer.whole(output, end)
    yield event(f"response.{whole['status']}", response=whole)


def _logprobs(context: Context, body: ResponsesRequest, chosen: Any) -> list[dict[str, Any]]:
    return [item.model_dump() for item in chat_logprobs(context, chosen)] if body.include else []


def _message(item: str, text: str, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "type": "message",
        "id": item,
        "role": "assistant",
        "status": "completed",
        "content": [_part(text, logprobs)],
    }


def _part(text: str, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def _call(item: str, name: str, arguments: str) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": item,
        "call_id": new_id("call"),
        "name": name,
        "arguments": arguments,
        "status": "completed",
    }


def _dumped(value: Any) -> Any:
    return value if isinstance(value, str) else value.model_dump(exclude_none=True)
