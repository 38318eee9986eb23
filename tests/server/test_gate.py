"""Keys are compared in constant time, bodies are bounded, and refusals say nothing of the server."""

import asyncio
import hmac
import json

import pytest
from serving import MODEL, serving

from tqai.server.api import gate
from tqai.server.api.gate import Gate
from tqai.server.api.settings import ApiSettings


@pytest.mark.parametrize("given", ["first", "second", "third", "", "f", "first " * 99])
def test_every_key_is_compared_whole_whatever_was_given(monkeypatch, given):
    """Digests of one length, all of them each time: neither length nor place of a difference shows."""
    compared = []

    def compare(one, other):
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    class Watched:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(gate, "hmac", Watched)
    guard = Gate(None, ApiSettings(model_name=MODEL, api_keys=("first", "second")))
    assert guard._knows(f"Bearer {given}".encode()) == (given in ("first", "second"))
    assert len(compared) == 2
    assert {len(side) for pair in compared for side in pair} == {32}


def asked(guard, body_parts, headers=(), method="POST"):
    """Status of an answer by the gate, or the body that got through; and how many parts were read."""
    parts, sent, passed = list(body_parts), [], []

    async def receive():
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        while True:
            message = await receive()
            passed.append(message["body"])
            if not message["more_body"]:
                return

    guard.app = app
    scope = {"type": "http", "method": method, "path": "/v1/x", "headers": list(headers)}
    asyncio.run(guard(scope, receive, send))
    status = sent[0]["status"] if sent else None
    return status, b"".join(passed), len(body_parts) - len(parts)


def test_bodies_up_to_the_limit_pass_unchanged_and_longer_ones_are_read_up_to_twice_the_limit():
    """So that the answer reaches a client that is still sending."""
    guard = Gate(None, ApiSettings(model_name=MODEL, max_body_bytes=10))
    assert asked(guard, [b"12345", b"67890"]) == (None, b"1234567890", 2)
    assert asked(guard, [b"12345", b"678901", b"x", b"y"]) == (413, b"", 4)
    assert asked(guard, [b"12345", b"678901", *[b"12345678"] * 9]) == (413, b"", 4)
    assert asked(guard, [b"12345", b"678901", *[b""] * 99]) == (413, b"", 11)
    assert asked(guard, [b"x" * 11]) == (413, b"", 1)
    assert asked(guard, [b"x"], [(b"content-length", b"9" * 5000)]) == (None, b"x", 1)
    for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS"):
        assert asked(guard, [b"12345", b"678901"], method=method) == (413, b"", 2)
        assert asked(guard, [b"12345", b"67890"], method=method) == (None, b"1234567890", 2)


def test_without_a_key_nothing_is_read_and_nothing_is_told(make_engine):
    secrets = ("uvicorn", "starlette", "Traceback", "/src/", "site-packages", "tqai.", "top-secret")
    with make_engine() as engine, serving(engine, api_keys=("top-secret",)) as served:
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/openapi.json")):
            answer = served.http.request(method, path, content=b"{")
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
            found = answer.text + json.dumps(dict(answer.headers))
            assert not [word for word in secrets if word in found], found
        for path in ("/metrics", "/status.json", "/tokenize", "/v1/responses", "/nothing"):
            assert served.http.get(path).status_code == 401
        assert [served.http.get(path).status_code for path in ("/", "/health")] == [200, 200]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 2}),
    ],
)
def test_a_model_that_fails_tells_nothing(make_engine, monkeypatch, path, body, stream):
    def broken(*args):
        raise RuntimeError("secret of /root/path")

    with make_engine() as engine, serving(engine) as served:
        monkeypatch.setattr(engine.scheduler.runner, "prefill", broken)
        answer = served.post(path, **body, stream=stream)
        assert answer.status_code == (200 if stream else 500)
        assert "the model failed on this request" in answer.text
        assert "secret" not in answer.text and "/root" not in answer.text and "Error" not in answer.text
        if stream and path != "/v1/responses":
            events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
            assert set(json.loads(events[-2])["error"]) == {"message", "type", "param", "code"}
            assert events[-1] == "[DONE]"
        monkeypatch.undo()
        assert served.post(path, **body).status_code == 200
