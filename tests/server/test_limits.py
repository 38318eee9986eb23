"""Who is refused, how, and that nothing of the server's inside gets out."""

import json
import socket
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import httpx
import pytest
from serving import MODEL, serving

from tqai.server.api import wire
from tqai.server.api.lifecycle import config_for
from tqai.server.api.schemas import TokenizeRequest

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = [{"role": "user", "content": "x"}]
FORCED = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}
CHOSEN = {"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "f"}}
EXTRA = {"name": "n", "schema": {"type": "object"}, "extra": 1}
SCHEMA = {"json_schema": {"name": "n", "schema": {"type": "object"}}}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": MESSAGES, "audio": {}}, "audio"),
        (CHAT, {"messages": MESSAGES, "modalities": ["text"]}, "modalities"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "refusal": "y"}]}, "messages.0.refusal"),
        (COMPLETIONS, {"prompt": "x", "best_of": 2}, "best_of"),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix"),
        (RESPONSES, {"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        (RESPONSES, {"input": "x", "background": True}, "background"),
        (
            CHAT,
            {"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": EXTRA}},
            "response_format.json_schema.extra",
        ),
        (
            RESPONSES,
            {"input": "x", "text": {"format": {"type": "json_schema", **EXTRA}}},
            "text.format.extra",
        ),
    ],
)
def test_unsupported_parameters_are_refused_by_name(served, path, body, param):
    status, message, found = served.error(path, **body)
    assert (status, found) == (400, param) and "unsupported parameter" in message and param in message


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": MESSAGES, "temperature": 2.5}, "temperature"),
        (CHAT, {"messages": MESSAGES, "n": 0}, "n"),
        (CHAT, {"messages": MESSAGES, "n": 17}, "n"),
        (CHAT, {"messages": [], "n": 1}, "messages"),
        (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
        (CHAT, {"messages": MESSAGES, "stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_schema"}}, "response_format"),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "text", **SCHEMA}}, "response_format"),
        (CHAT, {"messages": [{**MESSAGES[0], "tool_call_id": "1"}]}, "messages.0"),
        (CHAT, {"messages": [{**MESSAGES[0], "tool_calls": []}]}, "messages.0"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 2, "max_completion_tokens": 2}, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "echo": True, "stream": True, "logprobs": 1}, "echo"),
        (COMPLETIONS, {"prompt": "x", "stream_options": {}}, "stream_options"),
        (CHAT, {"messages": MESSAGES, **FORCED, "response_format": {"type": "json_object"}}, "tool_choice"),
        (CHAT, {"messages": MESSAGES, **FORCED, "guided_regex": "a"}, "tool_choice"),
        (CHAT, {"messages": MESSAGES, "guided_regex": "a", "guided_json": {}}, "guided_json"),
        (RESPONSES, {"input": "x", **CHOSEN, "text": {"format": {"type": "json_object"}}}, "tool_choice"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": MESSAGES, "prompt": "x"}, "prompt"),
        (RESPONSES, {"input": "x", "top_logprobs": 2}, "top_logprobs"),
        (RESPONSES, {"input": "x", "include": ["file_search_call.results"]}, "include"),
        (RESPONSES, {"input": "x", "text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format"),
        (RESPONSES, {"input": "x", "text": {"format": {"type": "text", "schema": {}}}}, "text.format"),
        (RESPONSES, {"input": "x", "store": True}, "store"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": "5"}, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "echo": 1}, "echo"),
        (COMPLETIONS, {"prompt": [True]}, "prompt"),
        (CHAT, {"messages": MESSAGES, "n": 1.0}, "n"),
        (RESPONSES, {"input": "x", "max_output_tokens": "5"}, "max_output_tokens"),
        (RESPONSES, {"input": "x", "truncation": "auto"}, "truncation"),
        (RESPONSES, {"input": "x", "parallel_tool_calls": False}, "parallel_tool_calls"),
        (COMPLETIONS, {"prompt": "x", "guided_json": {"type": "nonsense"}}, "guided_json"),
        (COMPLETIONS, {"prompt": "x", "guided_regex": "("}, "guided_regex"),
        (CHAT, {"messages": MESSAGES, "guided_regex": "("}, "guided_regex"),
        (COMPLETIONS, {"prompt": "x", "guided_regex": "a", "guided_json": {}}, "guided_json"),
        (COMPLETIONS, {"prompt": ["x"] * 9, "n": 2}, "n"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [1, 4096]}, "prompt"),
        (COMPLETIONS, {"prompt": "x" * 100_000}, "prompt"),
        (COMPLETIONS, {"prompt": "x", "stop": [""]}, "stop.0"),
        (RESPONSES, {"input": []}, "input"),
    ],
)
def test_values_out_of_range_are_refused_by_name(served, path, body, param):
    status, message, found = served.error(path, **body)
    assert status == 400 and found is not None and found.startswith(param), (message, found)


def test_text_that_no_tokenizer_reads(served):
    content = json.dumps({"model": MODEL, "prompt": "\ud800"})
    answer = served.http.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"


def test_what_is_told_of_a_request_is_short_and_text(served):
    names = {"type": "function", "function": {"name": "x" * 10_000}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    status, message, _ = served.error(CHAT, messages=MESSAGES, tools=tools, tool_choice=names)
    assert status == 400 and len(message) <= 500 and "no tool is named" in message
    headers = {"Content-Type": "application/json"}
    for body in ({"model": "\ud800", "prompt": "x"}, {"model": MODEL, "prompt": "x", "\ud800": 1}):
        answer = served.http.post(COMPLETIONS, content=json.dumps(body), headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_stream_that_waits_is_kept_awake(make_engine, monkeypatch):
    """Proxies cut connections on which nothing comes."""
    assert wire.PING_SECONDS <= 20
    monkeypatch.setattr(wire, "PING_SECONDS", 0.1)
    with make_engine() as engine, serving(engine) as served:
        monkeypatch.setattr(engine, "submit", lambda request, emit: SimpleNamespace(outcome=None))
        monkeypatch.setattr(engine, "cancel", lambda sequence: None)
        body = {"model": MODEL, "prompt": "x", "stream": True}
        with served.http.stream("POST", COMPLETIONS, json=body) as answer:
            assert next(answer.iter_lines()).startswith(": ping")


def test_what_is_cut_off_by_the_end_of_the_server_gets_503(make_engine):
    with make_engine() as engine, serving(engine) as served:
        found = []
        body = {"prompt": "x", "max_tokens": 9000, "ignore_eos": True}
        asking = threading.Thread(target=lambda: found.append(served.post(COMPLETIONS, **body)))
        asking.start()
        until(lambda: engine.figures().running)
        engine.stop()
        asking.join(60)
        assert found[0].status_code == 503 and found[0].json()["error"]["type"] == "server_error"
        health = served.http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed"})


def test_a_token_id_beyond_the_vocabulary_is_refused(served):
    for field in ({"logit_bias": {"4096": 1}}, {"stop_token_ids": [5000]}):
        assert served.error(COMPLETIONS, prompt="x", **field)[0] == 400


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000])
def test_bodies_that_are_no_requests(served, content):
    answer = served.http.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and set(answer.json()) == {"error"}


def test_unknown_paths_and_methods(served):
    assert served.http.get("/v1/nothing").status_code == 404
    assert served.http.get(CHAT).status_code == 405
    assert served.http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    for path in ("/health", "/v1/nothing", "/docs", "/redoc"):
        answer = served.http.get(path)
        assert "server" not in answer.headers and "uvicorn" not in answer.text
        assert answer.status_code == (200 if path == "/health" else 404)


def test_heads_of_up_to_64_kib(served):
    """Also in pieces, of which uvicorn's own bound takes 16 KiB; what is read at once counts as one."""
    for size, status in ((40 << 10, b" 200 "), (400 << 10, b" 400 ")):
        with socket.create_connection(served.address) as plain:
            plain.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * size)
            time.sleep(0.2)
            with suppress(ConnectionError):  # refused before its end
                plain.sendall(b"\r\n\r\n")
            assert status in plain.recv(1000)


def test_idle_connections_are_kept_for_longer_than_clients_keep_them():
    """One that the server closes while a request is on its way is an error to the client."""
    assert config_for(None, "127.0.0.1", 0).timeout_keep_alive > 65


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


def test_cors_is_off(served):
    origin = {"Origin": "http://evil.example"}
    preflight = served.http.options("/v1/models", headers={**origin, **PREFLIGHT})
    assert preflight.status_code == 405
    for answer in (preflight, served.http.get("/v1/models", headers=origin)):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_an_allowed_origin_may_ask_and_bring_a_key(make_engine):
    origin = {"Origin": "http://mine.example"}
    with (
        make_engine() as engine,
        serving(engine, api_keys=("first",), allowed_origins=("http://mine.example",)) as served,
    ):
        answer = served.http.options("/v1/models", headers={**origin, **PREFLIGHT})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "http://mine.example"
        assert "Authorization" in answer.headers["access-control-allow-headers"]
        other = served.http.options("/v1/models", headers={"Origin": "http://evil.example", **PREFLIGHT})
        assert "access-control-allow-origin" not in other.headers
        assert served.http.options("/v1/models").status_code == 401
        refused = served.http.get("/v1/models", headers=origin)
        assert refused.status_code == 401, "which the page may read:"
        assert refused.headers["access-control-allow-origin"] == "http://mine.example"
        assert "access-control-allow-credentials" not in refused.headers


@pytest.mark.parametrize(
    ("path", "most", "more"),
    [
        (COMPLETIONS, {"stop": ["a"] * 16}, {"stop": ["a"] * 17}),
        (COMPLETIONS, {"stop": "a" * 256}, {"stop": "a" * 257}),
        (COMPLETIONS, {"stop_token_ids": [5] * 256}, {"stop_token_ids": [5] * 257}),
        (COMPLETIONS, {"logprobs": 20}, {"logprobs": 21}),
        (CHAT, {"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 21}),
        (COMPLETIONS, {"guided_regex": "a" * 4096}, {"guided_regex": "a" * 4097}),
        ("/tokenize", {"messages": MESSAGES * 4096}, {"messages": MESSAGES * 4097}),
        (COMPLETIONS, {"temperature": 2}, {"temperature": 2.01}),
        (COMPLETIONS, {"presence_penalty": -2}, {"presence_penalty": -2.01}),
        (COMPLETIONS, {"n": 16}, {"n": 17}),
        (
            RESPONSES,
            {"metadata": {str(n): "" for n in range(16)}},
            {"metadata": {str(n): "" for n in range(17)}},
        ),
    ],
)
def test_documented_limits_are_where_they_are_said_to_be(served, path, most, more):
    if path in (RESPONSES, "/tokenize"):
        body = {"input": "x", "max_output_tokens": 1} if path == RESPONSES else {}
    else:
        body = {"max_tokens": 1} | ({"prompt": "x"} if path == COMPLETIONS else {"messages": MESSAGES})
    assert served.post(path, **{**body, **most}).status_code == 200
    status, _, param = served.error(path, **{**body, **more})
    assert (status, param.partition(".")[0]) == (400, list(more)[-1])


def test_a_text_has_at_most_4_mi_characters():
    assert TokenizeRequest(prompt=" " * (4 << 20))
    with pytest.raises(ValueError, match="4194304 characters"):
        TokenizeRequest(prompt=" " * ((4 << 20) + 1))


def test_tokenize(served, loaded):
    ids = loaded[1].encode("Hello there")
    found = served.post("/tokenize", prompt="Hello there").json()
    assert found == {"tokens": ids, "count": len(ids), "max_model_len": 9216}
    chat = served.post("/tokenize", messages=[{"role": "user", "content": "Hello there"}]).json()
    assert chat["tokens"] == ids
    assert served.error("/tokenize")[0] == 400


def test_keys_body_size_and_tools_without_a_template(make_engine):
    with (
        make_engine() as engine,
        serving(
            engine, api_keys=("first", "second"), max_body_bytes=1000, chat_template="{{ messages }}"
        ) as served,
    ):
        path = "/v1/models"
        for wrong in ({}, {"Authorization": "Bearer firs"}, {"Authorization": "Basic first"}):
            answer = served.http.get(path, headers=wrong)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert served.http.get("/metrics", headers=wrong).status_code == 401
        assert served.http.get("/health").status_code == 200
        for right in ("bearer first", "BEARER  second", "Bearer second"):
            served.http.headers["Authorization"] = right
            assert served.http.get(path).status_code == 200
        assert served.error(COMPLETIONS, prompt="x" * 1000)[0] == 413
        unannounced = served.http.post(COMPLETIONS, content=(b"x" * 100 for _ in range(11)))
        assert unannounced.status_code == 413 and unannounced.headers["Connection"] == "close"
        tool = {"type": "function", "function": {"name": "f"}}
        assert served.error(CHAT, messages=MESSAGES, tools=[tool])[2] == "tools"
        with serving(engine, chat_template=None) as bare:
            assert served.engine.tokenizer.chat_template is None
            assert bare.error(CHAT, messages=MESSAGES)[2] == "messages"


def test_full_queue_and_draining(make_engine):
    with make_engine(max_running=1, max_waiting=1) as engine, serving(engine) as served:
        long = {"model": MODEL, "prompt": "x", "max_tokens": 4000, "stream": True, "ignore_eos": True}
        with served.http.stream("POST", COMPLETIONS, json=long) as first:
            lines = first.iter_lines()  # kept: the stream is closed, and the request cancelled, with it
            next(lines)
            waiting = threading.Thread(
                target=served.post, args=(COMPLETIONS,), kwargs={"prompt": "y", "max_tokens": 1}
            )
            waiting.start()
            deadline = time.monotonic() + 30
            while engine.figures().waiting < 1:
                assert waiting.is_alive() and time.monotonic() < deadline, engine.figures()
                time.sleep(0.01)
            answer = served.post(COMPLETIONS, prompt="z")
            assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        waiting.join(60)
        engine.drain()
        answer = served.post(COMPLETIONS, prompt="z")
        assert answer.status_code == 503 and "Retry-After" in answer.headers
        assert served.http.get("/health").status_code == 503


def test_an_unexpected_error_tells_nothing(served, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("secret /root/path")

    monkeypatch.setattr(served.engine, "submit", broken)
    with httpx.Client(base_url=served.url) as fresh:
        answer = fresh.post(COMPLETIONS, json={"model": MODEL, "prompt": "x"})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text and "root" not in answer.text


def test_limits_on_output_and_on_outputs_at_a_time(make_engine):
    with make_engine(max_running=2, max_waiting=1) as engine, serving(engine, max_output_tokens=5) as served:
        assert served.error(COMPLETIONS, prompt="x", max_tokens=6)[2] == "max_tokens"
        assert served.error(CHAT, messages=MESSAGES, max_completion_tokens=6)[0] == 400
        assert served.error(RESPONSES, input="x", max_output_tokens=6)[0] == 400
        answer = served.post(CHAT, messages=MESSAGES, ignore_eos=True).json()
        assert answer["usage"]["completion_tokens"] == 5, "the default is the limit"
        status, message, param = served.error(COMPLETIONS, prompt="x", n=4, max_tokens=1)
        assert (status, param) == (400, "n") and "at most 3" in message, "it would get 429 for ever"
        assert len(served.post(COMPLETIONS, prompt="x", n=3, max_tokens=1).json()["choices"]) == 3


def metrics_of(served):
    """Values by name; a label but the model's is part of the name."""
    text = served.http.get("/metrics").text
    values = {}
    for line in text.splitlines():
        if line.startswith("tqai:"):
            labels, _, value = line.removeprefix("tqai:").rpartition(" ")
            assert f'model_name="{MODEL}"' in labels
            labels = labels.replace(f'model_name="{MODEL}"', "").replace("{}", "")
            values[labels.replace("{,", "{").replace(",}", "}")] = float(value)
    return values


def test_metrics_count_what_happens(make_engine, document_ids, monkeypatch):
    """Two requests that end, the second one with a cached prefix; one that goes away; one that fails."""
    with make_engine(max_running=1, pages=40) as engine, serving(engine) as served:
        wanted = {"prompt": document_ids[:300], "temperature": 0, "ignore_eos": True}
        served.post(COMPLETIONS, **wanted, max_tokens=3)
        served.post(COMPLETIONS, **wanted, max_tokens=3, logit_bias={"7": 100}, stop_token_ids=[7])
        long = {"model": MODEL, **wanted, "max_tokens": 1500, "stream": True}
        with served.http.stream("POST", COMPLETIONS, json=long) as answer:
            lines = answer.iter_lines()  # kept: the stream is closed with it
            next(lines)
            body = {"model": MODEL, "prompt": "y", "n": 2}
            url = f"{served.url}{COMPLETIONS}"
            other = threading.Thread(target=httpx.post, args=(url,), kwargs={"json": body, "timeout": 120})
            other.start()
            until(lambda: engine.figures().waiting == 2)
            found, figures = metrics_of(served), engine.figures()
            assert (found["num_requests_running"], found["num_requests_waiting"]) == (1, 2)
            assert 4 <= found["kv_pages_requests"] <= figures.request_pages
            assert found["kv_cache_usage_perc"] == found["kv_pages_requests"] / 40
            page = engine.store.pool.page_bytes
            held = found["kv_bytes_held"] - found["kv_pages_requests"] * page
            assert held == engine.store.exact_bytes // 2
            tokens = found["kv_bytes_bf16"] / engine.bf16_bytes_per_token
            assert found["kv_pages_requests"] == tokens // 64
        other.join(60)
        assert engine.wait_idle(60)
        monkeypatch.setattr(engine.scheduler.runner, "prefill", lambda *args: 1 / 0)
        assert served.error(COMPLETIONS, prompt="x")[0] == 500
        # the answer may be sent a moment before its request is counted as ended
        until(lambda: metrics_of(served)['request_success_total{finished_reason="error"}'])
        found = metrics_of(served)
        counters = engine.scheduler.counters
        reasons = ("length", "stop", "abort", "error")
        counts = [found[f'request_success_total{{finished_reason="{reason}"}}'] for reason in reasons]
        assert counts == [3, 1, 1, 1]
        assert found["kv_pages_total"] == 40 and found["kv_pages_requests"] == 0
        assert found["num_requests_running"] == found["num_requests_waiting"] == found["kv_bytes_held"] == 0
        assert found["kv_pages_prefix_cache"] == 4
        assert found["prefix_cache_queries_total"] == 3 * 300 + 3
        assert found["prefix_cache_hits_total"] == 2 * 256
        assert found["prompt_tokens_total"] == 300 + 2 * 44 + 2
        assert found["generation_tokens_total"] == counters.generated_tokens
        assert found["num_preemptions_total"] == 0
        assert found["request_queue_time_seconds_count"] == 6
        assert found["time_to_first_token_seconds_count"] == 5
        assert found["e2e_request_latency_seconds_count"] == 4
        assert found["time_per_output_token_seconds_count"] == 3
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
            assert 0 < found[f"{name}_seconds_sum"] < 120


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def test_metrics_count(served):
    served.post(COMPLETIONS, prompt="x", max_tokens=3, temperature=0, ignore_eos=True)
    label = f'{{model_name="{MODEL}"}}'
    deadline = time.monotonic() + 30
    while True:  # the answer may be sent a moment before its request is counted as ended
        text = served.http.get("/metrics").text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        if float(values[f"tqai:num_requests_running{label}"]) == 0 or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    assert float(values[f"tqai:generation_tokens_total{label}"]) >= 3
    assert float(values[f"tqai:time_to_first_token_seconds_count{label}"]) >= 1
    assert float(values[f"tqai:num_requests_running{label}"]) == 0
    assert float(values[f"tqai:kv_pages_total{label}"]) == served.engine.store.pool.pages
    status = served.http.get("/status.json").json()
    assert status["model"] == MODEL and status["pages"] == served.engine.store.pool.pages
