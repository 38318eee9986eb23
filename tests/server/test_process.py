"""`tqai serve` as a process: killed, started again, drained."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from tqai.cli.serve import EMBEDDED_NAME

SECONDS = 180


def start(port, *options):
    command = [
        sys.executable,
        "-W",
        "default",
        "-m",
        "tqai",
        "serve",
        "--port",
        str(port),
        "--max-kv-memory",
        "50MB",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQAI_API_KEYS": "from-environment"}
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + SECONDS
    while True:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return process
        except httpx.TransportError:
            time.sleep(0.1)


def stream(http, max_tokens):
    body = {
        "model": EMBEDDED_NAME,
        "messages": [{"role": "user", "content": "The import statement"}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    return http.stream("POST", "/v1/chat/completions", json=body)


def test_killed_restarted_and_drained():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    headers = {"Authorization": "Bearer from-environment"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=SECONDS) as http:
        process = start(port)
        with stream(http, 3000) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.kill()
            with pytest.raises(httpx.TransportError):
                list(lines)
        process.wait(SECONDS)
        process.stderr.close()

        process = start(port)
        try:
            with stream(http, 60) as answer:
                assert answer.status_code == 200
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                with httpx.Client(base_url=http.base_url, headers=headers, timeout=SECONDS) as other:
                    while other.get("/health").status_code == 200:
                        time.sleep(0.005)
                    refused = other.post("/v1/completions", json={"model": EMBEDDED_NAME, "prompt": "x"})
                    assert refused.status_code == 503 and "Retry-After" in refused.headers
                events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()
        said = process.stderr.read()
        process.stderr.close()
        assert "K4/V2" in said and "draining" in said and "Traceback" not in said
