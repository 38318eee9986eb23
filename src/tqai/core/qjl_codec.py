"""Codec "qjl": the scalar codec, and one bit per projection of what it leaves over.

    y     = x @ R.T, codes, scale s and levels c        as core.scalar has them (s already in bfloat16)
    r     = y / s - c                                   what is left over, in units of the scale
    signs = sign(S r)                                   m bits, S from core.qjl
    x^    = s * (c + |r| * factor * signs @ S) @ R      inner products of x^ are those of x on average over S

The m rows of S are orthogonal where m <= head_dim, which has the smaller variance, and Gaussian beyond.
A row of codes is, in bytes:

    0                         ceil(d * bits / 8)        + ceil(m / 8)          + 2
    | scalar codes, packed    | signs, packed, 1 = plus | |r| as bfloat16      |

Unbiased is not more exact: the sketch removes a bias that is small and adds a variance that is not
(docs/quality-options.md has the measured cost). TurboQuant (arXiv 2504.19874, algorithm 2), QJL
(arXiv 2406.03482).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tqai.config import MAX_SKETCH_BITS
from tqai.core import bfloat16
from tqai.core.codec import CodecSpec, Encoded, register_codec
from tqai.core.packing import packed_bytes
from tqai.core.qjl import SignSketch, Sketched
from tqai.core.rotated import RotatedCodec
from tqai.core.rotation import rotate
from tqai.core.scalar import ScalarCodec
from tqai.errors import ConfigError, InputError

__all__ = ["NORM_BYTES", "SketchedCodec"]

NORM_BYTES = 2


class SketchedCodec(RotatedCodec):
    """Codec "qjl" (see the `Codec` protocol). Immutable; make it with `core.codec.make_codec`.

    Attributes:
        scalar: the codec of the first stage.
        sketch: the projections of what it leaves over, in the rotated space.

    Raises:
        ConfigError: spec.sketch outside 1 to 4096, or as `ScalarCodec`.
    """

    def __init__(self, spec: CodecSpec) -> None:
        if not 1 <= spec.sketch <= MAX_SKETCH_BITS:
            raise ConfigError(f"sketch={spec.sketch}: allowed are whole numbers from 1 to {MAX_SKETCH_BITS}")
        self.scalar = ScalarCodec(replace(spec, name="scalar", sketch=0))
        super().__init__(replace(spec, rotation=self.scalar.spec.rotation))
        kind = "orthogonal" if spec.sketch <= spec.head_dim else "gaussian"
        self.sketch = SignSketch(spec.head_dim, spec.seed, spec.sketch, kind)

    @property
    def signs_at(self) -> int:
        """Byte of a row at which the signs begin."""
        return self.scalar.row_bytes

    @property
    def norm_at(self) -> int:
        """Byte of a row at which the norm of what is left over begins."""
        return self.signs_at + packed_bytes(self._spec.sketch, 1)

    @property
    def row_bytes(self) -> int:
        """Bytes of codes, signs and norm of one vector."""
        return self.norm_at + NORM_BYTES

    def tables(self) -> Mapping[str, NDArray[np.float32]]:
        """Those of the scalar codec, and "sketch" `[m, head_dim]`: S with the estimator's factor in it."""
        matrix = (self.sketch.matrix * self.sketch.factor).astype(np.float32)
        return {**self.scalar.tables(), "sketch": matrix}

    def encode(self, vectors: NDArray[np.floating]) -> Encoded:
        """Codes of `vectors` `[..., head_dim]`, float16, float32 or float64.

        A zero or subnormal vector has scale, signs and norm 0; one with NaN or inf scale NaN, the rest 0.

        Raises:
            InputError: another dtype, or a last axis that is not head_dim.
        """
        codes, scales = self.scalar.encode(vectors)
        values = bfloat16.from_bits(scales).astype(np.float64)[..., None]
        usable = np.isfinite(values) & (values > 0.0)
        # by a power of two near the scale first, so that nothing overflows or vanishes
        exponents = np.frexp(np.where(usable, values, 1.0))[1]
        rows = np.ldexp(np.where(usable, np.asarray(vectors, dtype=np.float64), 0.0), -exponents)
        rotated = rotate(rows, self._spec.rotation, self._spec.seed)
        one = Encoded(codes, np.full(scales.shape, bfloat16.to_bits(np.float64(1.0)), dtype=np.uint16))
        levels = self.scalar.decode_rotated(one).astype(np.float64)
        left_over = np.where(
            usable, rotated / np.ldexp(np.where(usable, values, 1.0), -exponents) - levels, 0.0
        )
        signs, norms = self.sketch.sketch(left_over)
        norms = np.minimum(norms, bfloat16.LARGEST)
        signs = np.where(usable, signs, 0).astype(np.uint8)
        octets = np.ascontiguousarray(bfloat16.to_bits(norms).astype("<u2"))[..., None].view(np.uint8)
        return Encoded(np.concatenate([codes, signs, octets], axis=-1), scales)

    def _scaled(self, encoded: Encoded) -> NDArray[np.float64]:
        codes = np.asarray(encoded.codes)
        if codes.ndim == 0 or codes.shape[-1] != self.row_bytes:
            raise InputError(f"rows of {list(codes.shape)} bytes: [..., {self.row_bytes}] is wanted")
        ones = np.full(encoded.scales.shape, bfloat16.to_bits(np.float64(1.0)), dtype=np.uint16)
        levels = self.scalar.decode_rotated(Encoded(codes[..., : self.signs_at], ones)).astype(np.float64)
        norms = np.ascontiguousarray(codes[..., self.norm_at :]).view("<u2")[..., 0]
        left_over = self.sketch.estimate(
            Sketched(codes[..., self.signs_at : self.norm_at], bfloat16.from_bits(norms).astype(np.float64))
        )
        scales = bfloat16.from_bits(encoded.scales).astype(np.float64)
        out: NDArray[np.float64] = (levels + left_over) * scales[..., None]
        return out


register_codec("qjl", SketchedCodec)
