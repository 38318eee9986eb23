"""The trellis codecs of `core.trellis` in MLX operations, in float32.

Looking up is a gather: the window of a code holds the codes that follow it on the circle. Encoding is the
Viterbi algorithm of `core.viterbi`, a step at a time for many vectors at once; slow beside the native
kernels (docs/mlx.md has the rate). There is no Metal kernel for these codes: MLX operations serve them.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from tqai.backends.mlx.codes import MlxCodec, pack, unpack
from tqai.core.codec import Codec
from tqai.core.rotated import SMALLEST_NORMAL
from tqai.core.trellis import TrellisCodec
from tqai.core.viterbi import SEAM_STEPS

__all__ = ["MlxTrellisCodec"]

Array = Any

SUMS_BYTES = 1 << 26
"""Bytes of stored path sums of the vectors that are encoded at once."""


class MlxTrellisCodec(MlxCodec):
    """Trellis codes in place of scalar ones; everything else is `MlxCodec`'s.

    Attributes:
        levels: float32 `[2**L]`, the whole number that a window stands for, in units of the table's step.
    """

    def __init__(self, codec: Codec) -> None:
        assert isinstance(codec, TrellisCodec)
        self._adopt_rotation(codec)
        self.state_bits = codec.code.state_bits
        self.window_bits = codec.code.window_bits
        self.levels = mx.array(codec.code.window_levels).astype(mx.float32)
        self._values = mx.array(codec.tables()["windows"])
        self._per_deviation = self.head_dim**0.5 / codec.code.step
        mx.eval(self.levels, self._values)

    def lookup(self, codes: Array) -> Array:
        """See `MlxCodec.lookup`; the same to the bit as core."""
        one = unpack(codes, self.bits, self.head_dim).astype(mx.uint32)
        windows = one
        for ahead in range(1, -(-self.window_bits // self.bits)):
            windows = windows | (mx.roll(one, -ahead, -1) << (ahead * self.bits))
        return mx.take(self._values, windows & ((1 << self.window_bits) - 1))

    def encode(self, vectors: Array) -> tuple[Array, Array]:
        """See `MlxCodec.encode`; special values as `core.trellis` has them. The squared error is that of
        core within 0.1 % (tests/backends/mlx/test_trellis.py)."""
        rotated, largest = self.rotated_rows(vectors)
        usable = mx.isfinite(largest) & (largest >= SMALLEST_NORMAL)
        norm = mx.sqrt((rotated * rotated).sum(-1, keepdims=True))
        targets = rotated * (self._per_deviation / mx.where(usable, norm, 1.0))
        windows = self._tail_biting_path(targets.reshape(-1, self.head_dim)).reshape(targets.shape)
        codes = mx.where(usable, windows & ((1 << self.bits) - 1), 0)
        return pack(codes, self.bits), self.scales_of(rotated, norm, largest, mx.take(self._values, windows))

    def _tail_biting_path(self, targets: Array) -> Array:
        """Windows int32 `[rows, head_dim]`: `core.viterbi.tail_biting_path`."""
        states = 1 << self.state_bits
        rows = max(SUMS_BYTES // (4 * states * (max(self.head_dim, 2 * SEAM_STEPS) + 1)), 1)
        around = mx.arange(-SEAM_STEPS, SEAM_STEPS) % self.head_dim
        parts = []
        for start in range(0, targets.shape[0], rows):
            block = targets[start : start + rows]
            seam = self._path(mx.take(block, around, axis=1), None)[:, SEAM_STEPS] & (states - 1)
            parts.append(self._path(block, seam))
            mx.eval(parts[-1])  # or the sums of all blocks are alive at once
        return mx.concatenate(parts) if parts else mx.zeros(targets.shape, dtype=mx.int32)

    def _path(self, targets: Array, ends: Array | None) -> Array:
        """Windows int32 `[rows, steps]`: `core.viterbi.cheapest_path`, laid out as there."""
        rows, steps = targets.shape
        states, choices = 1 << self.state_bits, 1 << self.bits
        groups = states // choices
        by_choice = self.levels.reshape(choices, groups, choices).transpose(2, 0, 1)
        squares = by_choice * by_choice
        if ends is None:
            sums = [mx.zeros((rows, states))]
        else:
            sums = [mx.where(mx.arange(states) == ends[:, None], 0.0, 1e30)]
        for step in range(steps):
            before = sums[-1].reshape(rows, groups, choices).transpose(0, 2, 1)[:, :, None]
            cost = squares - 2.0 * targets[:, step, None, None, None] * by_choice
            best = (cost + before).min(1).reshape(rows, states)
            sums.append(best - best.min(1, keepdims=True))
            mx.eval(sums[-1])
        state = sums[-1].argmin(-1).astype(mx.int32) if ends is None else ends
        windows: list[Array] = []
        for step in range(steps - 1, -1, -1):
            ways = state[:, None] * choices + mx.arange(choices, dtype=mx.int32)
            value = mx.take(self.levels, ways)
            cost = mx.take_along_axis(sums[step], ways & (states - 1), axis=1)
            cost = cost + value * (value - 2.0 * targets[:, step, None])
            best = cost.argmin(-1, keepdims=True)
            chosen = mx.take_along_axis(ways, best, axis=1).squeeze(1)
            windows.append(chosen)
            state = chosen & (states - 1)
        return mx.stack(windows[::-1], axis=1)
