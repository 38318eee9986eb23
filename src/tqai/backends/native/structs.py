"""The structures of `csrc/tqai.h`, and what a kernel needs to know of a page format."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqai.backends.native import trellis
from tqai.core import log_scale
from tqai.core.codec import Codec
from tqai.core.page import PageFormat
from tqai.core.rotation import hadamard_signs
from tqai.core.trellis import TrellisCodec

__all__ = [
    "AttendArgs",
    "Exact",
    "NativeFormat",
    "PageFormatStruct",
    "Source",
    "native_format",
    "pack_attend_args",
    "refusal",
]

SERVED_BITS = (2, 3, 4, 8)
MAX_HEAD_DIM = 256
LARGEST_LEVEL = 8191
SMALLEST_BYTE_LEVEL, LARGEST_BYTE_LEVEL = 32, 127  # of the largest level
BYTE_ERROR = 3e-4
"""Relative to a vector's length; the errors of 16-bit levels are of that size too."""
BLOCK_TOKENS = 512
"""Tokens whose weights share one step: BLOCK_TOKENS of csrc/isa.h."""
HADAMARD_ROUNDS = {"haar": 0, "hadamard": 1, "hadamard2": 2, "identity": 0}

_i32, _i64, _f32, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class CodecStruct(ctypes.Structure):
    """`tqai_codec`."""

    _fields_ = [
        ("head_dim", _i32),
        ("bits", _i32),
        ("rounds", _i32),
        ("scale_norm", _i32),
        ("signs", _pointer),
        ("matrix", _pointer),
        ("transposed", _pointer),
        ("centroids", _pointer),
        ("boundaries", _pointer),
        ("levels", _pointer),
        ("level_step", _f32),
        ("largest_sum", _f32),
        ("normaliser", _f32),
        ("byte_levels", _pointer),
        ("kind", _i32),
        ("tables", _pointer),
    ]


class PageFormatStruct(ctypes.Structure):
    """`tqai_page_format`."""

    _fields_ = [
        ("key", CodecStruct),
        ("value", CodecStruct),
        ("key_scales_at", _i64),
        ("value_codes_at", _i64),
        ("value_scales_at", _i64),
        ("page_bytes", _i64),
        ("bases_at", _i64),
        ("scale_levels", _pointer),
        ("scale_thresholds", _pointer),
    ]


class Exact(ctypes.Structure):
    """`tqai_exact`."""

    _fields_ = [
        ("keys", _pointer),
        ("values", _pointer),
        ("key_strides", _i64 * 3),
        ("value_strides", _i64 * 3),
        ("tokens", _i32),
        ("key_dtype", _i32),
        ("value_dtype", _i32),
        ("first_column", _i32),
    ]


class AttendArgs(ctypes.Structure):
    """`tqai_attend_args`."""

    _fields_ = [
        ("format", _pointer),
        ("addresses", _pointer),
        ("address_stride", _i64),
        ("counts", _pointer),
        ("query", _pointer),
        ("query_strides", _i64 * 3),
        ("out", _pointer),
        ("lse", _pointer),
        ("mask", _pointer),
        ("mask_strides", _i64 * 4),
        ("exact", Exact * 2),
        ("batch", _i32),
        ("kv_heads", _i32),
        ("group", _i32),
        ("new_tokens", _i32),
        ("pages", _i32),
        ("first_token", _i32),
        ("query_dtype", _i32),
        ("threads", _i32),
        ("causal", _i32),
        ("scaling", _f32),
        ("softcap", _f32),
    ]


pack_attend_args = Struct("@PPqPP3qPPP4q" + 2 * "PP3q3q4i" + "9i2f").pack_into
"""Writes all fields of an `AttendArgs` at once, those of its arrays one by one, null as 0."""


class Source(ctypes.Structure):
    """`tqai_source`."""

    _fields_ = [("data", _pointer), ("strides", _i64 * 3), ("dtype", _i32)]


@dataclass(frozen=True)
class NativeFormat:
    """A page format as the kernels know it.

    Attributes:
        struct: the C structure; `address` is where it lies.
        arrays: what its pointers point to, kept alive.
    """

    struct: PageFormatStruct
    address: int
    arrays: tuple[NDArray[Any], ...]


def refusal(codec: Codec) -> str | None:
    """Why the kernels do not serve a codec, in a few words; None if they do."""
    spec = codec.spec
    if isinstance(codec, TrellisCodec):
        return trellis.refusal(codec)
    if spec.name != "scalar":
        return f"codec {spec.name!r} has no native kernel"
    if spec.bits not in SERVED_BITS:
        return f"{spec.bits} bits: 2, 3, 4 and 8 are served"
    if spec.head_dim % 16 or spec.head_dim > MAX_HEAD_DIM or spec.head_dim // 16 % 4 == 3:
        return f"head_dim {spec.head_dim}: served are multiples of 16 up to 256 but for 64 n + 48"
    return None


@lru_cache(maxsize=64)
def native_format(page_format: PageFormat) -> NativeFormat:
    """The structure of a page format whose codecs are not refused; one per format and process."""
    arrays: list[NDArray[Any]] = []
    struct = PageFormatStruct(
        _codec_struct(page_format.key, page_format.key.spec.head_dim, arrays),
        _codec_struct(page_format.value, BLOCK_TOKENS, arrays),
        page_format.key_scales_at,
        page_format.value_codes_at,
        page_format.value_scales_at,
        page_format.page_bytes,
    )
    if page_format.scale_format == "log8":
        zero_and_nan = np.array([0.0, np.nan], dtype=np.float32)
        arrays += [np.concatenate([log_scale.LEVELS, zero_and_nan]), log_scale.THRESHOLDS]
        struct.bases_at = page_format.bases_at
        struct.scale_levels, struct.scale_thresholds = (array.ctypes.data for array in arrays[-2:])
    return NativeFormat(struct, ctypes.addressof(struct), tuple(arrays))


def integer_levels(codec: Codec, terms: int) -> tuple[NDArray[np.int16], float]:
    """Whole numbers `[2**bits]` that stand for the centroids, and the step that they count.

    An int32 must hold a sum of `terms` products, so finer levels mean coarser factors. Of all largest
    levels up to 8191 the one is taken whose rounding errors (of levels, by how often each occurs in a
    Gaussian, and of factors) are together the smallest, relative to the vector: 5e-5 to 3e-4.
    """
    rounded, steps, of_levels = _rounded(codec, np.arange(512, LARGEST_LEVEL + 1))
    of_factors = (terms * np.abs(rounded).max(-1) / 2.0**31) ** 2 / 12.0
    best = int(np.argmin(of_levels**2 + of_factors))
    return rounded[best].astype(np.int16), float(np.float32(steps[best]))


def byte_levels(codec: Codec) -> tuple[NDArray[np.int8], float] | None:
    """Whole numbers `[2**bits]` within +-127 that stand for the centroids to BYTE_ERROR of a vector's length,
    and the step that they count; None where there are none. Shipped codebooks of 2 to 4 bits have them
    (`tqai.core.grid`)."""
    rounded, steps, errors = _rounded(codec, np.arange(SMALLEST_BYTE_LEVEL, LARGEST_BYTE_LEVEL + 1))
    best = int(np.argmin(errors))
    if errors[best] > BYTE_ERROR:
        return None
    return rounded[best].astype(np.int8), float(np.float32(steps[best]))


def _rounded(codec: Codec, largest: NDArray[np.intp]) -> tuple[NDArray[np.float64], ...]:
    """For each largest level: levels `[n, 2**bits]`, steps `[n]`, and what rounding costs `[n]`, relative to
    the vector, every level as often as a Gaussian has it."""
    tables = codec.tables()
    centroids = tables["centroids"].astype(np.float64)
    inner = tables["boundaries"].astype(np.float64) * math.sqrt(codec.spec.head_dim)
    below = np.array([0.0, *(0.5 * (1.0 + math.erf(x / math.sqrt(2.0))) for x in inner), 1.0])
    share = np.diff(below)
    steps = np.abs(centroids).max() / largest
    rounded = np.rint(centroids / steps[:, None])
    squares = (share * (rounded * steps[:, None] - centroids) ** 2).sum(-1)
    return rounded, steps, np.sqrt(squares / (share * centroids**2).sum())


def _codec_struct(codec: Codec, terms: int, arrays: list[NDArray[Any]]) -> CodecStruct:
    def keep(array: NDArray[Any], dtype: type[np.generic]) -> int:
        kept = np.ascontiguousarray(array, dtype=dtype)
        arrays.append(kept)
        return int(kept.ctypes.data)

    spec = codec.spec
    rounds = HADAMARD_ROUNDS[spec.rotation]
    matrix = codec.rotation_matrix if rounds == 0 else np.zeros((1, 1))
    signs = hadamard_signs(spec.rotation, spec.head_dim, spec.seed) if rounds else np.zeros((1, 1))
    struct = CodecStruct(
        head_dim=spec.head_dim,
        bits=spec.bits,
        rounds=rounds,
        scale_norm=int(spec.scale == "norm"),
        signs=keep(signs, np.float32),
        matrix=keep(matrix, np.float32),
        transposed=keep(matrix.T, np.float32),
        normaliser=float(spec.head_dim) ** (-rounds / 2),
    )
    if isinstance(codec, TrellisCodec):
        trellis.fill(struct, codec, BLOCK_TOKENS, arrays)
    else:
        _fill_scalar(struct, codec, terms, keep)
    return struct


def _fill_scalar(
    struct: CodecStruct, codec: Codec, terms: int, keep: Callable[[NDArray[Any], type[np.generic]], int]
) -> None:
    tables = codec.tables()
    of_bytes = byte_levels(codec)
    levels, step = of_bytes or integer_levels(codec, terms)
    struct.centroids = keep(tables["centroids"], np.float32)
    struct.boundaries = keep(tables["boundaries"], np.float32)
    struct.levels = keep(levels, np.int16)
    struct.level_step = step
    struct.largest_sum = (2**31 - 1) / float(np.abs(levels).max()) - BLOCK_TOKENS
    struct.byte_levels = keep(levels, np.int8) if of_bytes else None
