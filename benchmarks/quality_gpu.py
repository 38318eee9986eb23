"""What makes the study fast on a GPU, and changes no result.

* The torch form of the trellis codec encodes in thousands of small kernels; for the small batches of decoding
  they are recorded once as a CUDA graph and replayed.
* optimum-quanto compiles an extension at its first use, in every process; shifts in torch do the same.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 2048


def replay_trellis() -> None:
    """Make `TorchTrellisCodec` replay its search for paths on CUDA devices."""
    from tqai.backends.torch_ops.trellis import TorchTrellisCodec

    plain = TorchTrellisCodec._tail_biting_path
    recorded: dict[Any, tuple[Any, Tensor, Tensor] | None] = {}

    def replayed(self: Any, targets: Tensor) -> Tensor:
        if not targets.is_cuda or not 0 < targets.shape[0] <= MOST_ROWS:
            return plain(self, targets)
        key = (id(self), *targets.shape)
        if key not in recorded:
            try:
                recorded[key] = _record(lambda given: plain(self, given), targets)
            except RuntimeError as error:
                print(f"no replay of {key}: {error}", file=sys.stderr)
                recorded[key] = None
        record = recorded[key]
        if record is None:
            return plain(self, targets)
        graph, given, result = record
        given.copy_(targets)
        graph.replay()
        return result.clone()

    TorchTrellisCodec._tail_biting_path = replayed  # type: ignore[method-assign]


def _record(work: Any, example: Tensor) -> tuple[Any, Tensor, Tensor]:
    given = example.clone()
    expected = work(given)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work(given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work(given)
    graph.replay()
    if not torch.equal(result, expected):
        raise RuntimeError("a replayed search for paths found other paths")
    return graph, given, result


def quanto_without_compiler() -> None:
    """Let optimum-quanto unpack with its own function in torch instead of building an extension."""
    try:
        from optimum.quanto.library.extensions.cpp import ext as cpp
    except ImportError:
        return

    def unpack(packed: Tensor, bits: int) -> Tensor:
        return torch.cat([(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)])

    library = type("Library", (), {"unpack": staticmethod(unpack)})
    cpp._lib = library
    if torch.cuda.is_available():
        from optimum.quanto.library.extensions.cuda import ext as cuda

        cuda._lib = library
