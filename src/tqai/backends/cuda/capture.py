"""A step of the device as a CUDA graph, warmed up and captured on one stream that all graphs share.

cuBLAS keeps a workspace (32 MiB on an H100 or H200, 8 MiB on others) for every stream on which it has
multiplied matrices, as long as the process lives. With a stream of its own for each warming up, every graph
would add one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["capture"]

Result = TypeVar("Result")

_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def capture(
    step: Callable[[], Result],
    device: torch.device,
    warm_ups: int = 2,
    after_warm_up: Callable[[], None] | None = None,
    pool: Any = None,
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """`step` as a graph, and what it returned while captured: buffers that every replay overwrites.

    Args:
        step: launches work on the current stream of `device`, and asks the device nothing.
        warm_ups: how often `step` runs before it is captured, so that kernels are compiled and plans made.
        after_warm_up: called after each of these runs, on their stream, to undo what they have changed.
        pool: of an earlier graph (`CUDAGraph.pool()`), whose memory this one may use as well.

    Graphs made here share cuBLAS's workspace: replay them one after the other, not side by side.

    Raises:
        RuntimeError: `step` does what cannot be captured, or raises it.
    """
    stream = _STREAMS.get(device)
    if stream is None:
        stream = _STREAMS[device] = torch.cuda.Stream(device)
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            step()
            if after_warm_up is not None:
                after_warm_up()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        result = step()
    return graph, result
