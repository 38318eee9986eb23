"""Triton kernels: attention over a split of the pages, and the merge with the exact tokens.

Rows of a query tile are (new token, query head of the group), padded to a power of two of at least 16.
Tiles of keys and values are float16 for the tensor cores; scales are applied outside of the products.
A NaN in sight makes a weight NaN and so the sum of weights, whether a maximum passes it on or not.
"""

# mypy: ignore-errors
# Kernels are compiled by Triton, which gives their names meanings of its own.
import triton
import triton.language as tl

from tqai.backends.triton.unpack import codes_of, levels_of, scales_of

__all__ = ["attend_split", "merge_splits"]

PAGE_TOKENS = tl.constexpr(64)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _capped(logits, SOFTCAP: tl.constexpr, softcap):
    if SOFTCAP:
        # tanh by exponentials: 1 - 2 / (e^2x + 1)
        return softcap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * LOG2E) / softcap) + 1.0))
    return logits


@triton.jit
def attend_split(
    addresses,
    address_stride,
    query,
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
    ka,
    kb,
    kc,
    kd,
    ke,
    kf,
    va,
    vb,
    vc,
    vd,
    ve,
    vf,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DKP: tl.constexpr,
    DVP: tl.constexpr,
    ROWS: tl.constexpr,
    BITS_K: tl.constexpr,
    BITS_V: tl.constexpr,
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
    # the queries come rotated and scaled, float32 `[batch * kv_heads, rows, DK]`
    q_at = (tl.program_id(0) * rows + row)[:, None] * DK + dk[None, :]
    q = tl.load(query + q_at, mask=real[:, None] & (dk[None, :] < DK), other=0.0)
    # float16 holds what is scaled to 1
    most = tl.max(tl.abs(q), 1)
    most = tl.where(most > 0.0, most, 1.0)
    q = (q / most[:, None]).to(tl.float16)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DVP), tl.float32)
    for index in range(split, pages, splits):
        page = tl.load(addresses + batch * address_stride + index) + head.to(tl.int64) * page_bytes
        page = tl.multiple_of(page, 16).to(tl.pointer_type(tl.uint8))
        code = codes_of(page, token, DK, DKP, BITS_K)
        k = levels_of(code, table_k, BITS_K, ka, kb, kc, kd, ke, kf)
        k = tl.where(dk[None, :] < DK, k, 0.0).to(tl.float16)
        logits = tl.dot(q, tl.trans(k)) * most[:, None] * scales_of(page, key_scales_at, token)[None, :]
        logits = _capped(logits, SOFTCAP, softcap)
        position = index * PAGE_TOKENS + token
        seen = (position >= first_token)[None, :] & real[:, None]
        if MASKED:
            at = batch * m_b + (head * group + row % group)[:, None] * m_h + (row // group)[:, None] * m_t
            at += (sinks + position - first_token)[None, :] * m_k
            seen = seen & (tl.load(mask + at, mask=seen, other=0) != 0)
        logits = tl.where(seen, logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp2((top - anchor) * LOG2E)
        weight = tl.exp2((logits - anchor[:, None]) * LOG2E)
        total = total * fade + tl.sum(weight, 1)
        weight = tl.where(seen, weight * scales_of(page, value_scales_at, token)[None, :], 0.0)
        largest = tl.max(weight, 1)
        unit = tl.where(largest > 0.0, largest, 1.0)
        code = codes_of(page + value_codes_at, token, DV, DVP, BITS_V)
        v = levels_of(code, table_v, BITS_V, va, vb, vc, vd, ve, vf).to(tl.float16)
        part = tl.dot((weight / unit[:, None]).to(tl.float16), v) * unit[:, None]
        acc = acc * fade[:, None] + part
        top = higher
    place = (tl.program_id(0) * splits + split) * ROWS + row
    tl.store(partial + place[:, None] * DVP + dv[None, :], acc)
    tl.store(stats + place * 2, top)
    tl.store(stats + place * 2 + 1, total)


@triton.jit
def merge_splits(
    query,
    sink_keys,
    sink_values,
    recent_keys,
    recent_values,
    mask,
    partial,
    stats,
    rotation,
    out,
    lse,
    history,
    sinks,
    recent,
    kv_heads,
    group,
    rows,
    new_tokens,
    splits,
    q_b,
    q_h,
    q_t,
    sk_b,
    sk_h,
    sk_t,
    sv_b,
    sv_h,
    sv_t,
    rk_b,
    rk_h,
    rk_t,
    rv_b,
    rv_h,
    rv_t,
    m_b,
    m_h,
    m_t,
    m_k,
    scaling,
    softcap,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DKP: tl.constexpr,
    DVP: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per sequence and KV head: splits, rotated back, with sinks and recent tokens in float32."""
    batch = tl.program_id(0) // kv_heads
    head = tl.program_id(0) % kv_heads
    row = tl.arange(0, ROWS)
    dk = tl.arange(0, DKP)
    dv = tl.arange(0, DVP)
    token = tl.arange(0, 32)
    real = row < rows
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DVP), tl.float32)
    for split in range(splits):
        place = (tl.program_id(0) * splits + split) * ROWS + row
        other = tl.load(stats + place * 2)
        higher = tl.maximum(top, other)
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp2((top - anchor) * LOG2E)
        gain = tl.exp2((other - anchor) * LOG2E)
        total = total * fade + tl.load(stats + place * 2 + 1) * gain
        acc = acc * fade[:, None] + tl.load(partial + place[:, None] * DVP + dv[None, :]) * gain[:, None]
        top = higher
    square = (dv[:, None] < DV) & (dv[None, :] < DV)
    r = tl.load(rotation + dv[:, None] * DV + dv[None, :], mask=square, other=0.0)
    acc = tl.dot(acc, r, input_precision=PRECISION)
    q_row = batch * q_b + (head * group + row % group) * q_h + (row // group) * q_t
    q = tl.load(query + q_row[:, None] + dk[None, :], mask=real[:, None] & (dk[None, :] < DK), other=0.0).to(
        tl.float32
    )
    for step in range(tl.cdiv(sinks, 32) + tl.cdiv(recent, 32)):
        is_sink = step < tl.cdiv(sinks, 32)
        t = tl.where(is_sink, step, step - tl.cdiv(sinks, 32)) * 32 + token
        count = tl.where(is_sink, sinks, recent)
        inside = t < count
        if is_sink:
            key_at = sink_keys + batch * sk_b + head * sk_h + t * sk_t
            value_at = sink_values + batch * sv_b + head * sv_h + t * sv_t
        else:
            key_at = recent_keys + batch * rk_b + head * rk_h + t * rk_t
            value_at = recent_values + batch * rv_b + head * rv_h + t * rv_t
        k = tl.load(key_at[:, None] + dk[None, :], mask=inside[:, None] & (dk[None, :] < DK), other=0.0)
        v = tl.load(value_at[:, None] + dv[None, :], mask=inside[:, None] & (dv[None, :] < DV), other=0.0)
        logits = tl.dot(q, tl.trans(k.to(tl.float32)), input_precision=PRECISION) * scaling
        logits = _capped(logits, SOFTCAP, softcap)
        seen = inside[None, :] & real[:, None]
        if MASKED:
            position = tl.where(is_sink, t, sinks + history + t)
            at = batch * m_b + (head * group + row % group)[:, None] * m_h + (row // group)[:, None] * m_t
            seen = seen & (tl.load(mask + at + position[None, :] * m_k, mask=seen, other=0) != 0)
        else:
            seen = seen & (is_sink | (t[None, :] <= recent - new_tokens + (row // group)[:, None]))
        logits = tl.where(seen, logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp2((top - anchor) * LOG2E)
        weight = tl.exp2((logits - anchor[:, None]) * LOG2E)
        # what no row sees is taken out of the product: 0 times NaN is NaN
        used = tl.max(seen.to(tl.int32), 0) > 0
        v = tl.where(used[:, None], v.to(tl.float32), 0.0)
        total = total * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None] + tl.dot(weight, v, input_precision=PRECISION)
        top = higher
    result = tl.where(total[:, None] == 0.0, 0.0, acc / total[:, None])
    o_row = ((batch * kv_heads + head) * group + row % group) * new_tokens + row // group
    tl.store(
        out + o_row[:, None] * DV + dv[None, :],
        result.to(out.dtype.element_ty),
        mask=real[:, None] & (dv[None, :] < DV),
    )
    tl.store(lse + o_row, tl.where(total == 0.0, -float("inf"), top + tl.log(total)), mask=real)
