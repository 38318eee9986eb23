"""The most memory that a piece of work took above what was held before it began."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from types import TracebackType

import torch

__all__ = ["PeakMemory"]

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


class PeakMemory:
    """A context whose `peak_bytes` afterwards says how much more memory was in use at the worst moment.

        with PeakMemory(model.device) as memory:
            work()
        print(memory.peak_bytes)

    On a CUDA device it is torch's allocator that is asked, without its idle reserve. On a CPU it is the
    process's resident memory, whose high-water mark Linux resets on request; elsewhere `peak_bytes` is
    None. Memory that nothing holds any more is given back before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        give_back(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: int | None = torch.cuda.memory_allocated(self.device)
        else:
            self._before = _resident_bytes("VmRSS") if _reset_high_water() else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _resident_bytes("VmHWM")
        if peak is not None and self._before is not None:
            self.peak_bytes = max(peak - self._before, 0)


def give_back(device: torch.device) -> None:
    """Collect garbage and return free memory to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # another C library
        return


def _reset_high_water() -> bool:
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _resident_bytes(name: str) -> int | None:
    """VmRSS (now) or VmHWM (the most since the reset) of this process."""
    try:
        for line in STATUS.read_text("utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
