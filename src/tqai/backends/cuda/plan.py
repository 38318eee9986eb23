"""What a kernel is told about a pair of codecs: macros, shared memory, tables. Pure arithmetic and numpy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tqai.backends.cuda.layout import UNIT_DIMS, WIDTHS
from tqai.backends.cuda.trellis_plan import (
    Forms,
    is_trellis,
    most_warps,
    refuse_trellis,
    table_bytes,
    trellis_macros,
)
from tqai.core.codec import Codec
from tqai.core.page import PAGE_TOKENS, PageFormat
from tqai.core.rotation import hadamard_signs
from tqai.core.trellis import STATES

__all__ = [
    "COLUMNS",
    "MAX_BLOCKS",
    "MAX_CLUSTER",
    "MAX_HEAD_DIM",
    "Shape",
    "attention_shared_bytes",
    "block_count",
    "choose_shape",
    "code_shared_bytes",
    "codec_macros",
    "division",
    "has_long_stretches",
    "quantizer_cells",
    "refuse_format",
    "rotation_plan",
    "split_count",
]

MAX_HEAD_DIM = 256
COLUMNS = 4
"""Query columns (heads of a group times new tokens) that one pass over the codes serves."""

ROUNDS = {"haar": 0, "hadamard": 1, "hadamard2": 2, "identity": 0}
DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
SHAPES = ((12, 2), (12, 1), (8, 2), (8, 1), (6, 1), (4, 1), (2, 1), (1, 1))
CODE_WARPS = 8
MAX_BLOCKS = 160
"""Most blocks of a launch."""
MAX_CLUSTER = 16
"""Most blocks of a cluster on sm_90; more than 8 only where the device agrees."""


LARGE_WORK_ITEMS = 100
"""With fewer items per block than this, blocks are cut at segment ends: a second segment costs more
than an idle multiprocessor."""
ITEMS_OF_BLOCK = 12
"""So few items are not divided among more blocks: about one for each warp."""
LEAST_SHARE = 0.94
"""And with more, too, if so large a share of the multiprocessors stays busy."""
LONG_PAGES = 96
LEAST_ON_THEIR_WAY_BYTES = 72 << 10
"""With so many pages for a block or more, one buffer for each warp, its halves fetched apart, is faster than
two, if a multiprocessor still asks for so much at a time. More than the memory needs to be busy waits in
queues, and not that of all multiprocessors for as long: blocks then end further apart."""
TRELLIS_WARPS = (16, 12, 8, 6, 4, 2, 1)


@dataclass(frozen=True)
class Shape:
    """Warps per block and page buffers per warp of the attention kernel."""

    warps: int
    stages: int


def refuse_format(page_format: PageFormat) -> str | None:
    """Why these codecs have no CUDA kernel, or None."""
    if page_format.scale_format != "bfloat16":
        return f"scale_format {page_format.scale_format!r}: the kernels read bfloat16 scales"
    for what, codec in (("keys", page_format.key), ("values", page_format.value)):
        spec = codec.spec
        if spec.name not in ("scalar", *STATES):
            return f"codec {spec.name!r} of {what} has no CUDA kernel"
        if spec.bits not in WIDTHS:
            return f"{what} of {spec.bits} bits: the kernels know {', '.join(map(str, WIDTHS))}"
        if spec.head_dim % UNIT_DIMS or spec.head_dim > MAX_HEAD_DIM:
            return f"head_dim {spec.head_dim} of {what} is no multiple of {UNIT_DIMS} up to {MAX_HEAD_DIM}"
        if ROUNDS[spec.rotation] and spec.head_dim < 32:
            return f"a Hadamard rotation of head_dim {spec.head_dim}: the kernels begin at 32"
    if 16 * (page_format.value.spec.head_dim + 8) > page_format.page_bytes:
        return "keys so much narrower than values"
    if any(codec.spec.name in STATES for codec in (page_format.key, page_format.value)):
        return refuse_trellis(page_format)
    return None


def codec_macros(page_format: PageFormat, dtype: str) -> dict[str, int]:
    """Macros common to all kernels."""
    key, value = page_format.key.spec, page_format.value.spec
    further = trellis_macros(page_format) if is_trellis(page_format) else {}
    if not further:
        further = {"ONE_LUT": int(has_one_lookup(page_format))}
    return {
        "DK": key.head_dim,
        "DV": value.head_dim,
        "BK": key.bits,
        "BV": value.bits,
        "ROTK": ROUNDS[key.rotation],
        "ROTV": ROUNDS[value.rotation],
        "DTYPE": DTYPES[dtype],
        **further,
    }


def has_one_lookup(page_format: PageFormat) -> bool:
    """Whether keys and values of 8 bits have the same levels: one table in shared memory then serves both."""
    key, value = page_format.key, page_format.value
    if key.spec.bits != 8 or value.spec.bits != 8:
        return False
    return np.array_equal(key.tables()["centroids"], value.tables()["centroids"])


def attention_shared_bytes(
    page_format: PageFormat, shape: Shape, batch: int, forms: Forms | None = None
) -> int:
    """Dynamic shared memory of one block, bytes; the parts are named in `params.cuh`. `forms` of the tables
    of trellis codes."""
    key, value = page_format.key.spec, page_format.value.spec
    steps = (key.head_dim // UNIT_DIMS + 1) // 2
    value_factors = 2 if value.bits == 8 else 1
    warps = shape.warps
    slot = COLUMNS * (value.head_dim + 8) * 4
    if forms is None:
        buffers, barriers = shape.stages * page_format.page_bytes, max(shape.stages, 2)
        tables = 32768 * ((key.bits == 8) + (value.bits == 8) - has_one_lookup(page_format))
        passed = value_factors * 544
    else:  # pages come into registers
        buffers, barriers = slot, 0
        tables = table_bytes(page_format, forms)
        passed = 16 * (PAGE_TOKENS + 4)
    signs = ROUNDS[key.rotation] * key.head_dim + ROUNDS[value.rotation] * value.head_dim
    return sum(
        (
            warps * buffers,
            tables,
            slot + COLUMNS * 8,
            max(warps, 8) * COLUMNS * 8,
            COLUMNS * key.head_dim * 4,
            signs * 4,
            2 * 8 * (32 * steps + 16),
            warps * max(passed, 4 * key.head_dim, 4 * value.head_dim),
            warps * barriers * 8 + 16,
            COLUMNS * 4,
            4 * (4 + warps),
            4 * (batch + 1),
        )
    )


def has_long_stretches(page_format: PageFormat, pages_of_block: int) -> bool:
    """Whether one buffer for each warp is enough, and better, on sm_90 (`attend_split.cu`, scalar codes)."""
    return pages_of_block >= LONG_PAGES and SHAPES[0][0] * page_format.page_bytes >= LEAST_ON_THEIR_WAY_BYTES


def choose_shape(
    page_format: PageFormat,
    shared_limit_bytes: int,
    batch: int,
    forms: Forms | None = None,
    one_buffer: bool = False,
    line: bool = False,
) -> Shape | None:
    """The first of `SHAPES` that fits into a block's shared memory; with `one_buffer` of one stage alone. For
    trellis codes, `forms` of their tables, as many warps as fit and have registers enough, of blocks that are
    cut as a `line` or not."""
    if forms is not None:
        most = most_warps(page_format, forms, line)
        shapes = [Shape(warps, 1) for warps in TRELLIS_WARPS if warps <= most]
    else:
        shapes = [Shape(*each) for each in SHAPES if each[1] == 1 or not one_buffer]
    for shape in shapes:
        if attention_shared_bytes(page_format, shape, batch, forms) <= shared_limit_bytes:
            return shape
    return None


def code_shared_bytes(codec: Codec, buckets: int) -> int:
    """Dynamic shared memory of `tqai_encode` and `tqai_decode` for one side, bytes."""
    dim, bits = codec.spec.head_dim, codec.spec.bits
    rounds = ROUNDS[codec.spec.rotation]
    work = CODE_WARPS * (512 // dim) * (dim + 8) if rounds else CODE_WARPS * 4 * dim
    byte_array = max(dim * 68, 64 * (dim + 4)) + 16
    encode = 4 * work + byte_array + 8 * buckets + 4 * 2 ** (bits - 1)
    decode = 4 * (64 * (dim + 1) + 2**bits)
    return max(encode, decode) + 16


def rotation_plan(codec: Codec) -> NDArray[np.float32]:
    """Signs `[rounds, dim]`, the normaliser in the first row; or R transposed and R, `[2, dim, dim]`."""
    spec = codec.spec
    rounds = ROUNDS[spec.rotation]
    if rounds == 0:
        matrix = codec.rotation_matrix
        return np.stack([matrix.T, matrix]).astype(np.float32)
    signs = hadamard_signs(spec.rotation, spec.head_dim, spec.seed).astype(np.float64)
    signs[0] *= spec.head_dim ** (-rounds / 2.0)
    return signs.astype(np.float32)


def quantizer_cells(codec: Codec) -> tuple[NDArray[np.float32], float]:
    """Table that turns |coordinate| of a unit vector into a code: one look and one comparison.

    Bucket k covers [k, k + 1) / scale and holds the one boundary in it (or infinity) and the number of
    magnitudes below that boundary, an int32 as float32 bits.

    Returns:
        float32 `[buckets, 2]` and the scale, buckets per unit.
    """
    boundaries = codec.tables()["boundaries"].astype(np.float64)
    positive = boundaries[boundaries > 0]
    gaps = np.diff(np.concatenate([[0.0], positive])) if len(positive) else np.ones(1)
    last = positive[-1] if len(positive) else 0.0
    buckets = 1 if len(positive) == 0 else 16
    while True:
        # a little less than a whole number of buckets, so that rounding cannot part equal comparisons
        scale = np.float32(buckets / (last + 0.5 * gaps[-1]))
        low = np.floor(positive * float(scale) * (1.0 - 2.0**-20)).astype(np.int64)
        high = np.floor(positive * float(scale) * (1.0 + 2.0**-20)).astype(np.int64)
        if np.array_equal(low, high) and len(np.unique(low)) == len(low) and (high < buckets).all():
            break
        buckets = buckets * 2 if len(np.unique(low)) < len(low) or buckets < 16 else buckets + 1
    below = np.searchsorted(low, np.arange(buckets), side="left")
    cells = np.empty((buckets, 2), dtype=np.float32)
    cells[:, 0] = np.inf
    cells[low, 0] = positive.astype(np.float32)
    cells[:, 1] = below.astype(np.int32).view(np.float32)
    return cells, float(scale)


@lru_cache(maxsize=1024)
def division(divisor: int) -> tuple[int, int]:
    """(factor, shift) such that n // divisor == ((n * factor >> 32) + n) >> shift for 0 <= n < 2**31."""
    shift = (divisor - 1).bit_length()
    return (2**32 * (2**shift - divisor)) // divisor + 1, shift


def block_count(multiprocessors: int, segments: int, items: int) -> int:
    """Blocks to launch for `segments` segments of `items` items each (the most, if they differ)."""
    total = segments * max(items, 1)
    most = min(multiprocessors, MAX_BLOCKS)
    if segments < most:
        even = most // segments * segments
        if total <= LARGE_WORK_ITEMS * most or even >= LEAST_SHARE * most:
            return max(1, min(even, total))
    return max(1, min(most, total))


def split_count(multiprocessors: int, segments: int, items: int) -> int | None:
    """Blocks for each segment where all segments are cut alike (`attend_split.cu`), or None: cut the line."""
    most = min(multiprocessors, MAX_BLOCKS)
    if segments > most:
        return None
    splits = most // segments
    if segments * max(items, 1) > LARGE_WORK_ITEMS * most and splits * segments < LEAST_SHARE * most:
        return None
    return max(1, min(splits, -(-items // ITEMS_OF_BLOCK)))
