"""An open-loop client: requests arrive when they arrive, however long the server takes."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

__all__ = ["Load", "Measured", "run_load", "summary"]

SECONDS = 600.0


@dataclass(frozen=True)
class Load:
    """What arrives.

    Attributes:
        prompts: one request each, in order.
        output_tokens: of each request.
        rate: arrivals per second, exponential gaps; None: all at once.
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
            due += 0.0 if load.rate is None else rng.expovariate(load.rate)
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
