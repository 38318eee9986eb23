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
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tqai.config import SCALES
from tqai.core import bfloat16
from tqai.core.codec import SCALE_BYTES, CodecSpec, Encoded, make_codec, register_codec
from tqai.core.packing import pack, packed_bytes, unpack
from tqai.core.rotation import checked_seed, resolve, rotate, rotation_matrix, unrotate
from tqai.core.scalar import LARGEST_FLOAT32, SMALLEST_NORMAL
from tqai.core.trellis_code import TrellisCode, trellis_code
from tqai.core.viterbi import tail_biting_path
from tqai.errors import ConfigError, InputError

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


class TrellisCodec:
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
        self._spec = replace(spec, rotation=resolve(spec.rotation, spec.head_dim))
        unit = self.code.step / np.sqrt(spec.head_dim)
        values = (self.code.window_levels * unit).astype(np.float32)
        values.setflags(write=False)
        self._tables = {"windows": values}
        self._values = values.astype(np.float64)

    @property
    def spec(self) -> CodecSpec:
        """The spec that it was made from, with `rotation` resolved (never "auto")."""
        return self._spec

    @property
    def row_bytes(self) -> int:
        """Bytes of codes of one vector: ceil(head_dim * bits / 8)."""
        return packed_bytes(self._spec.head_dim, self._spec.bits)

    @property
    def bits_per_value(self) -> float:
        """Codes (with padding to a whole byte) and scale of one vector, in bits, over head_dim."""
        return 8.0 * (self.row_bytes + SCALE_BYTES) / self._spec.head_dim

    @cached_property
    def rotation_matrix(self) -> NDArray[np.float64]:
        """Orthogonal `[head_dim, head_dim]`, read-only; a vector x (as a row) is coded as x @ R.T."""
        return rotation_matrix(self._spec.rotation, self._spec.head_dim, self._spec.seed)

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and unpickled codecs are the one object of their spec."""
        return make_codec, (self._spec,)

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
        rows = self._checked(vectors)
        largest = np.max(np.abs(rows), axis=-1)
        finite = np.isfinite(largest)
        usable = finite & (largest >= SMALLEST_NORMAL)
        # Powers of two, so that norms of the largest and smallest numbers neither overflow nor vanish,
        # and nothing else changes.
        exponents = np.frexp(np.where(usable, largest, 1.0))[1]
        rows = np.ldexp(np.where(usable[..., None], rows, 0.0), -exponents[..., None])
        rotated = rotate(rows, self._spec.rotation, self._spec.seed)
        norms = np.sqrt(np.sum(rotated * rotated, axis=-1))
        safe = np.where(norms > 0.0, norms, 1.0)
        targets = rotated / safe[..., None] * (np.sqrt(self._spec.head_dim) / self.code.step)
        windows = tail_biting_path(
            targets.reshape(-1, self._spec.head_dim),
            self.code.window_levels.astype(np.float32),
            self.code.state_bits,
        ).reshape(rows.shape)
        if self._spec.scale == "norm":
            scales = norms
        else:
            chosen = self._values[windows]
            scales = np.sum(rotated * chosen, axis=-1) / np.sum(chosen * chosen, axis=-1)
        scales = np.where(usable, np.ldexp(scales, exponents), np.where(finite, 0.0, np.nan))
        codes = np.where(usable[..., None], windows & ((1 << self._spec.bits) - 1), 0).astype(np.uint8)
        bits = bfloat16.to_bits(np.minimum(scales, bfloat16.LARGEST))
        return Encoded(pack(codes, self._spec.bits), bits)

    def decode_rotated(self, encoded: Encoded) -> NDArray[np.float32]:
        """Approximations `[..., head_dim]` in the rotated space, scale applied, float32.

        Finite wherever the scale is: what exceeds float32 becomes its largest number.
        """
        return _to_float32(self._rotated(encoded))

    def decode(self, encoded: Encoded) -> NDArray[np.float32]:
        """Approximations `[..., head_dim]` of the encoded vectors, float32, finite wherever the scale is."""
        rotated = self._rotated(encoded)
        # A NaN row would be right in its own place, but would raise floating-point flags in the others'.
        known = np.isfinite(rotated[..., :1])
        plain = unrotate(np.where(known, rotated, 0.0), self._spec.rotation, self._spec.seed)
        return _to_float32(np.where(known, plain, np.nan))

    def _rotated(self, encoded: Encoded) -> NDArray[np.float64]:
        codes = unpack(encoded.codes, self._spec.bits, self._spec.head_dim)
        windows = windows_of(codes, self._spec.bits, self.code.window_bits)
        scales = bfloat16.from_bits(encoded.scales).astype(np.float64)
        out: NDArray[np.float64] = self._values[windows] * scales[..., None]
        return out

    def _checked(self, vectors: NDArray[np.floating]) -> NDArray[np.float64]:
        vectors = np.asarray(vectors)
        if not np.issubdtype(vectors.dtype, np.floating):
            raise InputError(f"vectors have dtype {vectors.dtype}: float16, float32 or float64 is wanted")
        if vectors.ndim == 0 or vectors.shape[-1] != self._spec.head_dim:
            raise InputError(f"shape {list(vectors.shape)}: [..., {self._spec.head_dim}] is wanted")
        return vectors.astype(np.float64)


def _to_float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.clip(values, -LARGEST_FLOAT32, LARGEST_FLOAT32).astype(np.float32)


for _name in STATES:
    register_codec(_name, TrellisCodec)
