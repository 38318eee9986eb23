"""Requests that go wrong, go away or are cancelled leave the others alone and their pages behind."""

import asyncio
import json
import socket
import threading
import time

import pytest
import torch
from engine_runs import Outcome, finished, request, run, run_one
from serving import MODEL, serving

from tqai.errors import ConfigError, InputError
from tqai.server.api.app import create_app
from tqai.server.api.settings import ApiSettings
from tqai.server.engine.engine import Draining, PromptTooLong, QueueFull
from tqai.server.engine.sequence import RequestFailed

POISON = 77


@pytest.fixture
def poisoned_model(loaded):
    """The model computes NaN for token 77, and for it alone."""

    def spoil(module, inputs, output):
        return torch.where((inputs[0] == POISON)[..., None], torch.nan, output)

    hook = loaded[0].get_input_embeddings().register_forward_hook(spoil)
    yield
    hook.remove()


def clean(ids):
    return [token for token in ids if token != POISON]


def test_nan_fails_alone_and_never_enters_the_prefix_cache(make_engine, document_ids, poisoned_model):
    ids = clean(document_ids[:1200])
    good = [request(ids[:300], max_tokens=8), request(ids[400:420], max_tokens=8)]
    bad = [
        request([*ids[:299], POISON], max_tokens=8),
        request([*ids[:280], POISON, *ids[280:600]], max_tokens=8),
    ]
    biased = request(ids[600:700], max_tokens=8, logit_bias={POISON: 100.0})
    with make_engine() as engine:
        alone = [run_one(engine, wish).tokens for wish in good]
        engine.scheduler.prefixes.clear()
        together = run(engine, [bad[0], good[0], biased, bad[1], good[1]])
        for index in (0, 2, 3):
            assert isinstance(together[index].end, RequestFailed) and "finite" in together[index].end.message
        assert together[2].tokens == [POISON]
        assert [together[1].tokens, together[4].tokens] == alone
        shared = engine.scheduler.prefixes.find(bad[1].prompt)
        engine.store.pool.release(shared.pages)
        assert len(shared.pages) == 4, "only the chunk before the poisoned one, which a good request computed"
        assert run_one(engine, good[0]).tokens == alone[0]


def test_a_failing_tokenizer_fails_alone(make_engine, document_ids, monkeypatch):
    with make_engine() as engine:
        decode = type(engine.tokenizer).decode

        def fragile(self, ids, **kwargs):
            if POISON in ids:
                raise RuntimeError("no such token")
            return decode(self, ids, **kwargs)

        monkeypatch.setattr(type(engine.tokenizer), "decode", fragile)
        ids = clean(document_ids[:50])
        bad, good = run(
            engine, [request(ids, max_tokens=5, logit_bias={POISON: 100.0}), request(ids, max_tokens=5)]
        )
        assert isinstance(bad.end, RequestFailed) and finished(good) and len(good.tokens) == 5


def test_a_step_that_raises_fails_its_requests_and_the_engine_goes_on(make_engine, document_ids, monkeypatch):
    with make_engine() as engine:
        monkeypatch.setattr(engine.scheduler.runner, "decode", lambda *args: 1 / 0)
        failed = run(engine, [request(document_ids[:70], max_tokens=5) for _ in range(2)])
        assert all(isinstance(outcome.end, RequestFailed) for outcome in failed)
        monkeypatch.undo()
        assert finished(run_one(engine, request(document_ids[:70], max_tokens=5)))


class Steps:
    """Counts, per cancelled request, the decode steps that begin between `cancel` and its end."""

    def __init__(self, engine, monkeypatch):
        self.after_cancel: dict[int, int] = {}
        self._cancelled: dict[int, int] = {}
        self._begun = 0
        decode, cancel, finish = engine.scheduler.runner.decode, engine.cancel, engine.scheduler._on_finished

        def decoded(*arguments):
            self._begun += 1
            return decode(*arguments)

        def cancelled(sequence):
            with engine._changed:
                self._cancelled.setdefault(sequence.number, self._begun)
                cancel(sequence)

        def finished(sequence):
            assert sequence.pages == [] and sequence not in engine.scheduler.running
            with engine._changed:
                if sequence.number in self._cancelled:
                    self.after_cancel[sequence.number] = self._begun - self._cancelled[sequence.number]
            finish(sequence)

        monkeypatch.setattr(engine.scheduler.runner, "decode", decoded)
        monkeypatch.setattr(engine, "cancel", cancelled)
        monkeypatch.setattr(engine.scheduler, "_on_finished", finished)


def test_cancelled_requests_give_their_pages_back_within_a_step(make_engine, document_ids, monkeypatch):
    with make_engine(max_running=3) as engine:
        steps = Steps(engine, monkeypatch)
        outcomes = [Outcome() for _ in range(5)]
        sequences = [
            engine.submit(request(document_ids[n : n + 200], max_tokens=4000), outcome.events.append)
            for n, outcome in enumerate(outcomes)
        ]
        wait_for(lambda: all(len(outcome.tokens) > 2 for outcome in outcomes[:3]))
        engine.cancel(sequences[4])  # waits
        engine.cancel(sequences[1])  # runs
        wait_for(lambda: sequences[1].outcome is not None and sequences[4].outcome is not None)
        assert isinstance(outcomes[1].end, RequestFailed) and outcomes[1].end.cancelled
        wait_for(lambda: len(outcomes[3].tokens) > 0)
        assert not outcomes[4].tokens
        for sequence in sequences:
            engine.cancel(sequence)
        assert engine.wait_idle(60)
    assert len(steps.after_cancel) == 5 and max(steps.after_cancel.values()) <= 1, steps.after_cancel


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels_its_request(make_engine, monkeypatch, stream, path):
    with make_engine() as engine, serving(engine) as served:
        steps = Steps(engine, monkeypatch)
        body = {"model": MODEL, "stream": stream}
        if path == "/v1/completions":
            body |= {"prompt": "x " * 100, "max_tokens": 5000, "ignore_eos": True}
        elif path == "/v1/chat/completions":
            messages = [{"role": "user", "content": "x " * 100}]
            body |= {"messages": messages, "max_tokens": 5000, "ignore_eos": True}
        else:
            body |= {"input": "x " * 100, "max_output_tokens": 5000, "temperature": 0}
            monkeypatch.setattr(engine, "end_tokens", frozenset())
        if stream:
            with served.http.stream("POST", path, json=body) as answer:
                lines = answer.iter_lines()  # kept: the stream is closed, and the request cancelled, with it
                next(lines)
                wait_for(lambda: engine.figures().request_pages > 0)
        else:
            # the connection is cut once the request runs, however long that takes
            with socket.create_connection(served.address) as plain:
                content = json.dumps(body).encode()
                head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                plain.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
                wait_for(lambda: engine.figures().request_pages > 0)
        assert engine.wait_idle(60)
        assert engine.figures().request_pages == 0
        assert engine.scheduler.counters.generated_tokens < 4000
        assert list(steps.after_cancel) == [1] and steps.after_cancel[1] <= 1, steps.after_cancel
        assert served.post("/v1/completions", prompt="x", max_tokens=1).status_code == 200


def test_a_client_that_goes_before_its_stream_begins_cancels_it(make_engine):
    """The head of the answer is still on its way out when the connection ends."""
    with make_engine() as engine:
        app = create_app(engine, ApiSettings(model_name=MODEL))
        body = {"model": MODEL, "prompt": "x", "max_tokens": 5000, "stream": True, "ignore_eos": True}
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}, {"type": "http.disconnect"}]
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        scope |= {"query_string": b"", "raw_path": b"/v1/completions", "root_path": "", "scheme": "http"}
        scope |= {"http_version": "1.1", "server": ("x", 1), "client": ("y", 2), "asgi": {"version": "3.0"}}

        async def receive():
            return messages.pop(0)

        async def send(message):
            await asyncio.sleep(3600)

        asyncio.run(asyncio.wait_for(app(scope, receive, send), 60))
        assert engine.wait_idle(60)
        assert engine.scheduler.counters.generated_tokens < 4000


def test_a_long_prompt_delays_a_running_request_by_one_chunk_at_a_time(make_engine, document_ids):
    """Between two tokens of a running request lies at most one prefill step of 128 tokens."""
    with make_engine(chunk_tokens=128) as engine:
        seen: list[int] = []
        runner, outcome = engine.scheduler.runner, Outcome()
        prefill = runner.prefill

        def counted(step, tokens, all_logits):
            seen.append(len(outcome.tokens))
            return prefill(step, tokens, all_logits)

        runner.prefill = counted
        first = engine.submit(
            request(document_ids[:5], max_tokens=40, ignore_eos=True), outcome.events.append
        )
        wait_for(lambda: len(outcome.tokens) > 1)
        seen.clear()
        long = run_one(engine, request(document_ids[:1500], max_tokens=1))
        assert finished(long) and first.outcome is not None
        assert len(seen) == 12
        assert len(set(seen)) == 12, "two chunks ran between two tokens"


def test_short_prompts_share_a_step(make_engine, document_ids):
    with make_engine(max_running=8) as engine:
        with engine._changed:  # nobody starts before all are queued
            outcomes = [Outcome() for _ in range(8)]
            for n, outcome in enumerate(outcomes):
                engine.submit(
                    request(document_ids[n : n + 20], max_tokens=3, ignore_eos=True), outcome.events.append
                )
        assert engine.wait_idle(60)
        assert engine.scheduler.counters.decode_steps <= 3


def test_what_can_never_be_served_is_refused_at_once(make_engine, document_ids):
    with make_engine(pages=4, max_running=1, max_waiting=0, max_model_len=2000) as engine:
        with pytest.raises(PromptTooLong, match="5 pages of the cache, which has 4"):
            engine.submit(request(document_ids[:300], max_tokens=20), print)
        with pytest.raises(PromptTooLong, match="at most 2000"):
            engine.submit(request(document_ids[:1990], max_tokens=20), print)
        with pytest.raises(InputError, match="no tokens"):
            engine.submit(request([], max_tokens=2), print)
        with pytest.raises(InputError, match="out of range"):
            engine.submit(request([5000], max_tokens=2), print)
        with pytest.raises(ConfigError):
            engine.submit(request([5], max_tokens=2, grammar="start: ("), print)
        outcome = Outcome()
        sequence = engine.submit(
            request(document_ids[:5], max_tokens=200, ignore_eos=True), outcome.events.append
        )
        with pytest.raises(QueueFull):
            engine.submit(request([5], max_tokens=2), print)
        engine.drain()
        with pytest.raises(Draining):
            engine.submit(request([5], max_tokens=2), print)
        engine.cancel(sequence)


def test_stopping_ends_every_request(make_engine, document_ids):
    outcomes = [Outcome() for _ in range(3)]
    with make_engine(max_running=1) as engine:
        for outcome in outcomes:
            engine.submit(request(document_ids[:5], max_tokens=2000, ignore_eos=True), outcome.events.append)
        stopper = threading.Thread(target=engine.stop)
        stopper.start()
        stopper.join(60)
        assert not engine.is_alive
    assert all(isinstance(outcome.end, RequestFailed) and outcome.end.cancelled for outcome in outcomes)


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
