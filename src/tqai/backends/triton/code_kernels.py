"""Triton kernels: pages from vectors and back."""

# mypy: ignore-errors
# Kernels are compiled by Triton, which gives their names meanings of its own.
import triton
import triton.language as tl

from tqai.backends.triton.unpack import codes_of, codes_of_slices, scales_of, top_bit_of

__all__ = ["decode_rows", "encode_rows"]

PAGE_TOKENS = tl.constexpr(64)


@triton.jit
def encode_rows(
    vectors,
    pages,
    rotation,
    boundaries,
    centroids,
    heads,
    page_bytes,
    codes_at,
    scales_at,
    v_p,
    v_h,
    v_t,
    DIM: tl.constexpr,
    DIMP: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    SLICES: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    NORM_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: TOKENS vectors of one page and head into codes and scales; SLICES is 0 for planes."""
    page = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, DIMP)
    base_in = vectors + page * v_p + head * v_h
    x = tl.load(base_in + (token * v_t)[:, None] + d[None, :], mask=d[None, :] < DIM, other=0.0)
    x = x.to(tl.float32)
    # NaN may survive no maximum; a sum of zeros of it does
    largest = tl.max(tl.abs(x), 1)
    finite = (largest < float("inf")) & (tl.sum(x * 0.0, 1) == 0.0)
    usable = finite & (largest >= 1.1754943508222875e-38)
    safe = tl.where(usable, largest, 1.0)
    # division in two steps would lose nothing, but one float32 division by the largest is within its rounding
    x = tl.where(usable[:, None], x / safe[:, None], 0.0)
    if CHUNK == DIMP:
        square = (d[:, None] < DIM) & (d[None, :] < DIM)
        r = tl.load(rotation + d[:, None] * DIM + d[None, :], mask=square, other=0.0)
        y = tl.dot(x, r, input_precision=PRECISION)
    else:
        # the matrix is too much for shared memory: some of its rows at a time, their coordinates read again
        y = tl.zeros((TOKENS, DIMP), tl.float32)
        for start in range(0, DIM, CHUNK):
            e = start + tl.arange(0, CHUNK)
            part = tl.load(base_in + (token * v_t)[:, None] + e[None, :], mask=e[None, :] < DIM, other=0.0)
            part = tl.where(usable[:, None], part.to(tl.float32) / safe[:, None], 0.0)
            r = tl.load(
                rotation + e[:, None] * DIM + d[None, :],
                mask=(e[:, None] < DIM) & (d[None, :] < DIM),
                other=0.0,
            )
            y = tl.dot(part, r, y, input_precision=PRECISION)
    norm = tl.sqrt(tl.sum(y * y, 1))
    unit = y / tl.where(norm > 0.0, norm, 1.0)[:, None]
    code = tl.zeros((TOKENS, DIMP), tl.int32)
    # binary search: the number of boundaries at or below
    for bit in tl.static_range(BITS):
        half = tl.load(boundaries + code + ((1 << (BITS - 1 - bit)) - 1))
        code += tl.where(unit >= half, 1 << (BITS - 1 - bit), 0)
    level = tl.where(d[None, :] < DIM, tl.load(centroids + code), 0.0)
    scale = norm if NORM_SCALE else tl.sum(y * level, 1) / tl.sum(level * level, 1)
    # bfloat16, nearest, ties to even; beyond its largest number, that
    scaled = tl.minimum(0.5 * scale * safe, 1.694738e38) * 2.0
    bits = tl.minimum(scaled, 3.3895313892515355e38).to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = tl.where(bits > 0x7F7F, 0x7F7F, bits)
    bits = tl.where(usable, bits, tl.where(finite, 0, 0x7FC0))
    base = pages + tl.program_id(0).to(tl.int64) * page_bytes
    tl.store((base + scales_at).to(tl.pointer_type(tl.uint16)) + token, bits.to(tl.uint16))
    code = tl.where(finite[:, None] & (d[None, :] < DIM), code, 0)
    if SLICES:
        _store_slices(base + codes_at, code, token, DIM, SLICES, BITS, VALUES)
    else:
        _store_planes(base + codes_at, code, token, DIM, DIMP, BITS)


@triton.jit
def _store_slices(
    side, code, token, DIM: tl.constexpr, SLICES: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr
):
    TOKENS: tl.constexpr = token.shape[0]
    PLACES: tl.constexpr = DIM // SLICES
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    slice_number = tl.arange(0, SLICES)
    parts = tl.reshape(code, (TOKENS, SLICES, PLACES))
    place = tl.arange(0, PLACES)
    if VALUES:
        at = place[None, :] * PAGE_TOKENS + token[:, None]
    else:
        at = token[:, None] * PLACES + place[None, :]
    word = tl.sum((parts & ((1 << WIDTH) - 1)) << (slice_number * WIDTH)[None, :, None], 1)
    tl.store(side.to(tl.pointer_type(tl.uint16)) + at, word.to(tl.uint16))
    if BITS == 3:
        top = tl.sum((parts >> 2) << top_bit_of(slice_number)[None, :, None], 1)
        tl.store(side + PAGE_TOKENS * DIM * 2 // 8 + at, top.to(tl.uint8))


@triton.jit
def _store_planes(side, code, token, DIM: tl.constexpr, DIMP: tl.constexpr, BITS: tl.constexpr):
    TOKENS: tl.constexpr = token.shape[0]
    row = side + token * (DIM * BITS // 8)
    for index in tl.static_range(4):
        if BITS & (8 >> index):
            # as in `codes_of`; 1 << index codes share a byte
            before = BITS // (16 >> index) * (16 >> index)
            part = (code >> before) & ((1 << (8 >> index)) - 1)
            shifts = tl.arange(0, 1 << index) * (8 >> index)
            parts = tl.reshape(part, (TOKENS, DIMP >> index, 1 << index))
            packed = tl.sum(parts << shifts[None, None, :], 2)
            j = tl.arange(0, DIMP >> index)
            at = DIM * (BITS // (16 >> index) * (16 >> index)) // 8 + j
            tl.store(
                row[:, None] + at[None, :], packed.to(tl.uint8), mask=j[None, :] < DIM * (8 >> index) // 8
            )


@triton.jit
def decode_rows(
    pages,
    out,
    rotation,
    centroids,
    page_bytes,
    codes_at,
    scales_at,
    limit,
    DIM: tl.constexpr,
    DIMP: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    SLICES: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: TOKENS vectors of one page, in the original space."""
    page = pages + tl.program_id(0).to(tl.int64) * page_bytes
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, DIMP)
    if SLICES:
        code = codes_of_slices(page + codes_at, token, DIM, SLICES, BITS, VALUES)
    else:
        code = codes_of(page + codes_at, token, DIM, DIMP, BITS)
    level = tl.where(d[None, :] < DIM, tl.load(centroids + code), 0.0)
    scale = scales_of(page, scales_at, token)[:, None]
    place = (tl.program_id(0).to(tl.int64) * PAGE_TOKENS + token)[:, None] * DIM
    for start in range(0, DIM, CHUNK):
        e = start + tl.arange(0, CHUNK)
        r = tl.load(
            rotation + d[:, None] * DIM + e[None, :], mask=(d[:, None] < DIM) & (e[None, :] < DIM), other=0.0
        )
        x = tl.dot(level, r, input_precision=PRECISION) * scale
        x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))
        tl.store(out + place + e[None, :], x.to(out.dtype.element_ty), mask=e[None, :] < DIM)
