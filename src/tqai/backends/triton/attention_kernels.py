"""Triton kernels: attention over a split of pages that are laid out in planes (`planes.py`).

Rows of a query tile are (new token, query head of the group), padded to a power of two of at least 16.
Tiles of keys and values are float16 for the tensor cores; scales are applied outside of the products.
A NaN in sight makes a weight NaN and so the sum of weights, whether a maximum passes it on or not.
"""

# mypy: ignore-errors
# Kernels are compiled by Triton, which gives their names meanings of its own.
import triton
import triton.language as tl

from tqai.backends.triton.unpack import capped, codes_of, levels_of, scales_of

__all__ = ["attend_split"]

PAGE_TOKENS = tl.constexpr(64)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_split(
    addresses,
    address_stride,
    query,
    norms,
    mask,
    partial,
    stats,
    table_k,
    table_v,
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
    DKP: tl.constexpr,
    DVP: tl.constexpr,
    ROWS: tl.constexpr,
    BITS_K: tl.constexpr,
    BITS_V: tl.constexpr,
    WORDS_K: tl.constexpr,
    WORDS_V: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One program: one sequence and KV head, every `splits`-th page. Partial results in the rotated space."""
    batch = tl.program_id(0) // kv_heads
    head = tl.program_id(0) % kv_heads
    split = tl.program_id(1)
    row = tl.arange(0, ROWS)
    dk = tl.arange(0, DKP)
    dv = tl.arange(0, DVP)
    token = tl.arange(0, PAGE_TOKENS)
    real = row < rows
    # the queries come rotated and divided by their norms, float16 `[segments, rows, DK]`
    q_at = (tl.program_id(0) * rows + row)[:, None] * DK + dk[None, :]
    q = tl.load(query + q_at, mask=real[:, None] & (dk[None, :] < DK), other=0.0)
    most = tl.load(norms + tl.program_id(0) * rows + row, mask=real, other=0.0) * key_unit
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DVP), tl.float32)
    for index in range(split, pages, splits):
        page = tl.load(addresses + batch * address_stride + index) + head.to(tl.int64) * page_bytes
        page = tl.multiple_of(page, 16).to(tl.pointer_type(tl.uint8))
        code = codes_of(page, token, DK, DKP, BITS_K)
        k = levels_of(code, table_k, BITS_K, WORDS_K)
        k = tl.where(dk[None, :] < DK, k, 0).to(tl.float16)
        logits = tl.dot(q, tl.trans(k)) * most[:, None] * scales_of(page, key_scales_at, token)[None, :]
        logits = capped(logits, SOFTCAP, softcap)
        position = index * PAGE_TOKENS + token
        seen = (position >= first_token)[None, :] & real[:, None]
        if MASKED:
            at = batch * m_b + (head * group + row % group)[:, None] * m_h + (row // group)[:, None] * m_t
            at += (sinks + position - first_token)[None, :] * m_k
            seen = seen & (tl.load(mask + at, mask=seen, other=0) != 0)
        logits = tl.where(seen, logits * LOG2E, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp2(top - anchor)
        weight = tl.exp2(logits - anchor[:, None])
        total = total * fade + tl.sum(weight, 1)
        weight = tl.where(seen, weight * scales_of(page, value_scales_at, token)[None, :], 0.0)
        largest = tl.max(weight, 1)
        unit = tl.where(largest > 0.0, largest, 1.0)
        code = codes_of(page + value_codes_at, token, DV, DVP, BITS_V)
        v = levels_of(code, table_v, BITS_V, WORDS_V).to(tl.float16)
        part = tl.dot((weight / unit[:, None]).to(tl.float16), v) * unit[:, None]
        acc = acc * fade[:, None] + part
        top = higher
    acc *= value_unit
    place = (tl.program_id(0) * splits + split) * ROWS + row
    tl.store(partial + place[:, None] * DV + dv[None, :], acc, mask=real[:, None] & (dv[None, :] < DV))
    tl.store(stats + place * 2, top, mask=real)
    tl.store(stats + place * 2 + 1, total, mask=real)
