"""Signals: the first one drains, the second one and the end of the grace period do not wait."""

import gc
import json
import signal
import socket
import threading
import time
from contextlib import contextmanager

import pytest
from engine_runs import Outcome, request

from tqai.server.api.app import create_app
from tqai.server.api.lifecycle import DrainingServer, config_for, is_loopback, serve
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
        assert server._drain.daemon, "else the process would wait for it"
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


@contextmanager
def running(server):
    """The server in a thread, with its handler of SIGTERM in place, and its address. What it sends stays
    in small buffers until it is read."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        before = signal.signal(signal.SIGTERM, server.handle_exit)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        try:
            thread.start()
            yield listener.getsockname(), thread
        finally:
            signal.signal(signal.SIGTERM, before)
            server.should_exit = server.force_exit = True
            thread.join(60)
            server.server_state.connections.clear()
            gc.collect()  # connections that were cut complain here, not in a later test


def stream(address, **body):
    """A connection on which a streamed answer begins to come; nothing of it is read on its own."""
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plain.settimeout(60)
    plain.connect(address)
    content = json.dumps(
        {"model": "demo", "prompt": "x", "stream": True, "ignore_eos": True, **body}
    ).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    plain.sendall(f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
    assert b" 200 " in plain.recv(100)
    return plain


def test_draining_waits_for_a_client_that_reads_slowly(make_engine):
    """All is computed, and much of it not yet sent: the client gets it to its end."""
    with make_engine() as engine:
        server = server_of(engine, 120)
        with running(server) as (address, thread), stream(address, max_tokens=60, logprobs=20, n=4) as plain:
            assert engine.wait_idle(60)
            signal.raise_signal(signal.SIGTERM)
            server._drain.join(60)
            assert server.should_exit and thread.is_alive()
            time.sleep(1.5)
            received = b"".join(iter(lambda: plain.recv(1 << 16), b""))
            assert len(received) > 60 * 1000 and b"data: [DONE]" in received
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore:unclosed")
def test_a_client_that_never_reads_does_not_keep_the_server_up(make_engine):
    with make_engine() as engine:
        server = server_of(engine, 120)
        server.config.timeout_graceful_shutdown = min(server.config.timeout_graceful_shutdown, 10) / 10
        with running(server) as (address, thread), stream(address, max_tokens=60, logprobs=20, n=4):
            assert engine.wait_idle(60)
            signal.raise_signal(signal.SIGTERM)
            thread.join(30)
            assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore:unclosed")
def test_two_signals_end_the_server_while_a_request_runs(make_engine):
    with make_engine() as engine:
        server = server_of(engine, 3600)
        with running(server) as (address, thread), stream(address, max_tokens=9000):
            signal.raise_signal(signal.SIGTERM)
            assert thread.is_alive() and not server.should_exit
            signal.raise_signal(signal.SIGTERM)
            thread.join(30)
            assert not thread.is_alive()
        assert engine.wait_idle(60), "its stream has gone, and the request with it"


def test_the_engine_is_stopped_however_serving_ends(make_engine, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(DrainingServer, "run", interrupted)
    with make_engine() as engine:
        with pytest.raises(KeyboardInterrupt):
            serve(create_app(engine, ApiSettings(model_name="demo")), engine, "127.0.0.1", 0, 1.0)
        assert not engine.is_alive


def test_loopback():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"))


def print_nothing(event):
    pass
