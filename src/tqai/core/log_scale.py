"""Scales of a page in one byte each: so many sixteenths of an octave below the largest of them.

    scale_t ~= base * 2^(-byte_t / 16)         base: the largest finite scale of these 64 vectors, bfloat16

    byte      0        1            ...    253            254     255
    scale     base     base * 0.958        base * 2^-15.8  0       NaN

They are made from the bfloat16 scales that the codecs give, so codecs and their kernels know nothing of
them. A factor of 2^(1/16) between neighbours makes a relative mean squared error of (ln 2 / 16)^2 / 12 =
0.00016 of a vector's energy where scales are spread evenly; the largest scale of a page is exact. A scale
below half the smallest step counts as zero: its vector is less than 2^-16.8 of the page's largest.

Level and thresholds are float32, products and quotients are single float32 operations, so every backend
makes the same bytes of the same scales, and the same numbers of the same bytes, to the last bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tqai.core import bfloat16

__all__ = ["LEVELS", "NAN_BYTE", "THRESHOLDS", "ZERO_BYTE", "from_steps", "to_steps"]

STEPS_PER_OCTAVE = 16
ZERO_BYTE = 254
NAN_BYTE = 255

LEVELS: NDArray[np.float32] = np.exp2(-np.arange(ZERO_BYTE) / STEPS_PER_OCTAVE).astype(np.float32)
"""Float32 `[254]`: what a scale is over the base, of bytes 0 to 253."""

THRESHOLDS: NDArray[np.float32] = np.append(
    np.exp2(-(np.arange(ZERO_BYTE - 1) + 0.5) / STEPS_PER_OCTAVE), 0.5 * float(LEVELS[-1])
).astype(np.float32)
"""Float32 `[254]`, descending: a ratio r has as byte the number of thresholds above r."""


def to_steps(scales: NDArray[np.uint16]) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Bytes `[..., n]` and bases `[...]` (bfloat16 bits) of the bfloat16 bits `scales` `[..., n]`.

    NaN and infinite scales become `NAN_BYTE`; those of zero, and of less than 2^-16.8 of the largest,
    `ZERO_BYTE`. Without a finite scale above zero the base is 0.
    """
    numbers = bfloat16.from_bits(scales)
    finite = np.isfinite(numbers)
    numbers = np.where(finite, numbers, np.float32(0.0))
    base = numbers.max(-1, keepdims=True, initial=np.float32(0.0))
    ratios = numbers / np.where(base > 0, base, np.float32(1.0))
    steps = np.searchsorted(-THRESHOLDS, -ratios, side="left").astype(np.uint8)
    return np.where(finite, steps, np.uint8(NAN_BYTE)), bfloat16.to_bits(base[..., 0])


def from_steps(steps: NDArray[np.uint8], bases: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Scales float32 `[..., n]` of bytes `[..., n]` and bases `[...]`; exact, see the module's text."""
    table = np.concatenate([LEVELS, np.array([0.0, np.nan], dtype=np.float32)])
    out: NDArray[np.float32] = table[steps] * bfloat16.from_bits(bases)[..., None]
    return out
