"""Triton kernels: pages from vectors and back."""

# mypy: ignore-errors
# Kernels are compiled by Triton, which gives their names meanings of its own.
import triton
import triton.language as tl

from tqai.backends.triton.unpack import codes_of, scales_of

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
    NORM_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: TOKENS vectors of one page and head, rotated, scaled, quantized and packed."""
    page = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, DIMP)
    x = tl.load(
        vectors + page * v_p + head * v_h + (token * v_t)[:, None] + d[None, :],
        mask=d[None, :] < DIM,
        other=0.0,
    ).to(tl.float32)
    # NaN may survive no maximum; a sum of zeros of it does
    largest = tl.max(tl.abs(x), 1)
    finite = (largest < float("inf")) & (tl.sum(x * 0.0, 1) == 0.0)
    usable = finite & (largest >= 1.1754943508222875e-38)
    safe = tl.where(usable, largest, 1.0)
    # division in two steps would lose nothing, but one float32 division by the largest is within its rounding
    x = tl.where(usable[:, None], x / safe[:, None], 0.0)
    r = tl.load(
        rotation + d[:, None] * DIM + d[None, :], mask=(d[:, None] < DIM) & (d[None, :] < DIM), other=0.0
    )
    y = tl.dot(x, r, input_precision=PRECISION)
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
    row = base + codes_at + token * (DIM * BITS // 8)
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
    PRECISION: tl.constexpr,
):
    """One program: TOKENS vectors of one page, in the original space."""
    page = pages + tl.program_id(0).to(tl.int64) * page_bytes
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, DIMP)
    code = codes_of(page + codes_at, token, DIM, DIMP, BITS)
    level = tl.where(d[None, :] < DIM, tl.load(centroids + code), 0.0)
    r = tl.load(
        rotation + d[:, None] * DIM + d[None, :], mask=(d[:, None] < DIM) & (d[None, :] < DIM), other=0.0
    )
    x = tl.dot(level, r, input_precision=PRECISION) * scales_of(page, scales_at, token)[:, None]
    x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))
    place = (tl.program_id(0).to(tl.int64) * PAGE_TOKENS + token)[:, None] * DIM + d[None, :]
    tl.store(out + place, x.to(out.dtype.element_ty), mask=d[None, :] < DIM)
