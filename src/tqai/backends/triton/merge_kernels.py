"""Triton kernels: queries into the rotated space, and splits merged with the exact tokens and rotated back.

One program serves one query row (new token and head) and some columns of the result, in float32: there is
little to do, and many small programs do it soonest.
"""

# mypy: ignore-errors
# Kernels are compiled by Triton, which gives their names meanings of its own.
import triton
import triton.language as tl

from tqai.backends.triton.unpack import capped

__all__ = ["merge_splits", "rotate_queries"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rotate_queries(
    query,
    rotation,
    rotated,
    norms,
    kv_heads,
    group,
    rows,
    q_b,
    q_h,
    q_t,
    scaling,
    DIM: tl.constexpr,
    DIMP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A query row times R transposed over its norm, float16 `[segments, rows, DIM]`; norm times scaling."""
    segment = tl.program_id(0) // rows
    row = tl.program_id(0) % rows
    d = tl.arange(0, DIMP)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = segment // kv_heads * q_b + (segment % kv_heads * group + row % group) * q_h + row // group * q_t
    inside = (d[:, None] < DIM) & (column[None, :] < DIM)
    r = tl.load(rotation + d[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    q = tl.load(query + at + d, mask=d < DIM, other=0.0).to(tl.float32)
    # a query of 1e20 has no float32 square
    most = tl.max(tl.abs(q), 0)
    most = tl.where(most > 0.0, most, 1.0)
    q = q / most
    norm = tl.sqrt(tl.sum(q * q, 0))
    y = tl.sum(q[:, None] * r, 0) / tl.where(norm > 0.0, norm, 1.0)
    tl.store(rotated + tl.program_id(0) * DIM + column, y.to(tl.float16), mask=column < DIM)
    if tl.program_id(1) == 0:
        tl.store(norms + tl.program_id(0), norm * most * scaling)


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
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One program per query row and COLUMNS columns. `stats` are (largest logit in base 2, sum) of splits."""
    segment = tl.program_id(0) // rows
    row = tl.program_id(0) % rows
    batch = segment // kv_heads
    head = segment % kv_heads
    dk = tl.arange(0, DKP)
    dv = tl.arange(0, DVP)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.arange(0, 32)
    # asked for first, needed last
    r = tl.load(
        rotation + dv[:, None] * DV + column[None, :],
        mask=(dv[:, None] < DV) & (column[None, :] < DV),
        other=0.0,
    )
    q_at = query + batch * q_b + (head * group + row % group) * q_h + row // group * q_t
    q = tl.load(q_at + dk, mask=dk < DK, other=0.0).to(tl.float32)
    whole = tl.arange(0, SPLITS)
    place = (segment * splits + whole) * ROWS + row
    others = tl.load(stats + place * 2, mask=whole < splits, other=-float("inf"))
    top = tl.max(others, 0)
    anchor = tl.where(top == -float("inf"), 0.0, top)
    sums = tl.load(stats + place * 2 + 1, mask=whole < splits, other=0.0)
    total = tl.sum(sums * tl.exp2(others - anchor), 0)
    found = tl.zeros((CHUNK, DVP), tl.float32)
    for start in range(0, splits, CHUNK):
        part = start + tl.arange(0, CHUNK)
        here = (segment * splits + part) * ROWS + row
        gain = tl.exp2(tl.load(stats + here * 2, mask=part < splits, other=-float("inf")) - anchor)
        inside = (part[:, None] < splits) & (dv[None, :] < DV)
        found += tl.load(partial + here[:, None] * DV + dv[None, :], mask=inside, other=0.0) * gain[:, None]
    acc = tl.sum(tl.sum(found, 0)[:, None] * r, 0)
    for step in range(tl.cdiv(sinks, 32) + tl.cdiv(recent, 32)):
        is_sink = step < tl.cdiv(sinks, 32)
        t = tl.where(is_sink, step, step - tl.cdiv(sinks, 32)) * 32 + token
        seen = t < tl.where(is_sink, sinks, recent)
        if is_sink:
            key_at = sink_keys + batch * sk_b + head * sk_h + t * sk_t
            value_at = sink_values + batch * sv_b + head * sv_h + t * sv_t
        else:
            key_at = recent_keys + batch * rk_b + head * rk_h + t * rk_t
            value_at = recent_values + batch * rv_b + head * rv_h + t * rv_t
        if MASKED:
            position = tl.where(is_sink, t, sinks + history + t)
            at = batch * m_b + (head * group + row % group) * m_h + row // group * m_t
            seen = seen & (tl.load(mask + at + position * m_k, mask=seen, other=0) != 0)
        else:
            seen = seen & (is_sink | (t <= recent - new_tokens + row // group))
        # what is out of sight is not read: 0 times NaN is NaN
        k = tl.load(key_at[:, None] + dk[None, :], mask=seen[:, None] & (dk[None, :] < DK), other=0.0)
        v = tl.load(
            value_at[:, None] + column[None, :], mask=seen[:, None] & (column[None, :] < DV), other=0.0
        )
        logits = tl.sum(k.to(tl.float32) * q[None, :], 1) * scaling
        logits = tl.where(seen, capped(logits, SOFTCAP, softcap) * LOG2E, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 0))
        anchor = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp2(top - anchor)
        weight = tl.exp2(logits - anchor)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade + tl.sum(v.to(tl.float32) * weight[:, None], 0)
        top = higher
    result = tl.where(total == 0.0, 0.0, acc / total)
    o_row = ((batch * kv_heads + head) * group + row % group) * new_tokens + row // group
    tl.store(out + o_row * DV + column, result.to(out.dtype.element_ty), mask=column < DV)
    if tl.program_id(1) == 0:
        tl.store(lse + o_row, tl.where(total == 0.0, -float("inf"), (top + tl.log2(total)) / LOG2E))
