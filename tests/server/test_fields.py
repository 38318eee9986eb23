"""Every field of every request body changes the answer, or has one value, or is documented to change nothing.

The engine's answer is a digest here of what it is asked for; what it makes of that, the other tests show.
"""

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from pydantic import BaseModel
from serving import MODEL, serving

from tqai.server.api.responses_schemas import ResponsesRequest
from tqai.server.api.schemas import ChatRequest, CompletionRequest, TokenizeRequest
from tqai.server.engine.sampling import Chosen
from tqai.server.engine.sequence import Delta, Finished

BODIES = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
}
EVERYTHING_SHOWN = "{{ messages | tojson }} {{ tools | tojson if tools }}{# <tool_call> #}"
"""A template with all that it is given."""


def fields_of(model, before=""):
    """Dotted names of all fields of a body and of the bodies in it, lists left out."""
    found = set()
    for name, field in model.model_fields.items():
        path = before + (field.alias or name)
        found.add(path)
        for inner in models_in(field.annotation):
            found |= fields_of(inner, path + ".")
    return found


def models_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def sampling(base):
    """Field, body without it, body with it."""
    return [
        ("model", base, {**base, "model": "other"}),
        ("temperature", base, {**base, "temperature": 2}),
        ("top_p", base, {**base, "top_p": 0.5}),
        ("top_k", base, {**base, "top_k": 1}),
        ("min_p", base, {**base, "min_p": 1}),
        ("repetition_penalty", base, {**base, "repetition_penalty": 100}),
        ("presence_penalty", base, {**base, "presence_penalty": 2}),
        ("frequency_penalty", base, {**base, "frequency_penalty": 2}),
        ("logit_bias", base, {**base, "logit_bias": {"100": 100}}),
        ("seed", base, {**base, "seed": 2}),
        ("stop", base, {**base, "stop": ["ab", "c"]}),
        ("stop_token_ids", base, {**base, "stop_token_ids": [100]}),
        ("ignore_eos", base, {**base, "ignore_eos": True}),
        ("n", base, {**base, "n": 2}),
        ("stream", base, {**base, "stream": True}),
        ("stream_options", base, {**base, "stream_options": {}}),
        (
            "stream_options.include_usage",
            *with_and_without({**base, "stream": True}, stream_options={"include_usage": True}),
        ),
        ("max_tokens", base, {**base, "max_tokens": 2}),
        ("guided_json", base, {**base, "guided_json": {"type": "boolean"}}),
        ("guided_regex", base, {**base, "guided_regex": "[0-9]{3}"}),
    ]


def with_and_without(base, **fields):
    return base, {**base, **fields}


PROMPT = {"prompt": "The import statement", "max_tokens": 6, "temperature": 0}
SAYS = {"role": "user", "content": "The import statement"}
CHAT = {"messages": [SAYS], "max_tokens": 6, "temperature": 0}
CALL = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
CALLED = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "x", "tool_call_id": "1"}
FUNCTION = {"name": "f"}
OTHER = {"name": "g"}


def of_messages(base):
    """The fields of conversations."""

    def said(*messages):
        return {**base, "messages": list(messages)}

    def parts(text):
        return [{"type": "text", "text": text}]

    def called(**other):
        return said({**CALLED, "tool_calls": [{**CALL, "function": {**CALL["function"], **other}}]})

    return [
        ("messages", said(SAYS), said(SAYS, SAYS)),
        ("messages.role", said(SAYS), said({**SAYS, "role": "system"})),
        ("messages.content", said(SAYS), said({**SAYS, "content": "y"})),
        (
            "messages.content.text",
            said({**SAYS, "content": parts("x")}),
            said({**SAYS, "content": parts("y")}),
        ),
        ("messages.name", said(SAYS), said({**SAYS, "name": "Ada"})),
        ("messages.tool_call_id", said(RESULT), said({**RESULT, "tool_call_id": "2"})),
        ("messages.tool_calls", said({**SAYS, "role": "assistant"}), said({**SAYS, **CALLED})),
        ("messages.tool_calls.id", said(CALLED), said({**CALLED, "tool_calls": [{**CALL, "id": "2"}]})),
        ("messages.tool_calls.function", called(), called(name="g")),
        ("messages.tool_calls.function.name", called(), called(name="g")),
        ("messages.tool_calls.function.arguments", called(), called(arguments='{"x": 1}')),
    ]


def of_tools(base, wrap, chosen):
    """The fields of tools, as `wrap` puts a function into a tool and `chosen` a name into a choice."""
    prefix = "tools." if wrap(FUNCTION) == {"type": "function", **FUNCTION} else "tools.function."

    def with_tools(*functions, **more):
        return {**base, "tools": [wrap(function) for function in functions], **more}

    changed = {
        "name": OTHER,
        "description": {**FUNCTION, "description": "what it does"},
        "parameters": {**FUNCTION, "parameters": {"type": "object", "properties": {}}},
        "strict": {**FUNCTION, "strict": True},
    }
    either = {"tool_choice": chosen("f")}, {"tool_choice": chosen("g")}
    name = "tool_choice.name" if prefix == "tools." else "tool_choice.function"
    found = [(prefix + field, with_tools(FUNCTION), with_tools(new)) for field, new in changed.items()]
    found += [
        ("tools", base, with_tools(FUNCTION)),
        ("tool_choice", with_tools(FUNCTION), with_tools(FUNCTION, tool_choice="required")),
        (name, *(with_tools(FUNCTION, OTHER, **choice) for choice in either)),
    ]
    if prefix == "tools.function.":
        found += [
            ("tools.function", with_tools(FUNCTION), with_tools(OTHER)),
            (name + ".name", *(with_tools(FUNCTION, OTHER, **choice) for choice in either)),
        ]
    return found


def json_schema(**fields):
    wanted = {"name": "n", "schema": {"type": "boolean"}, **fields}
    return {"response_format": {"type": "json_schema", "json_schema": wanted}}


def text_format(**fields):
    return {"text": {"format": {"type": "json_schema", "schema": {"type": "boolean"}, "name": "n", **fields}}}


def chat_tool(function):
    return {"type": "function", "function": function}


def chat_choice(name):
    return {"type": "function", "function": {"name": name}}


def responses_tool(function):
    return {"type": "function", **function}


def responses_choice(name):
    return {"type": "function", "name": name}


INPUT = {"input": "The import statement", "max_output_tokens": 6, "temperature": 0}
LOGPROBS = {"include": ["message.output_text.logprobs"]}


def items(*given):
    return {**INPUT, "input": list(given)}


def input_part(**fields):
    return items({"role": "user", "content": [{"type": "input_text", "text": "x", **fields}]})


def called(**fields):
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    return items({**call, **fields})


def returned(**fields):
    return items({"type": "function_call_output", "call_id": "1", "output": "x", **fields})


BOOLEAN = {"type": "boolean"}
USED = {
    "/v1/completions": [
        *sampling(PROMPT),
        ("prompt", PROMPT, {**PROMPT, "prompt": "y"}),
        ("echo", PROMPT, {**PROMPT, "echo": True}),
        ("logprobs", PROMPT, {**PROMPT, "logprobs": 1}),
    ],
    "/v1/chat/completions": [
        *sampling(CHAT),
        *of_messages(CHAT),
        *of_tools(CHAT, chat_tool, chat_choice),
        ("max_completion_tokens", *with_and_without({"messages": [SAYS]}, max_completion_tokens=2)),
        ("logprobs", CHAT, {**CHAT, "logprobs": True}),
        ("top_logprobs", *with_and_without({**CHAT, "logprobs": True}, top_logprobs=2)),
        ("response_format", CHAT, {**CHAT, "response_format": {"type": "json_object"}}),
        ("response_format.type", *with_and_without(CHAT, response_format={"type": "json_object"})),
        ("response_format.json_schema", CHAT, {**CHAT, **json_schema()}),
        (
            "response_format.json_schema.schema",
            {**CHAT, **json_schema()},
            {**CHAT, **json_schema(schema={"type": "null"})},
        ),
    ],
    "/v1/responses": [
        *[probe for probe in sampling(INPUT) if probe[0] in ("model", "stream")],
        *of_tools(INPUT, responses_tool, responses_choice),
        ("temperature", {**INPUT, "temperature": 0}, {**INPUT, "temperature": 2}),
        ("top_p", INPUT, {**INPUT, "top_p": 0.5}),
        ("max_output_tokens", INPUT, {**INPUT, "max_output_tokens": 2}),
        ("instructions", INPUT, {**INPUT, "instructions": "Be brief"}),
        ("include", INPUT, {**INPUT, **LOGPROBS}),
        ("top_logprobs", *with_and_without({**INPUT, **LOGPROBS}, top_logprobs=2)),
        ("text", INPUT, {**INPUT, **text_format()}),
        ("text.format", INPUT, {**INPUT, **text_format()}),
        ("text.format.type", INPUT, {**INPUT, "text": {"format": {"type": "json_object"}}}),
        (
            "text.format.schema",
            {**INPUT, **text_format()},
            {**INPUT, **text_format(schema={"type": "null"})},
        ),
        ("input", INPUT, {**INPUT, "input": "y"}),
        ("input.role", items(SAYS), items({**SAYS, "role": "developer"})),
        ("input.content", items(SAYS), items({**SAYS, "content": "y"})),
        ("input.content.text", input_part(), input_part(text="y")),
        ("input.call_id", called(), called(call_id="2")),
        ("input.name", called(), called(name="g")),
        ("input.arguments", called(), called(arguments='{"x": 1}')),
        ("input.output", returned(), returned(output="y")),
    ],
    "/tokenize": [
        ("model", {"prompt": "x"}, {"prompt": "x", "model": "other"}),
        ("prompt", {"prompt": "x"}, {"prompt": "y"}),
        *of_messages({}),
    ],
}
SEEN_ELSEWHERE = {"add_special_tokens"}
"""The embedded model's tokenizer adds none: test_special_tokens_of_a_prompt."""
ONE_VALUE = {
    "/v1/completions": {},
    "/v1/chat/completions": {
        "parallel_tool_calls": {**CHAT, "parallel_tool_calls": False},
        "messages.content.type": {"messages": [{**SAYS, "content": [{"type": "image_url", "text": "x"}]}]},
        "messages.tool_calls.type": {"messages": [{**CALLED, "tool_calls": [{**CALL, "type": "custom"}]}]},
        "tools.type": {**CHAT, "tools": [{"type": "custom", "function": FUNCTION}]},
        "tool_choice.type": {
            **CHAT,
            "tools": [chat_tool(FUNCTION)],
            "tool_choice": {"type": "allowed_tools"},
        },
    },
    "/v1/responses": {
        "parallel_tool_calls": {**INPUT, "parallel_tool_calls": False},
        "store": {**INPUT, "store": True},
        "truncation": {**INPUT, "truncation": "auto"},
        "input.type": items({**SAYS, "type": "reasoning"}),
        "input.content.type": input_part(type="input_image"),
        "tools.type": {**INPUT, "tools": [{"type": "web_search"}]},
        "tool_choice.type": {**INPUT, "tool_choice": {"type": "web_search"}},
    },
    "/tokenize": {},
}
IGNORED = {
    "/v1/completions": [("user", PROMPT, {**PROMPT, "user": "ada"})],
    "/v1/chat/completions": [
        ("user", CHAT, {**CHAT, "user": "ada"}),
        ("response_format.json_schema.name", {**CHAT, **json_schema()}, {**CHAT, **json_schema(name="m")}),
        (
            "response_format.json_schema.description",
            {**CHAT, **json_schema()},
            {**CHAT, **json_schema(description="d")},
        ),
        (
            "response_format.json_schema.strict",
            {**CHAT, **json_schema()},
            {**CHAT, **json_schema(strict=False)},
        ),
    ],
    "/v1/responses": [
        ("user", INPUT, {**INPUT, "user": "ada"}),
        ("metadata", INPUT, {**INPUT, "metadata": {"a": "b"}}),
        ("input.id", items(SAYS), items({"type": "message", **SAYS, "id": "msg_1"})),
        ("input.status", items(SAYS), items({"type": "message", **SAYS, "status": "completed"})),
        ("input.content.annotations", input_part(), input_part(annotations=[])),
        ("input.content.logprobs", input_part(), input_part(logprobs=[])),
        ("text.format.name", {**INPUT, **text_format()}, {**INPUT, **text_format(name="m")}),
        ("text.format.description", {**INPUT, **text_format()}, {**INPUT, **text_format(description="d")}),
        ("text.format.strict", {**INPUT, **text_format()}, {**INPUT, **text_format(strict=False)}),
    ],
    "/tokenize": [],
}


@pytest.fixture(scope="module")
def answered(make_engine):
    """What a body gets, without ids, times and what is merely repeated from the request."""
    known = {}

    def submit(request, emit):
        text = hashlib.sha256(repr(request).encode()).hexdigest()
        logprobs = request.params.logprobs
        top = ((7, -0.5),) * (logprobs or 0)
        emit(Delta(text, (Chosen(7, None if logprobs is None else -0.5, top),)))
        emit(Finished("stop", len(request.prompt), 1, 0))
        return SimpleNamespace(outcome=True)

    with make_engine() as engine, serving(engine, chat_template=EVERYTHING_SHOWN) as served:
        engine.submit = submit

        def ask(path, body):
            body = {"model": MODEL, **body}
            key = path, json.dumps(body)
            if key not in known:
                answer = served.http.post(path, json=body)
                text = answer.text
                if path == "/v1/responses" and "stream" not in body and answer.status_code == 200:
                    found = answer.json()
                    text = json.dumps([found["output"], found["usage"]["input_tokens"]])
                text = re.sub(r'"(id|item_id|call_id)": ?"[^"]*"', "", text)
                known[key] = answer.status_code, re.sub(r'"(created|cached_tokens)": ?\d+', "", text)
            return known[key]

        yield ask


def cases(table):
    return [pytest.param(path, *probe, id=f"{path} {probe[0]}") for path in table for probe in table[path]]


@pytest.mark.parametrize(("path", "field", "without", "given"), cases(USED))
def test_a_field_changes_the_answer(answered, path, field, without, given):
    status, text = answered(path, without)
    assert status == 200, text
    assert answered(path, given) != (status, text)
    if field not in ("model", "stream_options"):
        assert answered(path, given)[0] == 200, answered(path, given)


@pytest.mark.parametrize(("path", "field", "without", "given"), cases(IGNORED))
def test_a_field_changes_nothing_as_documented(answered, path, field, without, given):
    assert answered(path, without)[0] == 200
    assert answered(path, given) == answered(path, without)
    page = (Path(__file__).resolve().parents[2] / "docs" / "serve.md").read_text("utf-8")
    assert f"`{field.rpartition('.')[2]}`" in page.split("change nothing:")[1].split("`store`")[0]


@pytest.mark.parametrize("path", BODIES)
def test_other_values_of_a_field_with_one_value_are_refused(answered, path):
    for field, body in ONE_VALUE[path].items():
        status, text = answered(path, body)
        assert status == 400 and field.partition(".")[0] in text, (field, text)


@pytest.mark.parametrize("path", BODIES)
def test_no_field_is_forgotten(path):
    shown = [probe[0] for table in (USED, IGNORED) for probe in table[path]] + list(ONE_VALUE[path])
    assert len(shown) == len(set(shown))
    left = fields_of(BODIES[path]) - SEEN_ELSEWHERE
    if path == "/tokenize":  # its messages are those of chat
        left -= {"messages.content.type", "messages.tool_calls.type"}
    assert set(shown) == left


def test_one_stop_string_is_a_list_of_it(answered):
    found = [
        answered("/v1/completions", {**PROMPT, **stop}) for stop in ({"stop": "ab"}, {"stop": ["ab"]}, {})
    ]
    assert found[0] == found[1] != found[2]


def test_special_tokens_of_a_prompt(served, monkeypatch):
    tokenizer = type(served.engine.tokenizer)
    encode, asked = tokenizer.encode, []

    def noted(self, text, add_special_tokens=True, **options):
        asked.append(add_special_tokens)
        return encode(self, text, add_special_tokens=add_special_tokens, **options)

    monkeypatch.setattr(tokenizer, "encode", noted)
    for field in ({}, {"add_special_tokens": False}, {"add_special_tokens": True}):
        assert served.post("/tokenize", prompt="x", **field).status_code == 200
    served.post("/tokenize", messages=[SAYS])
    served.post("/v1/completions", prompt="x", max_tokens=1)
    assert asked == [True, False, True, False, True]
