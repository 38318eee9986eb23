"""Does the server stay what it was under hours of bad manners?

    python benchmarks/serve_soak.py                   30 minutes; writes the result
    python benchmarks/serve_soak.py --seconds 60      a short one, writes nothing

More clients than the server takes talk to it at once: they stream, wait, go away in the middle, send
bodies that are no requests, prompts that are too long and bodies that are too large. Fails (exit 1) on any
5xx, any broken connection, any page not given back at the end, or resident memory whose median in the last
fifth of the time is more than 16 MiB above that in the second fifth (the first one is warm-up).

`--core 0` keeps server and clients on one core. How much they did is told in tokens and in seconds of CPU
time: on a machine that others use, seconds alone say little. Every client error is recorded with its second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from provenance import ROOT, provenance

from tqai import demo

RESULT = ROOT / "benchmarks" / "results" / "serve_soak.json"
PORT = 8741
CLIENTS = 24
MAX_RUNNING, MAX_WAITING = 8, 8
MAX_BODY = 256 << 10
POOL = "5MiB"
"""Less than the running requests want at times: some wait for pages, and prefixes are evicted."""
GROWTH_BYTES = 16 << 20
LEAST_SECONDS = 600
"""Shorter runs are all warm-up: each of the server's threads allocates for the first time."""
PATIENCE_SECONDS = 1200.0
"""Longest silence that clients wait out: others may hold the machine."""
FROZEN_SECONDS = 4.0
"""A second that takes this long was spent frozen."""
MODEL = "tqai-demo"
BROKEN_OFF = "error in a stream"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--core", type=int, default=None, help="core for server and clients")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    command = [sys.executable, "-m", "tqai", "serve", "--port", str(PORT), "--max-kv-memory", POOL]
    command += [
        "--max-running",
        str(MAX_RUNNING),
        "--max-waiting",
        str(MAX_WAITING),
        "--max-body",
        str(MAX_BODY),
    ]
    server = subprocess.Popen(command)
    url = f"http://127.0.0.1:{PORT}"
    try:
        wait_for(url)
        begun = cpu_seconds(server.pid)
        result = asyncio.run(soak(url, options.seconds, server.pid))
        result["server_cpu_seconds"] = cpu_seconds(server.pid) - begun
        server.send_signal(signal.SIGTERM)
        result["exit_code"] = server.wait(120)
    finally:
        server.kill()
    result = {"what": __doc__.partition("\n")[0], "provenance": provenance(), **result}
    result["faults"] = faults(result)
    print(json.dumps(result, indent=1))
    out = options.out or (RESULT if options.seconds >= 1800 else None)
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["faults"] else 0


def faults(result: dict[str, Any]) -> list[str]:
    """What went wrong, in words."""
    found = [f"{n} answers {status}" for status, n in result["statuses"].items() if status.startswith("5")]
    end = result["end"]
    if end["request_pages"] or end["used_pages"] != end["cached_pages"] or end["running"] or end["waiting"]:
        found.append(f"not empty at the end: {end}")
    found += [f"{error['action']}: {error['error']}" for error in result["client_errors"]]
    found += [f"{n} times {status}" for status, n in result["statuses"].items() if status == BROKEN_OFF]
    if result["seconds"] >= LEAST_SECONDS and result["grown_bytes"] > GROWTH_BYTES:
        found.append(f"resident memory grew by {result['grown_bytes']} bytes")
    if result.get("exit_code", 0) != 0:
        found.append(f"exit code {result['exit_code']}")
    return found


async def soak(
    url: str, seconds: float, pid: int | None, clients: int = CLIENTS, seed: int = 0
) -> dict[str, Any]:
    """Talk to the server at `url` for so long; `pid` is the process whose memory is watched."""
    text = (demo.model_path().parent / "document.txt").read_text("utf-8")
    seen: Counter[str] = Counter()
    done: Counter[str] = Counter()
    broken: list[dict[str, Any]] = []
    memory: list[tuple[float, int]] = []
    frozen: list[float] = []
    started = time.monotonic()
    stop = started + seconds

    async def watch() -> None:
        before = started
        while pid is not None and before < stop:
            memory.append((before - started, resident_bytes(pid)))
            await asyncio.sleep(1)
            now = time.monotonic()
            if now - before > FROZEN_SECONDS:
                frozen.append(now - before)
            before = now

    async with httpx.AsyncClient(
        base_url=url, timeout=PATIENCE_SECONDS, limits=httpx.Limits(max_connections=None)
    ) as http:
        workers = [
            client(http, random.Random(seed * 1000 + n), text, started, stop, seen, done, broken)
            for n in range(clients)
        ]
        await asyncio.gather(watch(), *workers)
        end: dict[str, Any] = {}
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            end = (await http.get("/status.json")).json()
            if not end["running"] and not end["waiting"]:
                break
            await asyncio.sleep(0.1)
    settled, last = (
        statistics.median([size for at, size in memory if low <= at / seconds < low + 0.2] or [0])
        for low in (0.2, 0.8)
    )
    return {
        "seconds": seconds,
        "seconds_with_drain": time.monotonic() - started,
        "frozen_seconds": sum(frozen),
        "clients": clients,
        "generated_tokens_per_second": end["counters"]["generated_tokens"] / seconds,
        "requests": sum(seen.values()),
        "statuses": dict(sorted(seen.items())),
        "actions": dict(sorted(done.items())),
        "client_errors": broken,
        "settled_bytes": settled,
        "grown_bytes": last - settled,
        "grown_bytes_per_hour": trend([item for item in memory if item[0] >= 0.2 * seconds]) * 3600,
        "memory_bytes": [size for _, size in memory[:: max(len(memory) // 60, 1)]],
        "end": {
            name: end[name]
            for name in (
                "running",
                "waiting",
                "request_pages",
                "used_pages",
                "cached_pages",
                "pages",
                "counters",
            )
        },
    }


async def client(
    http: httpx.AsyncClient,
    rng: random.Random,
    text: str,
    started: float,
    stop: float,
    seen: Counter[str],
    done: Counter[str],
    broken: list[dict[str, Any]],
) -> None:
    """One client: one action after the other until `stop`. Nothing may break a connection or a stream."""
    actions = ("stream", "whole", "leave", "leave whole", "bad", "too long", "too large", "chat")
    while time.monotonic() < stop:
        action = rng.choices(actions, weights=(5, 4, 4, 2, 2, 1, 1, 2))[0]
        done[action] += 1
        try:
            status = await act(http, rng, text, action)
        except httpx.TransportError as error:
            status = type(error).__name__
            reason = f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else str(error)
            broken.append(
                {"second": time.monotonic() - started, "action": action, "error": status, "reason": reason}
            )
        seen[str(status)] += 1
        if status == 429:
            await asyncio.sleep(0.5 + rng.random())


async def act(http: httpx.AsyncClient, rng: random.Random, text: str, action: str) -> int | str:
    start = rng.choice((0, 4000, rng.randrange(len(text) - 20_000)))
    prompt = text[start : start + rng.choice((20, 300, 1500, 4000, 9000))]
    body: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": rng.choice((1, 8, 40, 120))}
    body |= rng.choice(
        ({"temperature": 0}, {"seed": rng.randrange(100)}, {"top_p": 0.8, "n": 2}, {"logprobs": 2})
    )
    path = "/v1/completions"
    if action == "bad":
        kind = rng.randrange(4)
        if kind == 0:
            return (await http.post(path, content=rng.randbytes(200))).status_code
        wrong = ({"prompt": 7}, {"temperature": -1}, {"nonsense": 1})[kind - 1]
        return (await http.post(path, json={**body, **wrong})).status_code
    if action == "too long":
        return (await http.post(path, json={**body, "prompt": text[:80_000]})).status_code
    if action == "too large":
        return (await http.post(path, content=b"x" * (MAX_BODY + 10))).status_code
    if action == "chat":
        messages = [{"role": "user", "content": prompt}]
        chat = {"model": MODEL, "messages": messages, "max_tokens": body["max_tokens"]}
        return (await http.post("/v1/chat/completions", json=chat)).status_code
    if action == "whole":
        return (await http.post(path, json=body)).status_code
    if action == "leave whole":
        try:
            answer = await asyncio.wait_for(http.post(path, json={**body, "max_tokens": 400}), rng.random())
        except asyncio.TimeoutError:
            return "left"
        return answer.status_code
    body |= {"stream": True, "max_tokens": 400 if action == "leave" else body["max_tokens"]}
    async with http.stream("POST", path, json=body) as answer:
        left = rng.randrange(1, 20)
        async for line in answer.aiter_lines():
            left -= bool(line)
            if action == "leave" and left <= 0:
                return "left"
            if line.startswith('data: {"error"'):
                return BROKEN_OFF
        return answer.status_code


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * 4096


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def trend(memory: list[tuple[float, int]]) -> float:
    """Bytes per second, by least squares; 0 with fewer than two samples."""
    if len(memory) < 2:
        return 0.0
    times, sizes = zip(*memory, strict=True)
    return statistics.linear_regression(times, sizes).slope


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
