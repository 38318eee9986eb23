"""Times of GPU work: medians of CUDA-graph replays and of eager calls, and where they were measured."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from provenance import provenance

__all__ = ["copy_bandwidth", "eager_us", "gpu_provenance", "graph_us", "read_rate"]

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
    """Bytes per second of a large copy by a kernel, counting bytes read and bytes written."""
    source = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    # Not copy_: captured in a graph that is a memcpy node, which is a third slower than a kernel.
    return 8 * source.numel() / (graph_us([lambda: torch.neg(source, out=target)], replays=5) * 1e-6)


def read_rate() -> float:
    """Bytes per second at which torch's decode attention reads 4.3 GB of bfloat16 keys and values.

    A kernel that reads much and writes next to nothing: the memory rate to hold decode kernels against.
    """
    keys, values = (torch.randn(8, 8, 131072, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(8, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    attend = partial(F.scaled_dot_product_attention, query, keys, values, enable_gqa=True)
    return 4 * keys.numel() / (graph_us([attend], replays=5) * 1e-6)


def gpu_provenance(commit: str | None) -> dict[str, Any]:
    """As `provenance`, with the GPU and its driver; `commit` where the checkout cannot be asked."""
    found = provenance()
    if commit is not None:
        found["commit"], found["changed_files"] = commit, None
    found["gpu"] = torch.cuda.get_device_name()
    found["cuda"] = torch.version.cuda
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        found["driver"] = shown.split()[0]  # one line for each GPU
    except (OSError, IndexError, subprocess.CalledProcessError):
        found["driver"] = None
    return found
