"""The cheapest tail-biting path through a bitshift trellis, in numpy; other encoders are held to this one.

A path is a circular string of n * bits bits; step i reads the window of L bits that starts at bit i * bits
and costs (target_i - table[window])^2. State i is the low S bits of window i, state i + 1 its high S bits:

    window i      | newest bits | . . . . . . . . |
                  '---- state i + 1 ----'         |        S = L - bits
                          '------ state i --------'

so the K = 2**bits windows that end in a state come from K consecutive states. The minimum over them is all
that a step computes; which one it was is found again on the way back, from the stored sums.

A circle has no beginning: the state at the seam comes from a pass over `SEAM_STEPS` steps on either side of
it (around the circle again, where it is shorter), and a second pass starts and ends there. The cost is 0.1
to 0.5 % above that of the best of all seam states.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["SEAM_STEPS", "cheapest_path", "tail_biting_path"]

SEAM_STEPS = 64
BLOCK_ROWS = 256
UNREACHABLE = np.float32(1e30)

Floats = NDArray[np.float32]


def tail_biting_path(targets: NDArray[np.floating], table: Floats, state_bits: int) -> NDArray[np.int32]:
    """Windows `[rows, n]`, each below 2**L, of a nearly cheapest circular path for `targets` `[rows, n]`.

    Args:
        targets: finite numbers in the units of `table`, small enough for squares in float32.
        table: float32 `[2**L]`, the value of every window.
        state_bits: S; L - S is the number of bits per step.
    """
    rows, steps = targets.shape
    out = np.empty((rows, steps), dtype=np.int32)
    around = np.arange(-SEAM_STEPS, SEAM_STEPS) % steps
    for start in range(0, rows, BLOCK_ROWS):
        block = targets[start : start + BLOCK_ROWS].astype(np.float32)
        seam = cheapest_path(block[:, around], table, state_bits)[:, SEAM_STEPS] & ((1 << state_bits) - 1)
        out[start : start + BLOCK_ROWS] = cheapest_path(block, table, state_bits, seam)
    return out


def cheapest_path(
    targets: Floats, table: Floats, state_bits: int, ends: NDArray[np.int32] | None = None
) -> NDArray[np.int32]:
    """Windows `[rows, steps]` of the cheapest path, that begins and ends in the states `ends` if given.

    Memory: 4 * 2**state_bits bytes per target.
    """
    rows, steps = targets.shape
    states = 1 << state_bits
    choices = len(table) // states
    # sums[i + 1][row, r, p] of state r * states/choices + p; what leads there are states choices * p + k
    by_choice = np.ascontiguousarray(table.reshape(choices, states // choices, choices).transpose(2, 0, 1))
    squares = by_choice * by_choice
    sums = np.empty((steps + 1, rows, choices, states // choices), dtype=np.float32)
    sums[0] = 0.0
    if ends is not None:
        sums[0] = UNREACHABLE
        sums[0].reshape(rows, states)[np.arange(rows), ends] = 0.0
    for step in range(steps):
        before = sums[step].reshape(rows, 1, states // choices, choices)
        twice = (2.0 * targets[:, step])[:, None, None]
        best = sums[step + 1]
        for k in range(choices):
            cost = before[..., k] + (squares[k] - twice * by_choice[k])
            if k == 0:
                best[...] = cost
            else:
                np.minimum(best, cost, out=best)
        best -= best.min(axis=(1, 2), keepdims=True)
    row = np.arange(rows)[:, None]
    state = np.argmin(sums[steps].reshape(rows, states), axis=-1) if ends is None else ends
    windows = np.empty((rows, steps), dtype=np.int32)
    for step in range(steps - 1, -1, -1):
        ways = (state[:, None] * choices) | np.arange(choices)
        value = table[ways]
        cost = sums[step].reshape(rows, states)[row, ways & (states - 1)] + (
            value * value - 2.0 * targets[:, step, None] * value
        )
        chosen = ways[row[:, 0], np.argmin(cost, axis=-1)]
        windows[:, step] = chosen
        state = chosen & (states - 1)
    return windows
