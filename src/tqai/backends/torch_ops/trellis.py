"""The trellis codecs of `core.trellis` on one torch device, in float32.

Several coordinates are looked up at once, as their windows overlap in all but a few bits:

    1, 2, 4 bits   a byte and the next S bits of the circle    2**(S + 8) entries of 8, 4, 2 values
    3 bits         6 bits of a word of 24, and the next S      2**(S + 6) entries of 2 values

Encoding is the Viterbi algorithm of `core.viterbi`, step by step for many vectors at once: a fallback for
devices without a kernel of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tqai.backends.torch_ops.codes import pack, unpack
from tqai.backends.torch_ops.rotated import rotated, scales_of, unrotated
from tqai.core.codec import Codec
from tqai.core.trellis import TrellisCodec
from tqai.core.viterbi import SEAM_STEPS

__all__ = ["TorchTrellisCodec"]

SUMS_BYTES = {"cpu": 1 << 24}
"""Bytes of stored path sums of the vectors that are encoded at once; on a CPU little more than its cache."""
MOST_SUMS_BYTES = 1 << 28


class TorchTrellisCodec:
    """Trellis codes; see `TorchForm`.

    Attributes:
        levels: float32 `[2**L]`, the whole number that a window stands for, in units of `step`.
    """

    def __init__(self, codec: Codec, device: torch.device) -> None:
        assert isinstance(codec, TrellisCodec)
        self.head_dim = codec.spec.head_dim
        self.bits = codec.spec.bits
        self.row_bytes = codec.row_bytes
        self.scale_rule = codec.spec.scale
        self.state_bits = codec.code.state_bits
        self.window_bits = codec.code.window_bits
        self.rotation = torch.from_numpy(codec.rotation_matrix.copy()).to(device, torch.float32)
        self.levels = torch.from_numpy(codec.code.window_levels.copy()).to(device, torch.float32)
        self._per_deviation = self.head_dim**0.5 / codec.code.step
        self._values = torch.from_numpy(codec.tables()["windows"].copy()).to(device)
        self._whole_words = self.head_dim * self.bits % (24 if self.bits == 3 else 8) == 0
        fresh_bits = 6 if self.bits == 3 else 8
        wide = torch.arange(1 << (self.state_bits + fresh_bits), device=device)
        shifts = torch.arange(0, fresh_bits, self.bits, device=device)
        self._run_table = self._values[(wide[:, None] >> shifts) & ((1 << self.window_bits) - 1)]

    def lookup(self, codes: Tensor) -> Tensor:
        """See `TorchForm.lookup`."""
        if not self._whole_words:
            return self._values[self._windows(unpack(codes, self.bits, self.head_dim))]
        octets = codes.int()
        if self.bits == 3:
            first, second, third = octets.unflatten(-1, (-1, 3)).unbind(-1)
            words = first | second << 8 | third << 16 | first.roll(-1, -1) << 24
            shifts = torch.arange(0, 24, 6, dtype=torch.int32, device=codes.device)
            runs = (words.unsqueeze(-1) >> shifts).flatten(-2) & ((1 << (self.state_bits + 6)) - 1)
        else:
            runs = octets | (octets.roll(-1, -1) & ((1 << self.state_bits) - 1)) << 8
        return F.embedding(runs, self._run_table).flatten(-2)

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """See `TorchForm.encode`; special values as `core.trellis` has them."""
        found = rotated(vectors, self.rotation)
        targets = found.y * (self._per_deviation / found.norm)
        windows = self._tail_biting_path(targets.flatten(0, -2)).reshape(targets.shape)
        codes = torch.where(found.usable, windows & ((1 << self.bits) - 1), 0)
        return pack(codes, self.bits), scales_of(found, self._values[windows], self.scale_rule)

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """See `TorchForm.decode`."""
        return unrotated(self.lookup(codes), scales, self.rotation, dtype)

    def _windows(self, codes: Tensor) -> Tensor:
        windows = codes.clone()
        for ahead in range(1, -(-self.window_bits // self.bits)):
            windows |= codes.roll(-ahead, -1) << (ahead * self.bits)
        return windows & ((1 << self.window_bits) - 1)

    def _tail_biting_path(self, targets: Tensor) -> Tensor:
        """Windows int64 `[rows, head_dim]`: `core.viterbi.tail_biting_path`."""
        states = 1 << self.state_bits
        budget = SUMS_BYTES.get(targets.device.type, MOST_SUMS_BYTES)
        block_rows = max(budget // (4 * states * (max(self.head_dim, 2 * SEAM_STEPS) + 1)), 1)
        around = torch.arange(-SEAM_STEPS, SEAM_STEPS, device=targets.device) % self.head_dim
        parts = []
        for block in targets.split(block_rows):
            seam = self._path(block[:, around], None)[:, SEAM_STEPS] & (states - 1)
            parts.append(self._path(block, seam))
        return torch.cat(parts) if parts else targets.new_empty(targets.shape, dtype=torch.int64)

    def _path(self, targets: Tensor, ends: Tensor | None) -> Tensor:
        """Windows int64 `[rows, steps]`: `core.viterbi.cheapest_path`, laid out as there."""
        rows, steps = targets.shape
        states, choices = 1 << self.state_bits, 1 << self.bits
        by_choice = self.levels.view(choices, states // choices, choices).permute(2, 0, 1).contiguous()
        squares = by_choice.square()
        sums = targets.new_empty((steps + 1, rows, states))
        if ends is None:
            sums[0] = 0.0
        else:
            sums[0] = 1e30
            sums[0].scatter_(1, ends.unsqueeze(1), 0.0)
        for step in range(steps):
            before = sums[step].view(rows, states // choices, choices).transpose(1, 2).unsqueeze(2)
            cost = torch.addcmul(squares, targets[:, step, None, None, None], by_choice, value=-2.0)
            best = cost.add_(before).amin(1).view(rows, states)
            torch.sub(best, best.amin(1, keepdim=True), out=sums[step + 1])
        state = sums[steps].argmin(-1) if ends is None else ends
        way = torch.arange(choices, device=targets.device)
        windows = torch.empty((rows, steps), dtype=torch.int64, device=targets.device)
        for step in range(steps - 1, -1, -1):
            ways = state.unsqueeze(1) * choices | way
            value = self.levels[ways]
            cost = sums[step].gather(1, ways & (states - 1)) + value * (value - 2.0 * targets[:, step, None])
            windows[:, step] = chosen = ways.gather(1, cost.argmin(-1, keepdim=True)).squeeze(1)
            state = chosen & (states - 1)
        return windows
