"""The threads of torch's own OpenMP runtime, for the kernels to run on.

Between torch's operations its threads wait for the next one awake, for some milliseconds. Threads of our own
would have to take the cores from them at every step; so where torch's are found, they are used.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

import torch

__all__ = ["gomp_parallel"]


@lru_cache(maxsize=1)
def gomp_parallel() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch runs on (libgomp, or one that offers the
    same); None where there is none, or where it has not been tried: other systems than Linux."""
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return None
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for name in (None, str(library)):  # in the order in which torch's own references are bound
        try:
            function = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None
