"""What the kernels of codes take: the names of dtypes, and the structures of codes.cuh."""

from __future__ import annotations

import ctypes

import torch

__all__ = ["DTYPE_NAMES", "OUT_CODES", "CodeParams"]

DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
OUT_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


class _Side(ctypes.Structure):
    """`Side` of codes.cuh."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("source", "out", "plan", "levels", "cells")),
        ("strides", ctypes.c_int64 * 3),
        ("bucket_scale", ctypes.c_float),
        ("buckets", ctypes.c_int32),
        ("least_squares", ctypes.c_int32),
    ]


class CodeParams(ctypes.Structure):
    """`CodeParams` of codes.cuh."""

    _fields_ = [
        ("pages", ctypes.c_uint64),
        ("side", _Side * 2),
        ("heads", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("back", ctypes.c_int32),
    ]
