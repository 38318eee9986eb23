"""Memory in which the blocks of a launch meet. What a launch finds in it, it leaves in it.

Launches of one stream follow one another and share a buffer of each kind. So do those that are captured into
one graph on one stream; theirs lies in the graph's own memory and is filled by the graph when it is replayed,
so that graphs may be replayed at the same time.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tqai.backends.cuda.driver import entry

__all__ = ["ABSENT", "COUNTERS", "workspace"]

COUNTERS = 0
"""Kind of buffer, and what its words hold between launches: who has arrived (`is_last` of merge.cuh)."""
ABSENT = -1
"""Partial results that are waited for (`AwaitedParts` of merge.cuh)."""
LEAST_WORDS = 1 << 17
KEPT_CAPTURES = 16

_OF_STREAM: dict[tuple[torch.device, int, int], Tensor] = {}
_OF_CAPTURE: dict[tuple[int, int, int], Tensor] = {}
_OUTGROWN: list[Tensor] = []
"""Never freed: work that is under way may use them."""


def workspace(device: torch.device, stream: int, kind: int, words: int) -> int:
    """Address of at least so many 32-bit words, each `kind`, for a launch on `stream`, the current one."""
    if torch.cuda.is_current_stream_capturing():
        return _captured(device, stream, kind, words)
    found = _OF_STREAM.get((device, stream, kind))
    if found is None or found.numel() < words:
        if found is not None:
            _OUTGROWN.append(found)
        found = torch.full((max(words, LEAST_WORDS),), kind, dtype=torch.int32, device=device)
        _OF_STREAM[device, stream, kind] = found
    return found.data_ptr()


def _captured(device: torch.device, stream: int, kind: int, words: int) -> int:
    """The tensor is held until later captures have taken its place: while a capture lasts, nothing else may
    get its memory, and afterwards the graph keeps it."""
    key = (_capture_id(stream), stream, kind)
    found = _OF_CAPTURE.get(key)
    if found is None or found.numel() < words:
        if found is not None:
            _OF_CAPTURE[key[0], stream, id(found)] = found
        while len(_OF_CAPTURE) >= KEPT_CAPTURES and (oldest := next(iter(_OF_CAPTURE)))[0] != key[0]:
            del _OF_CAPTURE[oldest]
        found = torch.full((words,), kind, dtype=torch.int32, device=device)
        _OF_CAPTURE[key] = found
    return found.data_ptr()


def _capture_id(stream: int) -> int:
    status, number = ctypes.c_int(0), ctypes.c_uint64(0)
    query = entry("cuStreamGetCaptureInfo_v2", 6)
    query(stream, ctypes.addressof(status), ctypes.addressof(number), None, None, None)
    return number.value
