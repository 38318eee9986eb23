"""The scalar codec of TurboQuant: rotate, one Lloyd-Max level per coordinate, one scale per vector.

    y     = x @ R.T                             R from `core.rotation`
    code  = number of boundaries <= y_j / |y|   boundaries and centroids c from `core.codebook`
    scale = <y, c> / <c, c>  (least squares)  or  |y|  (norm, as in arXiv 2504.19874), to bfloat16
    x^    = (scale * c) @ R

All in float64 but for the tables, which are rounded to float32 first, so that kernels that work in
float32 share every level and boundary to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tqai.config import SCALES
from tqai.core import bfloat16
from tqai.core.codebook import codebook
from tqai.core.codec import CodecSpec, Encoded, register_codec
from tqai.core.packing import pack, packed_bytes, unpack
from tqai.core.rotated import RotatedCodec, check_length, rotated, scales_of
from tqai.core.rotation import checked_seed, resolve, unrotate
from tqai.errors import ConfigError, InputError

__all__ = ["Quantized", "ScalarCodec"]


class Quantized(NamedTuple):
    """Codes before packing and scales before rounding.

    Attributes:
        indices: uint8 `[..., head_dim]`, each below 2**bits.
        scales: float64 `[...]`; 0 for zero vectors, NaN for vectors with NaN or inf.
    """

    indices: NDArray[np.uint8]
    scales: NDArray[np.float64]


class ScalarCodec(RotatedCodec):
    """Codec "scalar" (see the `Codec` protocol). Immutable; make it with `core.codec.make_codec`.

    Raises:
        ConfigError: bits outside 1 to 8, an unknown rotation or scale, a Hadamard rotation with a
            head_dim that is no power of two, or a seed out of range.
    """

    def __init__(self, spec: CodecSpec) -> None:
        if spec.scale not in SCALES:
            raise ConfigError(f"scale={spec.scale!r}: allowed are {', '.join(SCALES)}")
        checked_seed(spec.seed)
        super().__init__(replace(spec, rotation=resolve(spec.rotation, spec.head_dim)))
        levels = codebook(spec.head_dim, spec.bits)
        self._tables = {
            "centroids": _read_only(levels.centroids.astype(np.float32)),
            "boundaries": _read_only(levels.boundaries.astype(np.float32)),
        }
        self._centroids = self._tables["centroids"].astype(np.float64)
        self._boundaries = self._tables["boundaries"].astype(np.float64)

    @property
    def row_bytes(self) -> int:
        """Bytes of codes of one vector: ceil(head_dim * bits / 8)."""
        return packed_bytes(self._spec.head_dim, self._spec.bits)

    def tables(self) -> Mapping[str, NDArray[np.float32]]:
        """Float32 "centroids" `[2**bits]` and "boundaries" `[2**bits - 1]`, ascending, read-only."""
        return self._tables

    def quantize(self, vectors: NDArray[np.floating]) -> Quantized:
        """Codes and unrounded scales of `vectors` `[..., head_dim]`, float16, float32 or float64.

        Zero and subnormal vectors: scale 0, codes 2**(bits-1). Vectors with NaN or inf: scale NaN, codes 0.
        The result of a vector does not depend on the vectors beside it.

        Raises:
            InputError: another dtype, or a last axis that is not head_dim.
        """
        found = rotated(vectors, self._spec)
        indices = np.searchsorted(self._boundaries, found.directions, side="right").astype(np.uint8)
        scales = scales_of(found, self._centroids[indices], self._spec.scale)
        indices[~found.finite] = 0
        return Quantized(indices, scales)

    def encode(self, vectors: NDArray[np.floating]) -> Encoded:
        """`quantize`, with codes packed and scales rounded to bfloat16 (at most its largest finite value).

        With scale="least_squares", encoding a decoded vector gives the same codes and scale again, unless
        a rounded level, normalised, leaves its cell; a test bounds how rarely. With scale="norm" the scale
        shrinks by |c| each time: a property of that scale, not of the rounding.

        Raises:
            InputError: as `quantize`.
        """
        indices, scales = self.quantize(vectors)
        bits = bfloat16.to_bits(np.minimum(scales, bfloat16.LARGEST))
        return Encoded(pack(indices, self._spec.bits), bits)

    def dequantize(self, quantized: Quantized) -> NDArray[np.float64]:
        """As `decode`, of unpacked codes and unrounded scales, float64.

        Raises:
            InputError: an index of 2**bits or more, or a last axis that is not head_dim.
        """
        indices = np.asarray(quantized.indices)
        check_length(indices, self._spec)
        if indices.size and int(indices.max()) >= len(self._centroids):
            raise InputError(f"index {int(indices.max())} does not fit {self._spec.bits} bits")
        scales = np.asarray(quantized.scales, dtype=np.float64)[..., None]
        return scales * unrotate(self._centroids[indices], self._spec.rotation, self._spec.seed)

    def _scaled(self, encoded: Encoded) -> NDArray[np.float64]:
        indices = unpack(encoded.codes, self._spec.bits, self._spec.head_dim)
        scales = bfloat16.from_bits(encoded.scales).astype(np.float64)
        return self._centroids[indices] * scales[..., None]


def _read_only(array: NDArray[np.float32]) -> NDArray[np.float32]:
    array.setflags(write=False)
    return array


register_codec("scalar", ScalarCodec)
