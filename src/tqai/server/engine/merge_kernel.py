"""Two partial attention results into one, in one launch: what takes torch eight."""

# mypy: ignore-errors
# Kernels are compiled by Triton, which gives their names meanings of its own.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["take_into"]

ROWS = 16


@triton.jit
def _take_into(
    held, held_lse, out, lse, rows, dim,
    h_n, h_h, h_r, hl_n, hl_h, hl_r, o_n, o_h, o_r, l_n, l_h, l_r,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    number, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    row, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    present = row < rows
    every = present[:, None] & (column < dim)[None, :]
    held += number * h_n + head * h_h + row[:, None] * h_r + column[None, :]
    held_lse += number * hl_n + head * hl_h + row * hl_r
    out += number * o_n + head * o_h + row[:, None] * o_r + column[None, :]
    new = tl.load(out, mask=every, other=0.0).to(tl.float32)
    new_lse = tl.load(lse + number * l_n + head * l_h + row * l_r, mask=present, other=0.0)
    if not FIRST:
        before = tl.load(held_lse, mask=present, other=0.0)
        top = tl.maximum(before, new_lse)
        share, new_share = tl.exp(before - top), tl.exp(new_lse - top)
        total = share + new_share
        kept = tl.load(held, mask=every, other=0.0)
        new = (kept * share[:, None] + new * new_share[:, None]) / total[:, None]
        new_lse = top + tl.log(total)
    tl.store(held, new, mask=every)
    tl.store(held_lse, new_lse, mask=present)


def take_into(held: Tensor, held_lse: Tensor, out: Tensor, lse: Tensor, first: bool) -> None:
    """Merge `out` `[n, heads, rows, dim]` with log-sum-exp `lse` `[n, heads, rows]` into the float32 `held`
    and `held_lse`, any strides but of the last axis of `held` and `out`; `first`: overwrite them.
    Every row has seen something on both sides."""
    number, heads, rows, dim = out.shape
    _take_into[number * heads, triton.cdiv(rows, ROWS)](
        held, held_lse, out, lse, rows, dim,
        *held.stride()[:3], *held_lse.stride(), *out.stride()[:3], *lse.stride(),
        heads, triton.next_power_of_2(dim), ROWS, first,
    )  # fmt: skip
