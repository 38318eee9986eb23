"""Codebooks by soft assignment: every point belongs to all levels a little, and less and less so.

Membership of a point x in level k is softmax_k(-(x - c_k)^2 / t); each level moves to the mean of its
members, the temperature t falls, and in the end the assignment is that of Lloyd's algorithm. On a fine
grid of the coordinate's density instead of samples, so that nothing is random.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tqai.core.lloyd_max import TAIL, companding_start
from tqai.errors import ConfigError

__all__ = ["solve_fuzzy"]

GRID = 4096
COLDEST = 1e-6
"""Where the temperature ends, relative to the squared mean gap between levels."""


def solve_fuzzy(d: int, bits: int, cooling: float = 0.7, steps: int = 120) -> NDArray[np.float64]:
    """Positive half `[2**(bits-1)]` of the codebook, from the quantiles that many bits tend to.

    Args:
        cooling: factor of the temperature per step, above 0 and below 1.
        steps: at most so many, at least 1.

    Raises:
        ConfigError: cooling or steps out of range.
    """
    if not 0.0 < cooling < 1.0:
        raise ConfigError(f"cooling={cooling!r}: allowed are numbers between 0 and 1")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps={steps!r}: allowed are whole numbers from 1")
    limit = min(0.5 * math.pi, TAIL / math.sqrt(d))
    angles = (np.arange(GRID) + 0.5) / GRID * limit
    points, weights = np.sin(angles), np.cos(angles) ** (d - 2)
    levels = companding_start(d, 2 ** (bits - 1))
    reach = float(levels[-1])
    gap = reach / len(levels)
    temperature = 0.25 * gap * gap
    for _ in range(steps):
        # a point and its mirror image: negative levels are mirror images too, but far enough to matter
        # only for those next to 0
        whole = np.concatenate([-levels[:1], levels])
        nearness = -((points[:, None] - whole) ** 2) / temperature
        share = np.exp(nearness - nearness.max(-1, keepdims=True))
        share = share / share.sum(-1, keepdims=True) * weights[:, None]
        mirrored = share[:, 0]
        own, moments = share[:, 1:].sum(0), points @ share[:, 1:]
        own[0] += mirrored.sum()
        moments[0] -= points @ mirrored
        updated = np.where(own > 0.0, moments / np.where(own > 0.0, own, 1.0), levels)
        moved = float(np.max(np.abs(updated - levels)))
        levels = np.maximum.accumulate(np.maximum(updated, 1e-12))
        cold = temperature <= COLDEST * gap * gap
        if cold and moved < 1e-9 * reach:
            break
        temperature = max(temperature * cooling, COLDEST * gap * gap)
    return levels
