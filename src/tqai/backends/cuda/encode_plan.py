"""Tables of the encoding with tensor cores (`encode_mma.cuh`, `encode_wgmma.cuh`): rotation and levels.

R = H D_2 H D_1 / d has the elements w[i ^ k] D_1[k] with w = H D_2 / d, because the product of two characters
of the numbers' bits is the character of their exclusive or. The tables, all 32-bit words:

    of "mma"
    factors      [j][word][lane], two-byte numbers: lane 4 n + c has of word v = 2 x + a halves e = 0, 1:
                 w[(16 x + 2 (a ^ j) + 4 c + e) ^ column], column n of the product being, by its bits 0, 1, 2,
                 bits 0, 2, 3 of a coordinate's number for keys, and 3, 0, 2 for values
    signs        [c][word]: the top bit of each half where D_1 of coordinate 16 x + 4 c + 2 a + e is negative

    of "wgmma"
    R            two-byte numbers [step][block of 8 results][8 slots][result][slot], as in `encode_wgmma.cuh`

    of both
    boundaries   of bucket k, the one boundary in it (else 2)
    levels       the level below the boundary of bucket k, and so above that of bucket k - 1; its low four
                 bits are the nibble that is stored for it

A coordinate t of a unit vector is looked up at `per_unit` t + 1/2, in one of 32 buckets from 0 to 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tqai.core.codec import Codec
from tqai.core.page import PageFormat
from tqai.core.rotation import fast_hadamard, hadamard_signs

__all__ = [
    "BUCKETS",
    "CELLS",
    "FORMS",
    "WARPS",
    "encode_words",
    "has_tensor_encoding",
    "level_cells",
    "tables_bytes",
]

HEAD_DIMS = (64, 128)
BITS = (2, 3, 4)
DTYPES = ("float16", "bfloat16")
FORMS = ("mma", "wgmma")
"""By the products of one warp, sm_80 and newer, and by those of four, sm_90 alone."""
BUCKETS = 32
CELLS = 36
"""Room for buckets, one of them for coordinates beyond all, and for the level above the last."""
WARPS = {"mma": 4, "wgmma": 8}
"""Of a block."""
STEP_ROWS = 16
STEPS = 4
COLUMN_BITS = {False: (0, 2, 3), True: (3, 0, 2)}
"""Bits of a coordinate's number that are bits 0, 1, 2 of a product's column, for keys and for values."""


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


def tables_bytes(dim: int, form: str) -> int:
    """Dynamic shared memory of a block, bytes: tables; for every warp vectors of a step or two and codes."""
    tables, buffers = (dim // 2, 2) if form == "mma" else (dim * dim // 2, 1)
    return 4 * (tables + 2 * CELLS + WARPS[form] * (buffers * STEP_ROWS * dim // 2 + STEPS * dim // 16 * 32))


def encode_words(codec: Codec, dtype: str, values: bool, form: str) -> NDArray[np.uint32]:
    """The tables of one side for one of FORMS, in order."""
    boundaries, levels, _ = level_cells(codec)
    if form == "mma":
        factors = _halves(_factors(codec, values), dtype).reshape(-1, 2, 32)
        rotation = [factors.reshape(-1), factors[:, ::-1].reshape(-1), _sign_words(codec).reshape(-1)]
    else:
        rotation = [_halves(_matrix(codec, values), dtype).reshape(-1)]
    return np.concatenate([*rotation, boundaries.view(np.uint32), levels])


def level_cells(codec: Codec) -> tuple[NDArray[np.float32], NDArray[np.uint32], float]:
    """float32 boundaries and uint32 levels, `[CELLS]` each, as above; and `per_unit`."""
    arrays = codec.tables()
    boundaries = arrays["boundaries"].astype(np.float64)
    for reach in np.linspace(0.48, 0.3, 37):
        per_unit = np.float32(reach / boundaries[-1])
        places = boundaries * np.float64(per_unit) + 0.5
        buckets = np.floor(places.astype(np.float32) * np.float32(BUCKETS)).astype(np.int64)
        if len(np.unique(buckets)) == len(buckets):
            break
    else:
        raise ValueError(f"the boundaries of {codec.spec} do not lie in {BUCKETS} buckets of their own")
    cells = np.full(CELLS, 2.0, dtype=np.float32)
    cells[buckets] = places.astype(np.float32)
    below = np.searchsorted(buckets, np.arange(CELLS), side="left")
    bits = codec.spec.bits
    codes = np.arange(2**bits, dtype=np.uint32)
    stored = codes ^ (codes << 1 & 8) ^ 8 if bits == 4 else codes
    levels = arrays["centroids"].astype(np.float32).view(np.uint32) & ~np.uint32(15) | stored
    return cells, levels[below], float(per_unit)


def _halves(pairs: NDArray[np.float32], dtype: str) -> NDArray[np.uint32]:
    """Pairs of the last axis as words of two-byte numbers, which they are exactly."""
    if dtype == "float16":
        halves = pairs.astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        halves = pairs.view(np.uint32) >> np.uint32(16)
    words: NDArray[np.uint32] = halves[..., 0] | halves[..., 1] << np.uint32(16)
    return words


def _factors(codec: Codec, values: bool) -> NDArray[np.float32]:
    """`[word, lane, e]`."""
    dim = codec.spec.head_dim
    w = fast_hadamard(hadamard_signs(codec.spec.rotation, dim, codec.spec.seed)[1].astype(np.float64))
    word, lane, e = np.indices((dim // 8, 32, 2))
    column = sum((lane // 4 >> at & 1) << bit for at, bit in enumerate(COLUMN_BITS[values]))
    coordinate = word // 2 * 16 + word % 2 * 2 + lane % 4 * 4 + e
    factors: NDArray[np.float32] = (w[coordinate ^ column] / dim).astype(np.float32)
    return factors


def _sign_words(codec: Codec) -> NDArray[np.uint32]:
    """`[c, word]`."""
    dim = codec.spec.head_dim
    negative = hadamard_signs(codec.spec.rotation, dim, codec.spec.seed)[0] < 0
    c, word = np.indices((4, dim // 8))
    first = word // 2 * 16 + c * 4 + word % 2 * 2
    out: NDArray[np.uint32] = negative[first] * np.uint32(1 << 15) | negative[first + 1] * np.uint32(1 << 31)
    return out


def _matrix(codec: Codec, values: bool) -> NDArray[np.float32]:
    """`[step, block, slot // 8, result, slot % 8 // 2, 2]`."""
    dim = codec.spec.head_dim
    first, second = hadamard_signs(codec.spec.rotation, dim, codec.spec.seed).astype(np.float64)
    w = fast_hadamard(second)
    x, block, b, n, c, e = np.indices((dim // 16, dim // 8, 2, 8, 4, 2))
    coordinate = 32 * (x // 2) + 8 * c + 4 * (x % 2) + 2 * b + e
    c, o, j = n // 2, n % 2, block % 2
    inside = (c & 1) + 2 * j + 4 * (c >> 1) + 8 * o if values else 4 * c + 2 * j + o
    result = 16 * (block // 2) + inside
    matrix: NDArray[np.float32] = (w[coordinate ^ result] * first[coordinate] / dim).astype(np.float32)
    return matrix
