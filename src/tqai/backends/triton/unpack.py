"""What the Triton kernels share: codes, levels and scales out of a page.

Levels of up to 4 bits are whole numbers, read out of registers; more bits read a table in memory.
"""

# mypy: ignore-errors
# Kernels are compiled by Triton, which gives their names meanings of its own.
import triton
import triton.language as tl

__all__ = ["capped", "codes_of", "codes_of_slices", "levels_of", "scales_of", "top_bit_of"]

PAGE_TOKENS = tl.constexpr(64)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def capped(logits, SOFTCAP: tl.constexpr, softcap):
    """softcap * tanh(logits / softcap), or the logits as they are."""
    if SOFTCAP:
        # tanh by exponentials: 1 - 2 / (e^2x + 1)
        return softcap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * LOG2E) / softcap) + 1.0))
    return logits


@triton.jit
def top_bit_of(number):
    """`slices.TOP_BITS` of slices."""
    return (number & 1) | (number & 2) << 1 | (number & 4) >> 1


@triton.jit
def codes_of_slices(
    side, token, DIM: tl.constexpr, SLICES: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr
):
    """Codes int32 `[token, DIM]` of one side of a page in slices (`slices.py`)."""
    dim = tl.arange(0, DIM)[None, :]
    PLACES: tl.constexpr = DIM // SLICES
    place = dim % PLACES
    shift = dim // PLACES
    if VALUES:
        at = place * PAGE_TOKENS + token[:, None]
    else:
        at = token[:, None] * PLACES + place
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    word = tl.load(side.to(tl.pointer_type(tl.uint16)) + at).to(tl.int32)
    code = (word >> (shift * WIDTH)) & ((1 << WIDTH) - 1)
    if BITS == 3:
        top = tl.load(side + PAGE_TOKENS * DIM * 2 // 8 + at).to(tl.int32)
        code |= ((top >> top_bit_of(shift)) & 1) << 2
    return code


@triton.jit
def codes_of(side, token, DIM: tl.constexpr, DIMP: tl.constexpr, BITS: tl.constexpr):
    """Codes int32 `[token, DIMP]` of one side of a page; planes of 8, 4, 2 and 1 bits.

    The plane of W = 8 >> index bits: those before it are wider, their bits are BITS // 2W * 2W.
    """
    row = side + token[:, None] * (DIM * BITS // 8)
    if DIM == DIMP:
        # whole bytes by the row, each spread over the codes that it holds
        for index in tl.static_range(4):
            if BITS & (8 >> index):
                j = tl.arange(0, DIMP >> index)
                byte = tl.load(row + DIM * (BITS // (16 >> index) * (16 >> index)) // 8 + j[None, :]).to(
                    tl.int32
                )
                shifts = tl.arange(0, 1 << index) * (8 >> index)
                part = (byte[:, :, None] >> shifts[None, None, :]) & ((1 << (8 >> index)) - 1)
                part = tl.reshape(part, (token.shape[0], DIMP)) << (BITS // (16 >> index) * (16 >> index))
                if (16 >> index) > BITS:
                    code = part
                else:
                    code |= part
    else:
        dim = tl.arange(0, DIMP)[None, :]
        code = tl.zeros((token.shape[0], DIMP), dtype=tl.int32)
        for index in tl.static_range(4):
            if BITS & (8 >> index):
                at = DIM * (BITS // (16 >> index) * (16 >> index)) // 8 + dim * (8 >> index) // 8
                byte = tl.load(row + at, mask=dim < DIM, other=0).to(tl.int32)
                part = (byte >> (dim * (8 >> index) % 8)) & ((1 << (8 >> index)) - 1)
                code |= part << (BITS // (16 >> index) * (16 >> index))
    return code


@triton.jit
def levels_of(code, table, BITS: tl.constexpr, WORDS: tl.constexpr):
    """Levels of codes int32: for up to 4 bits whole numbers (`whole_levels.py`), else centroids, float32."""
    if BITS > 4:
        return tl.load(table + code)
    else:  # or the compiler wants one type of both
        HALF: tl.constexpr = 1 << (BITS - 1)
        positive = code >= HALF
        index = tl.where(positive, code - HALF, HALF - 1 - code)
        if BITS == 4:
            word = tl.where(index >= 4, WORDS[1], WORDS[0])
            size = (word >> ((index & 3) * 8)) & 0x7F
        else:
            size = (WORDS[0] >> (index * 8)) & 0x7F
        return tl.where(positive, size, -size)


@triton.jit
def scales_of(page, at, token):
    bits = tl.load((page + at).to(tl.pointer_type(tl.uint16)) + token).to(tl.uint32) << 16
    return bits.to(tl.float32, bitcast=True)
