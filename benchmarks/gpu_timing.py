"""Times of GPU work: medians of CUDA-graph replays and of eager calls, and where they were measured."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from provenance import provenance

__all__ = ["copy_bandwidth", "eager_us", "gpu_provenance", "graph_us"]

L2_ROTATION_BYTES = 300_000_000
"""Calls rotate among inputs of at least so many bytes in all, several times the L2 cache."""


def graph_us(calls: Sequence[Callable[[], Any]], replays: int = 15) -> float:
    """Microseconds per call: one CUDA graph of at least 8 calls, in turn over `calls`; median of replays."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    count = -(-8 // len(calls)) * len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / count)
    return statistics.median(times)


def eager_us(calls: Sequence[Callable[[], Any]], repeats: int = 7) -> float:
    """Microseconds per call, called from Python one after the other; median of the repeats."""
    count = -(-16 // len(calls)) * len(calls)
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6 / count)
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    """Bytes per second of a large copy on the device, counting bytes read and bytes written."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (graph_us([lambda: target.copy_(source)], replays=5) * 1e-6)


def gpu_provenance(commit: str | None) -> dict[str, Any]:
    """As `provenance`, with the GPU and its driver; `commit` where there is no git checkout."""
    found = provenance()
    found["commit"] = found["commit"] or commit
    found["gpu"] = torch.cuda.get_device_name()
    found["cuda"] = torch.version.cuda
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["driver"] = None
    return found
