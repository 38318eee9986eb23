"""Tables of the encoding with tensor cores (`encode_mma.cuh`): Hadamard factors as operands, and buckets.

R x = H D_2 H D_1 x / d, H over the bits of the coordinate's number. Each round is one product over some
bits, with the signs and 1 / d in the factor, and butterflies over the others. A factor is what lane 4 g + c
of a warp holds of B of `mma`:

    round 1   m16n8k16, bits 0 to 3; of [u][lane][j][2]:   rows 2 c, 2 c + 1 and then 2 c + 8, 2 c + 9 of
              column 8 j + g, two-byte numbers, D_1 of coordinate 16 u + row
    round 2   m16n8k8, bits 1 to 3;  of [u][lane][i][2]:   rows c and then c + 4 of column g, TF32, D_2 / d of
              coordinate 16 u + 2 row + i; bits 0, 1, 2 of the column are bits 1, 2, 3 of the result's number
              for keys, 3, 1, 2 for values

then the buckets of `bucket_cells` and the magnitudes, all 32-bit words.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tqai.core.codec import Codec
from tqai.core.page import PageFormat
from tqai.core.rotation import hadamard_signs

__all__ = ["CELLS", "bucket_cells", "encode_words", "has_tensor_encoding", "tables_bytes"]

HEAD_DIMS = (64, 128)
BITS = (2, 3, 4)
DTYPES = ("float16", "bfloat16")
CELLS = 144
"""Room for buckets."""
LEVELS = 16
UNIT = 16
WARPS = 4
STEPS = 4


def has_tensor_encoding(page_format: PageFormat, dtype: str) -> bool:
    """True if both sides can be encoded by `encode_mma.cu`: two Hadamard rounds, 2 to 4 bits, head_dim 64 or
    128, vectors of two bytes a number."""
    return dtype in DTYPES and all(
        codec.spec.name == "scalar"
        and codec.spec.rotation == "hadamard2"
        and codec.spec.head_dim in HEAD_DIMS
        and codec.spec.bits in BITS
        for codec in (page_format.key, page_format.value)
    )


def tables_bytes(dim: int, values: bool) -> int:
    """Dynamic shared memory of a block, bytes: tables, two steps of vectors a warp, codes of keys."""
    units = dim // UNIT
    words = 2 * units * 128 + 2 * CELLS + LEVELS + WARPS * 2 * 16 * dim // 2
    return 4 * (words + (0 if values else WARPS * STEPS * units * 32))


def encode_words(codec: Codec, dtype: str, values: bool) -> NDArray[np.uint32]:
    """The tables of one side, in order."""
    first, second = _first_factor(codec), _second_factor(codec, values)
    halves: NDArray[np.uint32]
    if dtype == "float16":
        halves = first.astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        halves = first.view(np.uint32) >> np.uint32(16)
    cells, _ = bucket_cells(codec)
    magnitudes = np.zeros(LEVELS, dtype=np.float32)
    centroids = codec.tables()["centroids"]
    magnitudes[: len(centroids) // 2] = centroids[len(centroids) // 2 :]
    return np.concatenate(
        [
            (halves[..., 0] | halves[..., 1] << 16).reshape(-1),
            second.view(np.uint32).reshape(-1),
            cells.reshape(-1),
            magnitudes.view(np.uint32),
        ]
    )


def bucket_cells(codec: Codec) -> tuple[NDArray[np.uint32], float]:
    """uint32 `[CELLS, 2]` and buckets per unit, a power of two.

    Bucket k is for magnitudes of a unit vector's coordinate from k / buckets on. It has the one boundary in
    it (else infinity), as float32 bits, and 4 times the number of boundaries below.
    """
    boundaries = codec.tables()["boundaries"]
    positive = boundaries[boundaries > 0].astype(np.float64)
    buckets = 1
    while len(np.unique(np.floor(positive * buckets))) < len(positive):
        buckets *= 2
    # a coordinate of a unit vector may be a little more than 1
    if buckets + 2 > CELLS:
        raise ValueError(f"boundaries of {codec.spec} need {buckets} buckets: there is room for {CELLS - 2}")
    cells = np.empty((CELLS, 2), dtype=np.uint32)
    places = np.floor(positive * buckets).astype(np.int64)
    cells[:, 0] = np.float32(np.inf).view(np.uint32)
    cells[places, 0] = positive.astype(np.float32).view(np.uint32)
    cells[:, 1] = 4 * np.searchsorted(places, np.arange(CELLS), side="left").astype(np.uint32)
    return cells, float(buckets)


def _first_factor(codec: Codec) -> NDArray[np.float32]:
    """`[unit, lane, j, 2 (row + 8), 2 (neighbouring rows)]`."""
    signs = hadamard_signs(codec.spec.rotation, codec.spec.head_dim, codec.spec.seed)[0]
    unit, lane, j, further, odd = np.indices((codec.spec.head_dim // UNIT, 32, 2, 2, 2))
    row = 2 * (lane % 4) + odd + 8 * further
    return (_parity(row & (8 * j + lane // 4)) * signs[UNIT * unit + row]).astype(np.float32)


def _second_factor(codec: Codec, values: bool) -> NDArray[np.float32]:
    """`[unit, lane, i, 2 (row + 4)]`."""
    dim = codec.spec.head_dim
    signs = hadamard_signs(codec.spec.rotation, dim, codec.spec.seed)[1]
    unit, lane, i, further = np.indices((dim // UNIT, 32, 2, 2))
    row = lane % 4 + 4 * further
    column = lane // 4
    if values:
        column = column >> 1 | (column & 1) << 2
    return (_parity(row & column) * signs[UNIT * unit + 2 * row + i] / dim).astype(np.float32)


def _parity(bits: NDArray[np.intp]) -> NDArray[np.intp]:
    """1 where an even number of the low four bits is set, else -1."""
    return 1 - 2 * ((bits ^ bits >> 1 ^ bits >> 2 ^ bits >> 3) & 1)
