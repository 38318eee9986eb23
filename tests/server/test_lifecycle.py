"""Signals: the first one drains, the second one and the end of the grace period do not wait."""

import signal

import pytest
from engine_runs import Outcome, request

from tqai.server.api.app import create_app
from tqai.server.api.lifecycle import DrainingServer, config_for, is_loopback
from tqai.server.api.settings import ApiSettings
from tqai.server.engine.engine import Draining
from tqai.server.engine.sequence import RequestFailed


def server_of(engine, grace_seconds):
    app = create_app(engine, ApiSettings(model_name="demo"))
    return DrainingServer(config_for(app, "127.0.0.1", 0), engine, grace_seconds)


def test_the_first_signal_waits_for_what_is_in_flight_and_refuses_the_rest(make_engine, document_ids):
    with make_engine() as engine:
        server, outcome = server_of(engine, 120), Outcome()
        sequence = engine.submit(
            request(document_ids[:5], max_tokens=4000, ignore_eos=True), outcome.events.append
        )
        server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(Draining):
            engine.submit(request([5], max_tokens=1), print)
        assert not server.should_exit and sequence.outcome is None
        engine.cancel(sequence)
        server._drain.join(60)
        assert server.should_exit and not server.force_exit


def test_the_second_signal_ends_at_once(make_engine, document_ids):
    with make_engine() as engine:
        server = server_of(engine, 3600)
        sequence = engine.submit(request(document_ids[:5], max_tokens=4000, ignore_eos=True), print_nothing)
        for _ in range(2):
            server.handle_exit(signal.SIGTERM, None)
        assert server.should_exit and server.force_exit
        engine.cancel(sequence)
        server._drain.join(60)


def test_the_end_of_the_grace_period_fails_what_is_left(make_engine, document_ids, caplog):
    with make_engine() as engine:
        server, outcome = server_of(engine, 0.05), Outcome()
        engine.submit(request(document_ids[:5], max_tokens=9000, ignore_eos=True), outcome.events.append)
        server.handle_exit(signal.SIGTERM, None)
        server._drain.join(60)
        assert server.should_exit and isinstance(outcome.end, RequestFailed) and outcome.end.cancelled
        assert "still in flight after 0.05 s" in caplog.text


def test_loopback():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"))


def print_nothing(event):
    pass
