"""Triton kernels: attention over a split of pages that are laid out in slices (`slices.py`).

Tokens and coordinates are the long side of the products, and the rows (queries of one KV head) the short:

    logits [64 tokens, ROWS] = sum over slices of  levels [64, J] x queries [J, ROWS]
    out    [J, ROWS]         = levels [J, 64 tokens] x weights [64, ROWS],  for every slice
"""

# mypy: ignore-errors
# Kernels are compiled by Triton, which gives their names meanings of its own.
import triton
import triton.language as tl

from tqai.backends.triton.unpack import capped, levels_of, scales_of

__all__ = ["attend_sliced"]

PAGE_TOKENS = tl.constexpr(64)
LOG2E = tl.constexpr(1.4426950408889634)
HEADROOM = tl.constexpr(15.0)  # of a weight in float16: 1 becomes 2^15, the least that is not 0 is 2^-24


@triton.jit
def _levels(low, top, SLICES: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PTX: tl.constexpr):
    """Levels of all slices, float16, of words int16; those of PTX are `pairs.UNIT` times too small.

    `top` serves 3 bits alone.
    """
    found = ()
    if PTX is not None:
        pairs = ()
        for i in tl.static_range(SLICES // 2):
            pairs = pairs + _levels_of_two(low, top, i, BITS, PTX)
        for i in tl.static_range(SLICES):
            # where slice i stands in `pairs.SLICE_PAIRS`
            if BITS == 4:
                found = found + (pairs[i],)  # noqa: RUF005
            else:
                found = found + (pairs[(i & 4) | (i & 1) << 1 | (i & 2) >> 1],)  # noqa: RUF005
    else:
        WIDTH: tl.constexpr = 4 if BITS == 4 else 2
        low = low.to(tl.int32)
        top = top.to(tl.int32)
        for i in tl.static_range(SLICES):
            code = (low >> (WIDTH * i)) & ((1 << WIDTH) - 1)
            if BITS == 3:
                code |= ((top >> ((i & 1) | (i & 2) << 1 | (i & 4) >> 1)) & 1) << 2
            found = found + (levels_of(code, None, BITS, WORDS).to(tl.float16),)  # noqa: RUF005
    return found


@triton.jit
def _levels_of_two(low, top, NUMBER: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    if BITS == 3:
        return tl.inline_asm_elementwise(
            PTX[NUMBER], "=r,=r,r,r", [low, top], (tl.float16, tl.float16), True, 2
        )
    return tl.inline_asm_elementwise(PTX[NUMBER], "=r,=r,r", [low], (tl.float16, tl.float16), True, 2)


@triton.jit
def _words(side, at, BYTES: tl.constexpr, BITS: tl.constexpr):
    """Words number `at` of both planes of a side, int16; the second is there for 3 bits alone."""
    low = tl.load(tl.multiple_of(side.to(tl.pointer_type(tl.int16)), 16) + at)
    if BITS == 3:
        start = tl.multiple_of((side + BYTES).to(tl.pointer_type(tl.uint8)), 16)
        return low, tl.load(start + at).to(tl.int16)
    return low, low


@triton.jit
def attend_sliced(
    addresses,
    address_stride,
    query,
    norms,
    mask,
    partial,
    stats,
    page_bytes,
    key_scales_at,
    value_codes_at,
    value_scales_at,
    pages,
    first_token,
    sinks,
    kv_heads,
    group,
    rows,
    splits,
    m_b,
    m_h,
    m_t,
    m_k,
    softcap,
    key_unit,
    value_unit,
    DK: tl.constexpr,
    DV: tl.constexpr,
    SK: tl.constexpr,
    SV: tl.constexpr,
    ROWS: tl.constexpr,
    BITS_K: tl.constexpr,
    BITS_V: tl.constexpr,
    CUT: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WORDS_K: tl.constexpr,
    WORDS_V: tl.constexpr,
    PTX_K: tl.constexpr,
    PTX_V: tl.constexpr,
):
    """One program: one sequence and KV head, every `splits`-th page. Partial results in the rotated space."""
    JK: tl.constexpr = DK // SK
    JV: tl.constexpr = DV // SV
    segment = tl.program_id(0)
    batch = segment // kv_heads
    head = segment % kv_heads
    split = tl.program_id(1)
    row = tl.arange(0, ROWS)
    jk = tl.arange(0, JK)
    jv = tl.arange(0, JV)
    token = tl.arange(0, PAGE_TOKENS)
    real = row < rows
    # the queries come rotated and divided by their norms, float16 `[segments, rows, DK]`
    q_at = query + (segment * rows + row)[None, :] * DK + jk[:, None]
    q = ()
    acc = ()
    for i in tl.static_range(SK):
        q = q + (tl.load(q_at + i * JK, mask=real[None, :], other=0.0),)  # noqa: RUF005
    for _ in tl.static_range(SV):
        acc = acc + (tl.zeros((JV, ROWS), tl.float32),)  # noqa: RUF005
    factor = tl.load(norms + segment * rows + row, mask=real, other=0.0) * key_unit
    if not SOFTCAP:
        factor *= LOG2E
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    unit = 0.0  # the largest value scale so far, which weights are held against
    for index in range(split, pages, splits):
        page = tl.load(addresses + batch * address_stride + index) + head.to(tl.int64) * page_bytes
        low, high = _words(page, token[:, None] * JK + jk[None, :], 64 * DK * 2 // 8, BITS_K)
        logits = tl.zeros((PAGE_TOKENS, ROWS), tl.float32)
        levels = _levels(low, high, SK, BITS_K, WORDS_K, PTX_K)
        for i in tl.static_range(SK):
            logits = tl.dot(levels[i], q[i], logits)
        logits = logits * factor[None, :] * scales_of(page, key_scales_at, token)[:, None]
        if SOFTCAP:
            logits = capped(logits, SOFTCAP, softcap) * LOG2E
        scale = scales_of(page, value_scales_at, token)
        # A scale out of sight must not set the unit of weights. What rows of padding hold does not matter.
        if MASKED:
            position = index * PAGE_TOKENS + token
            at = batch * m_b + (head * group + row % group)[None, :] * m_h + (row // group)[None, :] * m_t
            at += (sinks + position - first_token)[:, None] * m_k
            seen = (position >= first_token)[:, None] & real[None, :]
            seen = seen & (tl.load(mask + at, mask=seen, other=0) != 0)
            logits = tl.where(seen, logits, -float("inf"))
            scale = tl.where(tl.max(seen.to(tl.int32), 1) > 0, scale, 0.0)
        elif CUT:
            used = index * PAGE_TOKENS + token >= first_token
            logits = tl.where(used[:, None], logits, -float("inf"))
            scale = tl.where(used, scale, 0.0)
        higher = tl.maximum(top, tl.max(logits, 0))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp2(top - anchor)
        weight = tl.exp2(logits - (anchor - HEADROOM)[None, :])
        total = total * fade + tl.sum(weight, 0)
        larger = tl.maximum(unit, tl.max(scale, 0))  # of what is a number
        larger = tl.where(larger > 0.0, larger, 1.2e-38)
        fade = fade * (unit / larger)
        unit = larger
        weight = weight * (scale / larger)[:, None]
        if MASKED:
            weight = tl.where(seen, weight, 0.0)
        weight = weight.to(tl.float16)
        side = page + value_codes_at
        low, high = _words(side, token[None, :] + jv[:, None] * PAGE_TOKENS, 64 * DV * 2 // 8, BITS_V)
        found = _levels(low, high, SV, BITS_V, WORDS_V, PTX_V)
        kept = acc
        acc = ()
        for i in tl.static_range(SV):
            acc = acc + (tl.dot(found[i], weight, kept[i] * fade[None, :]),)  # noqa: RUF005
        top = higher
    place = (segment * splits + split) * ROWS + row
    out = partial + place[None, :] * DV + jv[:, None]
    for i in tl.static_range(SV):
        tl.store(out + i * JV, acc[i] * value_unit * unit, mask=real[None, :])
    tl.store(stats + place * 2, tl.where(top == -float("inf"), top, top - HEADROOM), mask=real)
    tl.store(stats + place * 2 + 1, total, mask=real)
