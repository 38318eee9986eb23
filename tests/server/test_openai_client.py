"""The official client against a running server."""

import json
import re

import openai
import pytest
from serving import MODEL

from tqai import demo

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "age": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def retrieval(loaded):
    return demo.make_prompt(loaded[1], 600, seed=1)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == MODEL and client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="gpt"):
        client.models.retrieve("gpt")


def test_completion_finds_the_hidden_code(client, retrieval):
    answer = client.completions.create(
        model=MODEL, prompt=retrieval.prompt(), max_tokens=12, temperature=0, stop=["."]
    )
    assert demo.is_correct(answer.choices[0].text, retrieval.answers[0])
    assert answer.choices[0].finish_reason == "stop" and "." not in answer.choices[0].text
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_and_its_stream_say_the_same_and_use_the_prefix_cache(client, retrieval):
    wanted = {
        "model": MODEL,
        "messages": [{"role": "user", "content": [{"type": "text", "text": retrieval.text}]}],
        "max_completion_tokens": 12,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**wanted)
    chunks = list(
        client.chat.completions.create(**wanted, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content and text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == answer.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 512


def test_completion_logprobs_and_echo(client, loaded):
    ids = loaded[1].encode("The import statement loads a module")
    answer = client.completions.create(
        model=MODEL, prompt=ids, max_tokens=3, temperature=0, logprobs=2, echo=True
    )
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(ids) + 3 and found.token_logprobs[0] is None
    assert all(p is not None and p <= 0 for p in found.token_logprobs[1:])
    for token, logprob, top in zip(
        found.tokens[-3:], found.token_logprobs[-3:], found.top_logprobs[-3:], strict=True
    ):
        assert top[token] == logprob == max(top.values())
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.text_offset[1] == len(found.tokens[0])
    only = client.completions.create(model=MODEL, prompt=ids, max_tokens=0, echo=True, logprobs=0)
    assert only.usage.completion_tokens == 0
    assert only.choices[0].logprobs.token_logprobs == found.token_logprobs[: len(ids)]


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "A list is"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    for item in content:
        assert len(item.top_logprobs) == 3 and item.top_logprobs[0].token == item.token
        assert bytes(item.bytes).decode() == item.token
    assert "".join(item.token for item in content) == answer.choices[0].message.content


def test_several_outputs_and_prompts(client):
    answer = client.completions.create(
        model=MODEL, prompt=["The first", "The second"], n=2, max_tokens=6, temperature=1, seed=7
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text != answer.choices[1].text
    assert answer.usage.completion_tokens == 24
    again = client.completions.create(
        model=MODEL, prompt="The first", n=2, max_tokens=6, temperature=1, seed=7
    )
    assert [c.text for c in again.choices] == [c.text for c in answer.choices[:2]]


def test_streamed_completion_of_several_outputs(client):
    wanted = {"model": MODEL, "prompt": "A class", "n": 2, "max_tokens": 5, "temperature": 1, "seed": 3}
    whole = client.completions.create(**wanted)
    texts = ["", ""]
    for chunk in client.completions.create(**wanted, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_json_schema(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Say something"}],
        temperature=1,
        seed=5,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
    )
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"name", "age"} and found["name"] in ("ada", "bob") and 1 <= found["age"] <= 9
    assert answer.choices[0].finish_reason == "stop"


def test_regex(client):
    answer = client.completions.create(
        model=MODEL, prompt="Date:", max_tokens=30, extra_body={"guided_regex": "[0-9]{4}-[0-9]{2}"}
    )
    year, month = answer.choices[0].text.split("-")
    assert len(year) == 4 and len(month) == 2 and (year + month).isdigit()


@pytest.mark.parametrize("stream", [False, True])
def test_forced_tool_call(client, stream):
    made = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Weather?"}],
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        temperature=0,
        stream=stream,
    )
    if stream:
        deltas = [chunk.choices[0] for chunk in made]
        (call,) = [call for delta in deltas for call in delta.delta.tool_calls or []]
        assert deltas[-1].finish_reason == "tool_calls"
        assert not any(delta.delta.content for delta in deltas)
    else:
        (call,) = made.choices[0].message.tool_calls
        assert made.choices[0].finish_reason == "tool_calls" and made.choices[0].message.content is None
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


def test_conversation_with_a_tool_result(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
        ],
        tools=[TOOL],
        max_tokens=3,
    )
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_responses(client, retrieval):
    answer = client.responses.create(
        model=MODEL, input=retrieval.prompt(), max_output_tokens=12, temperature=0, store=False
    )
    assert demo.is_correct(answer.output_text, retrieval.answers[0])
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    events = list(
        client.responses.create(
            model=MODEL, input=retrieval.prompt(), max_output_tokens=12, temperature=0, stream=True
        )
    )
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == answer.output_text


def test_responses_with_schema_and_tool(client):
    answer = client.responses.create(
        model=MODEL,
        instructions="Be brief",
        input=[{"role": "user", "content": "Who?"}],
        text={"format": {"type": "json_schema", "name": "person", "schema": SCHEMA, "strict": True}},
    )
    assert json.loads(answer.output_text)["name"] in ("ada", "bob") and answer.status == "completed"
    function = {"type": "function", "strict": True, **TOOL["function"]}
    called = client.responses.create(model=MODEL, input="Weather?", tools=[function], tool_choice="required")
    (item,) = called.output
    assert item.type == "function_call" and json.loads(item.arguments)["city"] in ("Oslo", "Rome")


def test_errors_are_the_client_s_own(client):
    with pytest.raises(openai.NotFoundError) as found:
        client.completions.create(model="other", prompt="x")
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model=MODEL, prompt="x", temperature=3)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="x", max_tokens=100_000)
    assert long.value.code == "context_length_exceeded"


def test_lists_of_token_ids_are_prompts(client, loaded):
    texts = ["The import statement", "A class is"]
    ids = [loaded[1].encode(text) for text in texts]
    wanted = {"model": MODEL, "max_tokens": 3, "temperature": 0}
    by_ids = client.completions.create(prompt=ids, **wanted)
    by_text = client.completions.create(prompt=texts, **wanted)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in by_text.choices]
    assert by_ids.usage.prompt_tokens == sum(map(len, ids)) == by_text.usage.prompt_tokens
    streamed = list(client.completions.create(prompt=ids, echo=True, stream=True, **wanted))
    for index, text in enumerate(texts):
        pieces = [chunk.choices[0].text for chunk in streamed if chunk.choices[0].index == index]
        assert "".join(pieces) == text + by_text.choices[index].text


def test_any_json_object(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Say"}],
        max_tokens=4,
        temperature=0,
        response_format={"type": "json_object"},
    )
    assert answer.choices[0].message.content.startswith("{")


CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_call_that_the_model_makes_by_itself(client, stream, choice):
    """What it says is given here; whether it is a call is up to `tool_choice`."""
    made = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Weather?"}],
        tools=[TOOL],
        tool_choice=choice,
        stream=stream,
        extra_body={"guided_regex": re.sub(r"[.{}]", r"\\\g<0>", "Well. " + CALL)},
    )
    if stream:
        deltas = [chunk.choices[0] for chunk in made]
        content = "".join(delta.delta.content or "" for delta in deltas)
        calls, reason = [c for d in deltas for c in d.delta.tool_calls or []], deltas[-1].finish_reason
    else:
        message, reason = made.choices[0].message, made.choices[0].finish_reason
        content, calls = message.content, message.tool_calls or []
    if choice == "none":
        assert (content, calls, reason) == ("Well. " + CALL, [], "stop")
        return
    (call,) = calls
    assert content.strip() == "Well." and reason == "tool_calls" and call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})


def test_responses_logprobs(client):
    wanted = {"model": MODEL, "input": "A list is", "max_output_tokens": 4, "temperature": 0}
    wanted |= {"include": ["message.output_text.logprobs"], "top_logprobs": 3}
    (part,) = client.responses.create(**wanted).output[0].content
    assert "".join(item.token for item in part.logprobs) == part.text and len(part.logprobs) == 4
    for item in part.logprobs:
        assert len(item.top_logprobs) == 3 and item.top_logprobs[0].logprob == item.logprob <= 0
    events = list(client.responses.create(**wanted, stream=True))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    streamed = [item.token for event in deltas for item in event.logprobs]
    assert streamed == [item.token for item in part.logprobs]
    assert events[-1].response.output[0].content[0].logprobs == part.logprobs


def test_responses_go_on_after_a_call(client):
    function = {"type": "function", "strict": True, **TOOL["function"]}
    events = list(
        client.responses.create(
            model=MODEL, input="Weather?", tools=[function], tool_choice="required", stream=True
        )
    )
    whole = events[-1].response
    (item,) = whole.output
    assert events[-1].type == "response.completed" and item.name == "weather"
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert done.arguments == item.arguments and done.item_id == item.id
    answer = client.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            item.model_dump(exclude_none=True),
            {"type": "function_call_output", "call_id": item.call_id, "output": "rain"},
        ],
        tools=[function],
        tool_choice="none",
        max_output_tokens=3,
    )
    assert answer.usage.output_tokens == 3 and answer.status == "incomplete"
    assert answer.usage.total_tokens == answer.usage.input_tokens + 3
