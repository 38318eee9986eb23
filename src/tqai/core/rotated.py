"""What codecs of rotated vectors have in common: everything but which codes are nearest to a direction.

    y      = x @ R.T                            R from `core.rotation`
    codes  = a codec's own, of y / |y|; they stand for a vector c
    scale  = <y, c> / <c, c>  (least squares)  or  |y|  (norm), to bfloat16
    x^     = (scale * c) @ R

Vectors are brought near 1 by powers of two before anything else, so that norms of the largest and smallest
numbers neither overflow nor vanish, and nothing else changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tqai.core.codec import SCALE_BYTES, CodecSpec, Encoded, make_codec
from tqai.core.rotation import rotate, rotation_matrix, unrotate
from tqai.errors import InputError

__all__ = ["SMALLEST_NORMAL", "Rotated", "RotatedCodec", "check_length", "rotated", "scales_of"]

SMALLEST_NORMAL = 2.0**-126
"""A vector whose largest absolute coordinate is below this (float32 subnormals) counts as zero."""

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


class Rotated(NamedTuple):
    """Rotated vectors y, times 2**-exponents.

    Attributes:
        y: float64 `[..., head_dim]`; 0 where a vector is not usable.
        norms: float64 `[...]`, of y.
        exponents: int `[...]`.
        usable: bool `[...]`: finite, and neither zero nor subnormal.
        finite: bool `[...]`.
    """

    y: NDArray[np.float64]
    norms: NDArray[np.float64]
    exponents: NDArray[np.int32]
    usable: NDArray[np.bool_]
    finite: NDArray[np.bool_]

    @property
    def directions(self) -> NDArray[np.float64]:
        """y / |y|, 0 where that is 0 / 0."""
        unit: NDArray[np.float64] = self.y / np.where(self.norms > 0.0, self.norms, 1.0)[..., None]
        return unit


def rotated(vectors: NDArray[np.floating], spec: CodecSpec) -> Rotated:
    """`vectors` `[..., head_dim]` (float16, float32 or float64) in the rotated space of a spec.

    Raises:
        InputError: another dtype, or a last axis that is not head_dim.
    """
    vectors = np.asarray(vectors)
    if not np.issubdtype(vectors.dtype, np.floating):
        raise InputError(f"vectors have dtype {vectors.dtype}: float16, float32 or float64 is wanted")
    check_length(vectors, spec)
    rows = vectors.astype(np.float64)
    largest = np.max(np.abs(rows), axis=-1)
    finite = np.isfinite(largest)
    usable = finite & (largest >= SMALLEST_NORMAL)
    exponents = np.frexp(np.where(usable, largest, 1.0))[1]
    rows = np.ldexp(np.where(usable[..., None], rows, 0.0), -exponents[..., None])
    y = rotate(rows, spec.rotation, spec.seed)
    return Rotated(y, np.sqrt(np.sum(y * y, axis=-1)), exponents, usable, finite)


def scales_of(vectors: Rotated, chosen: NDArray[np.float64], rule: str) -> NDArray[np.float64]:
    """Unrounded scales `[...]` where codes stand for `chosen` `[..., head_dim]`; `rule` as `CodecSpec.scale`.

    0 for zero and subnormal vectors, NaN for those with NaN or inf.
    """
    if rule == "norm":
        scales = vectors.norms
    else:
        scales = np.sum(vectors.y * chosen, axis=-1) / np.sum(chosen * chosen, axis=-1)
    special = np.where(vectors.finite, 0.0, np.nan)
    return np.where(vectors.usable, np.ldexp(scales, vectors.exponents), special)


def check_length(array: NDArray[np.generic], spec: CodecSpec) -> None:
    """
    Raises:
        InputError: the last axis is not head_dim.
    """
    if array.ndim == 0 or array.shape[-1] != spec.head_dim:
        raise InputError(f"shape {list(array.shape)}: [..., {spec.head_dim}] is wanted")


class RotatedCodec(ABC):
    """The part of the `Codec` protocol that does not depend on how directions are coded. A codec that is
    made of it says what its rows are (`row_bytes`) and stand for (`_scaled`), and how it encodes."""

    def __init__(self, spec: CodecSpec) -> None:
        self._spec = spec

    @property
    def spec(self) -> CodecSpec:
        """The spec that it was made from, with `rotation` resolved (never "auto")."""
        return self._spec

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Bytes of codes of one vector."""

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

    def decode_rotated(self, encoded: Encoded) -> NDArray[np.float32]:
        """Approximations `[..., head_dim]` in the rotated space, scale applied, float32.

        Finite wherever the scale is: what exceeds float32 becomes its largest number.
        """
        return _to_float32(self._scaled(encoded))

    def decode(self, encoded: Encoded) -> NDArray[np.float32]:
        """Approximations `[..., head_dim]` of the encoded vectors, float32, finite wherever the scale is."""
        scaled = self._scaled(encoded)
        # A NaN row would be right in its own place, but would raise floating-point flags in the others'.
        known = np.isfinite(scaled[..., :1])
        plain = unrotate(np.where(known, scaled, 0.0), self._spec.rotation, self._spec.seed)
        return _to_float32(np.where(known, plain, np.nan))

    @abstractmethod
    def _scaled(self, encoded: Encoded) -> NDArray[np.float64]:
        """scale * c `[..., head_dim]`, in the rotated space."""


def _to_float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.clip(values, -LARGEST_FLOAT32, LARGEST_FLOAT32).astype(np.float32)
