"""Does the server stay what it was under hours of bad manners?

    python benchmarks/serve_soak.py                   30 minutes; writes the result
    python benchmarks/serve_soak.py --seconds 60      a short one, writes nothing

More clients than the server takes talk to it at once: they stream, wait, go away in the middle, send
bodies that are no requests, prompts that are too long and bodies that are too large. Fails (exit 1) on any
5xx, any page not given back at the end, or resident memory that grows by more than 5 % and 16 MiB after
the first fifth of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
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
GROWTH_SHARE, GROWTH_BYTES = 0.05, 16 << 20
LEAST_SECONDS = 600
"""Shorter runs are all warm-up: each of the server's threads allocates for the first time."""
MODEL = "tqai-demo"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    command = [sys.executable, "-m", "tqai", "serve", "--port", str(PORT), "--max-kv-memory", "12MiB"]
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
        result = asyncio.run(soak(url, options.seconds, server.pid))
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
    grown, settled = result["grown_bytes"], result["settled_bytes"]
    warmed_up = result["seconds"] >= LEAST_SECONDS
    if warmed_up and grown > max(GROWTH_BYTES, GROWTH_SHARE * settled):
        found.append(f"resident memory grew by {grown} bytes")
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
    memory: list[int] = []
    stop = time.monotonic() + seconds

    async def watch() -> None:
        while pid is not None and time.monotonic() < stop:
            memory.append(resident_bytes(pid))
            await asyncio.sleep(1)

    async with httpx.AsyncClient(
        base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)
    ) as http:
        workers = [
            client(http, random.Random(seed * 1000 + n), text, stop, seen, done) for n in range(clients)
        ]
        await asyncio.gather(watch(), *workers)
        end: dict[str, Any] = {}
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            end = (await http.get("/status.json")).json()
            if not end["running"] and not end["waiting"]:
                break
            await asyncio.sleep(0.1)
    settled = max(memory[: len(memory) // 5 + 1], default=0)
    return {
        "seconds": seconds,
        "clients": clients,
        "requests": sum(seen.values()),
        "statuses": dict(sorted(seen.items())),
        "actions": dict(sorted(done.items())),
        "settled_bytes": settled,
        "grown_bytes": max(memory[-len(memory) // 5 :], default=0) - settled,
        "memory_bytes": memory[:: max(len(memory) // 60, 1)],
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
    stop: float,
    seen: Counter[str],
    done: Counter[str],
) -> None:
    """One client: one action after the other until `stop`."""
    actions = ("stream", "whole", "leave", "leave whole", "bad", "too long", "too large", "chat")
    while time.monotonic() < stop:
        action = rng.choices(actions, weights=(5, 4, 4, 2, 2, 1, 1, 2))[0]
        done[action] += 1
        try:
            status = await act(http, rng, text, action)
        except httpx.TransportError as error:
            status = type(error).__name__
        seen[str(status)] += 1
        if status == 429:
            await asyncio.sleep(rng.random())


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
            await asyncio.wait_for(http.post(path, json={**body, "max_tokens": 400}), rng.random())
        except asyncio.TimeoutError:
            return "left"
        return "answered"
    body |= {"stream": True, "max_tokens": 400 if action == "leave" else body["max_tokens"]}
    async with http.stream("POST", path, json=body) as answer:
        left = rng.randrange(1, 20)
        async for line in answer.aiter_lines():
            left -= bool(line)
            if action == "leave" and left <= 0:
                return "left"
            if line.startswith('data: {"error"'):
                return "error in a stream"
        return answer.status_code


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * 4096


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
