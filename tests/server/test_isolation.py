"""Requests that go wrong, go away or are cancelled leave the others alone and their pages behind."""

import threading
import time

import httpx
import pytest
import torch
from engine_runs import Outcome, finished, request, run, run_one
from serving import MODEL, serving

from tqai.errors import ConfigError, InputError
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
        engine.store.pool.release(shared)
        assert len(shared) == 4, "only the chunk before the poisoned one, which a good request computed"
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


def test_cancelled_requests_give_their_pages_back_within_a_step(make_engine, document_ids):
    with make_engine(max_running=3) as engine:
        outcomes = [Outcome() for _ in range(5)]
        sequences = [
            engine.submit(request(document_ids[n : n + 200], max_tokens=4000), outcome.events.append)
            for n, outcome in enumerate(outcomes)
        ]
        wait_for(lambda: all(len(outcome.tokens) > 2 for outcome in outcomes[:3]))
        engine.cancel(sequences[4])  # waits
        engine.cancel(sequences[1])  # runs
        wait_for(lambda: sequences[1].outcome is not None)
        steps = engine.scheduler.counters.decode_steps
        assert sequences[1].pages == [] and isinstance(outcomes[1].end, RequestFailed)
        assert outcomes[1].end.cancelled
        wait_for(lambda: len(outcomes[3].tokens) > 0)
        assert engine.scheduler.counters.decode_steps >= steps
        assert not outcomes[4].tokens
        for sequence in sequences:
            engine.cancel(sequence)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels_its_request(make_engine, stream):
    with make_engine() as engine, serving(engine) as served:
        body = {
            "model": MODEL,
            "prompt": "x " * 100,
            "max_tokens": 5000,
            "stream": stream,
            "ignore_eos": True,
        }
        if stream:
            with served.http.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()  # kept: the stream is closed, and the request cancelled, with it
                next(lines)
                assert engine.figures().request_pages > 0
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{served.url}/v1/completions", json=body, timeout=1.0)
        wait_for(lambda: engine.figures().running == 0)
        assert engine.figures().request_pages == 0
        assert engine.scheduler.counters.generated_tokens < 4000
        assert served.post("/v1/completions", prompt="x", max_tokens=1).status_code == 200


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
