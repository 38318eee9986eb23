"""bfloat16 as bits: the upper half of a float32, held as uint16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST", "NAN_BITS", "from_bits", "to_bits"]

LARGEST = float.fromhex("0x1.fep127")
"""The largest finite bfloat16, about 3.39e38 (bits 0x7f7f)."""

NAN_BITS = 0x7FC0
"""The one NaN that `to_bits` makes."""


def to_bits(values: NDArray[np.floating]) -> NDArray[np.uint16]:
    """The nearest bfloat16 of `values` (any shape) as bits; a tie goes to the even one.

    `values` go through float32 first. Beyond `LARGEST` plus half a step lies infinity; every NaN becomes
    `NAN_BITS`; subnormals are kept.
    """
    with np.errstate(over="ignore"):
        single = np.asarray(values).astype(np.float32)
    bits = single.view(np.uint32)
    # Adding just under half a step, and one more where the kept part is odd, carries upwards exactly
    # when the part that falls away is more than half a step, or half and the kept part odd.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    out: NDArray[np.uint16] = np.where(np.isnan(single), np.uint16(NAN_BITS), rounded.astype(np.uint16))
    return out


def from_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values of bfloat16 `bits`, exact."""
    out: NDArray[np.float32] = (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return out
