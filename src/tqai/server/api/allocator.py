"""The C library's allocator, set up for a server that runs for weeks."""

from __future__ import annotations

import ctypes
import platform

__all__ = ["use_few_arenas"]

M_ARENA_MAX = -8
ARENAS = 2


def use_few_arenas() -> bool:
    """Have glibc allocate from 2 arenas, before threads have taken arenas of their own; False elsewhere.

    By default every new thread gets an arena, up to 8 per core, and keeps what it has freed. Prompts are
    tokenized in a pool of threads, so resident memory would creep up by some 100 MB that nobody uses.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS))
