"""An open-loop client: requests arrive when they arrive, however long the server takes."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

__all__ = ["Load", "Measured", "body_of", "run_load", "run_load_apart", "summary"]

SECONDS = 600.0


@dataclass(frozen=True)
class Load:
    """What arrives.

    Attributes:
        prompts: one request each, in order.
        output_tokens: of each request.
        rate: arrivals per second, exponential gaps; None: all at once; 0: each when the one before it has
            ended.
        seed: of the gaps.
    """

    prompts: list[Any]
    output_tokens: int
    rate: float | None
    seed: int = 0


@dataclass
class Measured:
    """Times of one request, seconds since its arrival was due."""

    text: str = ""
    first: float | None = None
    last: float | None = None
    pieces: int = 0
    status: int = 0
    due: float = 0.0
    gaps: list[float] = field(default_factory=list)


def run_load(
    url: str, load: Load, body_of: Callable[[Any, int], dict[str, Any]]
) -> tuple[float, list[Measured]]:
    """Seconds from the first arrival to the last token, and the times of each request."""
    return asyncio.run(_run(url, load, body_of))


async def _run(
    url: str, load: Load, body_of: Callable[[Any, int], dict[str, Any]]
) -> tuple[float, list[Measured]]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=SECONDS, limits=limits) as http:
        rng = random.Random(load.seed)
        start, due, tasks = time.perf_counter(), 0.0, []
        for prompt in load.prompts:
            await asyncio.sleep(max(start + due - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(_one(http, body_of(prompt, load.output_tokens), start + due)))
            if load.rate:
                due += rng.expovariate(load.rate)
            elif load.rate == 0:
                await tasks[-1]
                due = time.perf_counter() - start
        measured = await asyncio.gather(*tasks)
        return time.perf_counter() - start, measured


async def _one(http: httpx.AsyncClient, body: dict[str, Any], due: float) -> Measured:
    found = Measured(due=due)
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        found.status = answer.status_code
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            text = "".join(choice.get("text") or "" for choice in event.get("choices", []))
            if not text:
                continue
            now = time.perf_counter() - due
            if found.first is None:
                found.first = now
            else:
                found.gaps.append(now - (found.last or now))
            found.last, found.text, found.pieces = now, found.text + text, found.pieces + 1
    return found


def body_of(server: str, model: str, prompt: Any, tokens: int) -> dict[str, Any]:
    """A greedy request of so many tokens as this server wants it written."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "stream": True}
    if server.startswith("tqai"):
        return {**body, "ignore_eos": True}
    return {**body, "generation_config": json.dumps({"max_new_tokens": tokens, "min_new_tokens": tokens})}


def run_load_apart(
    url: str, server: str, model: str, load: Load, wrap: str = ""
) -> tuple[float, list[Measured]]:
    """As `run_load`, from a process of its own, which shares no interpreter with the server; started by the
    command `wrap`, where one is given."""
    asked = json.dumps({"url": url, "server": server, "model": model, "load": asdict(load)})
    # as a file: not every wrapping command hands its input on
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(asked)
        file.flush()
        command = [*wrap.split(), sys.executable, __file__, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the client failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return found["seconds"], [Measured(**one) for one in found["measured"]]


def _main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    load = Load(**asked["load"])
    seconds, measured = run_load(
        asked["url"], load, lambda prompt, tokens: body_of(asked["server"], asked["model"], prompt, tokens)
    )
    json.dump({"seconds": seconds, "measured": [asdict(one) for one in measured]}, sys.stdout)


def summary(seconds: float, measured: list[Measured], output_tokens: int) -> dict[str, Any]:
    """Requests and tokens per second; time to the first token and per later token, at p50 and p99."""
    first = [one.first for one in measured if one.first is not None]
    per_token = [
        (one.last - one.first) / (output_tokens - 1)
        for one in measured
        if one.first is not None and one.last is not None and output_tokens > 1
    ]
    gaps = [gap for one in measured for gap in one.gaps]
    return {
        "requests": len(measured),
        "failed": sum(one.status != 200 or one.first is None for one in measured),
        "seconds": seconds,
        "requests_per_second": len(measured) / seconds,
        "output_tokens_per_second": len(measured) * output_tokens / seconds,
        "first_token_ms": _at(first),
        "per_token_ms": _at(per_token),
        "largest_gap_ms": 1000 * max(gaps, default=0.0),
    }


def _at(values: list[float]) -> dict[str, float] | None:
    if len(values) < 2:
        return {"p50": 1000 * values[0], "p99": 1000 * values[0]} if values else None
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": 1000 * cuts[49], "p99": 1000 * cuts[98]}


if __name__ == "__main__":
    _main()
