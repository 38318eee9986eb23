"""Two partial attention results into one, in one launch: what takes torch eight."""

# mypy: ignore-errors
# Kernels are compiled by Triton, which gives their names meanings of its own.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["merge"]

ROWS = 16


@triton.jit
def _merge(
    one, one_lse, other, other_lse, out, lse, rows, dim,
    a_n, a_h, a_r, al_n, al_h, al_r, b_n, b_h, b_r, bl_n, bl_h, bl_r, o_n, o_h, o_r, ol_n, ol_h, ol_r,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    row, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    present = row < rows
    every = present[:, None] & (column < dim)[None, :]
    one += number * a_n + head * a_h + row[:, None] * a_r + column[None, :]
    other += number * b_n + head * b_h + row[:, None] * b_r + column[None, :]
    out += number * o_n + head * o_h + row[:, None] * o_r + column[None, :]
    first_lse = tl.load(one_lse + number * al_n + head * al_h + row * al_r, mask=present, other=0.0)
    second_lse = tl.load(other_lse + number * bl_n + head * bl_h + row * bl_r, mask=present, other=0.0)
    top = tl.maximum(first_lse, second_lse)
    first, second = tl.exp(first_lse - top), tl.exp(second_lse - top)
    total = first + second
    made = tl.load(one, mask=every, other=0.0).to(tl.float32) * (first / total)[:, None]
    made += tl.load(other, mask=every, other=0.0).to(tl.float32) * (second / total)[:, None]
    tl.store(out, made.to(out.dtype.element_ty), mask=every)
    tl.store(lse + number * ol_n + head * ol_h + row * ol_r, top + tl.log(total), mask=present)


def merge(one: Tensor, one_lse: Tensor, other: Tensor, other_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write to `out` `[n, heads, rows, dim]` what `one` and `other` of that shape, attention to some tokens
    and to others, are together, and to the float32 `lse` `[n, heads, rows]` its log-sum-exp. Any dtypes, and
    any strides but of the last axis of the first three. Every row has seen something on both sides."""
    number, heads, rows, dim = out.shape
    _merge[number * heads, triton.cdiv(rows, ROWS)](
        one, one_lse, other, other_lse, out, lse, rows, dim,
        *one.stride()[:3], *one_lse.stride(), *other.stride()[:3], *other_lse.stride(),
        *out.stride()[:3], *lse.stride(),
        heads, triton.next_power_of_2(dim), ROWS,
    )  # fmt: skip
