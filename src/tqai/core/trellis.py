"""The trellis codec: rotate, the cheapest path through a tail-biting bitshift trellis, one scale per vector.

    y      = x @ R.T                                R from `core.rotation`
    row    = circular string of head_dim * bits bits, the same number as the scalar codec's
    w_i    = its L bits from bit i * bits on        L = bits + 6 ("trellis", 64 states) or bits + 8
    c_i    = value(w_i) / sqrt(head_dim)            `core.trellis_code`; neighbours share all but `bits` bits
    codes  = those whose c is nearest to y / |y|    `core.viterbi`
    scale  = <y, c> / <c, c>  (least squares)  or  |y|  (norm), to bfloat16
    x^     = (scale * c) @ R

Any coordinate is decoded alone, from L bits. Trellis-coded quantization: Marcellin and Fischer, IEEE Trans.
Comm. 38 (1990); the bitshift trellis and tail-biting for model weights: QTIP (arXiv 2406.11235).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tqai.config import SCALES
from tqai.core import bfloat16
from tqai.core.codec import CodecSpec, Encoded, register_codec
from tqai.core.packing import pack, packed_bytes, unpack
from tqai.core.rotated import RotatedCodec, rotated, scales_of
from tqai.core.rotation import checked_seed, resolve
from tqai.core.trellis_code import TrellisCode, trellis_code
from tqai.core.viterbi import tail_biting_path
from tqai.errors import ConfigError

__all__ = ["MIN_HEAD_DIM", "STATES", "TrellisCodec", "windows_of"]

STATES = {"trellis": 6, "trellis256": 8}
"""Codec name -> bits of the state."""
MIN_HEAD_DIM = 16


def windows_of(codes: NDArray[np.uint8], bits: int, window_bits: int) -> NDArray[np.int32]:
    """Windows `[..., n]` of unpacked codes `[..., n]`: code i is the low `bits` bits of window i."""
    windows = np.zeros(codes.shape, dtype=np.int32)
    for ahead in range(-(-window_bits // bits)):
        windows |= np.roll(codes, -ahead, axis=-1).astype(np.int32) << (ahead * bits)
    return windows & ((1 << window_bits) - 1)


class TrellisCodec(RotatedCodec):
    """Codecs "trellis" and "trellis256" (see the `Codec` protocol). Immutable; make them with
    `core.codec.make_codec`.

    Attributes:
        code: what windows stand for.

    Raises:
        ConfigError: bits outside 1 to 4, head_dim below 16, an unknown rotation or scale, a Hadamard
            rotation with a head_dim that is no power of two, or a seed out of range.
    """

    def __init__(self, spec: CodecSpec) -> None:
        if spec.scale not in SCALES:
            raise ConfigError(f"scale={spec.scale!r}: allowed are {', '.join(SCALES)}")
        if spec.head_dim < MIN_HEAD_DIM:
            raise ConfigError(f"head_dim={spec.head_dim}: the trellis codec takes {MIN_HEAD_DIM} and more")
        checked_seed(spec.seed)
        self.code: TrellisCode = trellis_code(STATES[spec.name], spec.bits)
        super().__init__(replace(spec, rotation=resolve(spec.rotation, spec.head_dim)))
        unit = self.code.step / np.sqrt(spec.head_dim)
        values = (self.code.window_levels * unit).astype(np.float32)
        values.setflags(write=False)
        self._tables = {"windows": values}
        self._values = values.astype(np.float64)

    @property
    def row_bytes(self) -> int:
        """Bytes of codes of one vector: ceil(head_dim * bits / 8)."""
        return packed_bytes(self._spec.head_dim, self._spec.bits)

    def tables(self) -> Mapping[str, NDArray[np.float32]]:
        """Float32 "windows" `[2**L]`, read-only: the coordinate of a unit vector that a window stands for."""
        return self._tables

    def encode(self, vectors: NDArray[np.floating]) -> Encoded:
        """Codes of `vectors` `[..., head_dim]`, float16, float32 or float64.

        Zero and subnormal vectors: scale 0, codes 0. Vectors with NaN or inf: scale NaN, codes 0. The result
        of a vector does not depend on the vectors beside it.

        Mean squared error per unit vector at head_dim 128 (tests/core/test_trellis.py):
        docs/format.md has the table.

        Raises:
            InputError: another dtype, or a last axis that is not head_dim.
        """
        found = rotated(vectors, self._spec)
        targets = found.directions * (np.sqrt(self._spec.head_dim) / self.code.step)
        windows = tail_biting_path(
            targets.reshape(-1, self._spec.head_dim),
            self.code.window_levels.astype(np.float32),
            self.code.state_bits,
        ).reshape(targets.shape)
        scales = scales_of(found, self._values[windows], self._spec.scale)
        codes = np.where(found.usable[..., None], windows & ((1 << self._spec.bits) - 1), 0).astype(np.uint8)
        bits = bfloat16.to_bits(np.minimum(scales, bfloat16.LARGEST))
        return Encoded(pack(codes, self._spec.bits), bits)

    def _scaled(self, encoded: Encoded) -> NDArray[np.float64]:
        codes = unpack(encoded.codes, self._spec.bits, self._spec.head_dim)
        windows = windows_of(codes, self._spec.bits, self.code.window_bits)
        scales = bfloat16.from_bits(encoded.scales).astype(np.float64)
        out: NDArray[np.float64] = self._values[windows] * scales[..., None]
        return out


for _name in STATES:
    register_codec(_name, TrellisCodec)
