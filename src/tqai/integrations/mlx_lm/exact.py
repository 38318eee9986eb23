"""Exact tokens and arrays like them: joined, cut out, filled up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from tqai.backends.base import ExactTokens

__all__ = ["joined", "owned", "widened"]

Array = Any


def joined(parts: Sequence[ExactTokens]) -> ExactTokens:
    """The tokens of all parts, in order; the part itself where there is only one."""
    if len(parts) == 1:
        return parts[0]
    return ExactTokens(*(mx.concatenate([part[side] for part in parts], axis=2) for side in range(2)))


def owned(tokens: ExactTokens, start: int, stop: int, rows: Array | None = None) -> ExactTokens:
    """Tokens start..stop-1 (of sequences `rows`) in arrays of their own, not views of larger ones."""
    chosen = (x if rows is None else x[rows] for x in tokens)
    return ExactTokens(*(mx.contiguous(x[:, :, start:stop]) for x in chosen))


def widened(array: Array, width: int, left: bool) -> Array:
    """`array` with axis 2 filled up with zeros to `width` columns, on the left or on the right; cut on
    that side if it has more."""
    have = array.shape[2]
    if have == width:
        return array
    if have > width:
        return array[:, :, have - width :] if left else array[:, :, :width]
    pads = [(0, 0)] * array.ndim
    pads[2] = (width - have, 0) if left else (0, width - have)
    return mx.pad(array, pads)
