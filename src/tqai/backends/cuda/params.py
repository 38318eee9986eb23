"""`Params` of params.cuh as the host packs it: what changes from call to call, then the rest."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from struct import Struct
from typing import Any

from tqai.backends.cuda.plan import division

__all__ = ["CHANGING", "Sizes", "divisor"]

CHANGING = Struct("=QqQQ Q3q QQQQ 3q3q3q3q Q4q QQQQ iiif")
"""Addresses and strides, in order: addresses, address_stride, page_counts, recent_counts; query with strides;
keys and values of recent tokens and of sinks, then their strides in the same order; mask with strides;
partial, counters, out, lse; recent, first_token, early, scaling."""


class _Levels(ctypes.Structure):
    _fields_ = [("tables", ctypes.c_uint32 * 4), ("coefficients", ctypes.c_float * 2)]


class _Divisor(ctypes.Structure):
    _fields_ = [("factor", ctypes.c_uint32), ("shift", ctypes.c_uint32)]


@lru_cache(maxsize=1024)
def divisor(number: int) -> _Divisor:
    """What the kernels divide by `number` with."""
    return _Divisor(*division(number))


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class Sizes(ctypes.Structure):
    """What depends on sizes and codecs alone; follows `CHANGING`."""

    _fields_ = [
        *_fields(ctypes.c_int32, "pages", "sinks", "batch", "kv_heads", "group", "new_tokens", "col_groups"),
        *_fields(ctypes.c_float, "softcap"),
        *_fields(_Divisor, "by_items", "by_heads", "by_col_groups", "by_group", "by_grid"),
        *_fields(ctypes.c_uint64, "plan_k", "plan_v", "lut_k", "lut_v"),
        *_fields(_Levels, "levels_k", "levels_v"),
        *_fields(ctypes.c_int32, "times256"),
    ]


assert CHANGING.size % 8 == 0
