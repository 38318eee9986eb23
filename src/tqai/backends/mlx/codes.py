"""Codes in MLX operations: pack, unpack, look up centroids, encode and decode vectors.

The byte order is the canonical one (`core.packing`), so pages of this backend are canonical pages. Codes
are looked up several at once, a chunk of bits indexing a table of centroids:

    bits      1   2   4   8   3   6   5, 7
    chunk     8   8  16   8  12  12   none: unpacked code by code
    codes     8   4   4   1   4   2   1
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from tqai.core.codec import Codec, CodecSpec, make_codec
from tqai.core.rotated import SMALLEST_NORMAL
from tqai.core.rotation import HADAMARD_ROUNDS, hadamard_signs
from tqai.errors import UnsupportedError

__all__ = ["FORMS", "MlxCodec", "compiled", "mlx_codec", "pack", "unpack"]

Array = Any

BFLOAT16_MAX = float.fromhex("0x1.fep127")
CHUNK_BITS = {1: 8, 2: 8, 4: 16, 8: 8, 3: 12, 6: 12}
MOST_COMPARED_BITS = 4
"""Up to so many bits a coordinate is compared with every boundary, beyond it boundaries are searched."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`mx.compile(function)` on a GPU, `function` itself on the CPU.

    There MLX compiles by calling the machine's C++ compiler, about a second per fused kernel at first
    use, for operations (gathers, matrix products) that it cannot fuse (docs/mlx.md has the measurement).
    """
    return mx.compile(function) if mx.default_device().type == mx.DeviceType.gpu else function


def pack(indices: Array, bits: int) -> Array:
    """Bit-pack integer `indices` `[..., n]` (0 to 2**bits - 1) into uint8 `[..., ceil(n * bits / 8)]`."""
    count = indices.shape[-1]
    per_word = 8 // bits if 8 % bits == 0 else 8
    word_bytes = per_word * bits // 8
    padded = _padded(indices, per_word).reshape(*indices.shape[:-1], -1, per_word)
    if word_bytes == 1:
        shifts = mx.arange(0, 8, bits, dtype=mx.uint32)
        octets = (padded.astype(mx.uint32) << shifts).sum(-1).astype(mx.uint8)
        return octets[..., : -(-count * bits // 8)]
    shifts = mx.arange(0, per_word * bits, bits).astype(mx.uint64)
    words = (padded.astype(mx.uint64) << shifts).sum(-1, keepdims=True)
    octets = (words >> mx.arange(0, 8 * word_bytes, 8).astype(mx.uint64)) & 255
    octets = octets.astype(mx.uint8).reshape(*indices.shape[:-1], -1)
    return octets[..., : -(-count * bits // 8)]


def unpack(codes: Array, bits: int, count: int) -> Array:
    """Inverse of `pack`: integer indices `[..., count]` of uint8 `codes` `[..., ceil(count * bits / 8)]`."""
    lead = codes.shape[:-1]
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        octets = codes[..., None]
        shifts = mx.arange(0, 8, bits).astype(mx.uint8)
        return ((octets >> shifts) & mask).reshape(*lead, -1)[..., :count]
    octets = _padded(codes, bits).astype(mx.uint64).reshape(*lead, -1, bits)
    words = (octets << mx.arange(0, 8 * bits, 8).astype(mx.uint64)).sum(-1, keepdims=True)
    indices = (words >> mx.arange(0, 8 * bits, bits).astype(mx.uint64)) & mask
    return indices.astype(mx.uint8).reshape(*lead, -1)[..., :count]


class MlxCodec:
    """The scalar codec of `core.scalar` in MLX, in float32.

    Its arrays are evaluated when it is made, so that any thread may use them.

    Attributes:
        centroids: float32 `[2**bits]`.
        boundaries: float32 `[2**bits - 1]`.
    """

    def __init__(self, codec: Codec) -> None:
        tables = codec.tables()
        self._adopt_rotation(codec)
        self.centroids = mx.array(tables["centroids"])
        self.boundaries = mx.array(tables["boundaries"])
        self._levels = [float(level) for level in tables["boundaries"]]
        self._chunk_bits = CHUNK_BITS.get(self.bits)
        table = tables["centroids"][:, None]
        if self._chunk_bits is not None:
            chunks = np.arange(1 << self._chunk_bits)[:, None]
            table = tables["centroids"][
                (chunks >> np.arange(0, self._chunk_bits, self.bits)) & _mask(self.bits)
            ]
        self._table = mx.array(table)
        mx.eval(self.centroids, self.boundaries, self._table)

    def _adopt_rotation(self, codec: Codec) -> None:
        """What codecs of every kind have of their spec."""
        self.head_dim = codec.spec.head_dim
        self.bits = codec.spec.bits
        self.row_bytes = codec.row_bytes
        self.scale_rule = codec.spec.scale
        kind = codec.spec.rotation
        self._signs: Array = None
        self._matrix: Array = None
        if kind in HADAMARD_ROUNDS:
            signs = hadamard_signs(kind, self.head_dim, codec.spec.seed)
            self._signs = mx.array(signs.astype(np.float32))
            # once at the end, as in core: sums of equal numbers cancel exactly, on the way too
            self._normaliser = float(self.head_dim) ** (-0.5 * len(signs))
        else:
            self._matrix = mx.array(codec.rotation_matrix.astype(np.float32))
        mx.eval(self._signs, self._matrix)

    def rotate(self, rows: Array) -> Array:
        """`rows @ R.T` for `rows` float32 `[..., head_dim]`: what is coded."""
        if self._signs is None:
            return rows @ self._matrix.T
        for signs in self._signs:
            rows = mx.hadamard_transform(rows * signs, scale=1.0)
        return rows * self._normaliser

    def unrotate(self, rows: Array) -> Array:
        """`rows @ R`: the inverse of `rotate`."""
        if self._signs is None:
            return rows @ self._matrix
        for signs in self._signs[::-1]:
            rows = mx.hadamard_transform(rows, scale=1.0) * signs
        return rows * self._normaliser

    def lookup(self, codes: Array) -> Array:
        """Centroids float32 `[..., head_dim]` of packed codes uint8 `[..., row_bytes]`, without scale."""
        lead = codes.shape[:-1]
        if self._chunk_bits is None:
            chunks = unpack(codes, self.bits, self.head_dim)
        elif self._chunk_bits == 8:
            chunks = codes
        elif self._chunk_bits == 16:
            chunks = mx.contiguous(_padded(codes, 2)).view(mx.uint16)
        else:
            triples = _padded(codes, 3).astype(mx.uint16).reshape(*lead, -1, 3)
            first, second, third = triples[..., 0], triples[..., 1], triples[..., 2]
            low = first | ((second & 15) << 8)
            chunks = mx.stack([low, (second >> 4) | (third << 4)], axis=-1).reshape(*lead, -1)
        return mx.take(self._table, chunks, axis=0).reshape(*lead, -1)[..., : self.head_dim]

    def rotated_rows(self, vectors: Array) -> tuple[Array, Array]:
        """`vectors` `[..., head_dim]` over their largest absolute coordinate, rotated, float32, and that
        coordinate `[..., 1]` (0 rows for zero, subnormal and non-finite vectors)."""
        x = vectors.astype(mx.float32)
        largest = mx.abs(x).max(-1, keepdims=True)
        usable = mx.isfinite(largest) & (largest >= SMALLEST_NORMAL)
        unit_max = mx.where(usable, x / mx.where(usable, largest, 1.0), 0.0)
        return self.rotate(unit_max), largest

    def quantize(self, rotated: Array, largest: Array) -> tuple[Array, Array]:
        """Indices `[..., head_dim]` and scales bfloat16 `[...]` of what `rotated_rows` gave."""
        finite = mx.isfinite(largest)
        usable = finite & (largest >= SMALLEST_NORMAL)
        norm = mx.sqrt((rotated * rotated).sum(-1, keepdims=True))
        indices = self._cells(rotated / mx.where(usable, norm, 1.0))
        scales = self.scales_of(rotated, norm, largest, self.centroids[indices])
        return mx.where(finite, indices, 0), scales

    def scales_of(self, rotated: Array, norm: Array, largest: Array, chosen: Array) -> Array:
        """Scales bfloat16 `[...]` where codes stand for `chosen` `[..., head_dim]`: `core.rotated.scales_of`,
        of what `rotated_rows` gave."""
        if self.scale_rule == "norm":
            scale = norm
        else:
            scale = (rotated * chosen).sum(-1, keepdims=True) / (chosen * chosen).sum(-1, keepdims=True)
        finite = mx.isfinite(largest)
        usable = finite & (largest >= SMALLEST_NORMAL)
        # the product may be infinite for vectors near the largest float32
        scale = mx.minimum(scale * mx.where(usable, largest, 0.0), BFLOAT16_MAX)
        return mx.where(finite, scale, mx.nan).astype(mx.bfloat16).squeeze(-1)

    def encode(self, vectors: Array) -> tuple[Array, Array]:
        """Codes uint8 `[..., row_bytes]` and scales bfloat16 `[...]` of `vectors` `[..., head_dim]`.

        Indices equal those of core except where a coordinate lies within float32 rounding of a
        boundary (tests/backends/mlx/test_codes.py); special values are treated as `Codec.encode` says.
        """
        indices, scales = self._quantize(*self.rotated_rows(vectors))
        return pack(indices, self.bits), scales

    def decode(self, codes: Array, scales: Array, dtype: Any) -> Array:
        """Vectors `[..., head_dim]` in the original space as `dtype`, clamped to its range."""
        limit = mx.finfo(dtype).max
        vectors = self.unrotate(self.lookup(codes)) * scales.astype(mx.float32)[..., None]
        return mx.clip(vectors, -limit, limit).astype(dtype)

    @cached_property
    def _quantize(self) -> Callable[..., Any]:
        return compiled(self.quantize)

    def _cells(self, coordinates: Array) -> Array:
        if self.bits > MOST_COMPARED_BITS:
            return mx.searchsorted(self.boundaries, coordinates, side="right").astype(mx.uint8)
        cells = (coordinates >= self._levels[0]).astype(mx.uint8)
        for level in self._levels[1:]:
            cells = cells + (coordinates >= level)
        return cells


def _trellis(codec: Codec) -> MlxCodec:
    from tqai.backends.mlx.trellis import MlxTrellisCodec  # it is made from the class above

    return MlxTrellisCodec(codec)


FORMS: dict[str, Callable[[Codec], MlxCodec]] = {
    "scalar": MlxCodec,
    "trellis": _trellis,
    "trellis256": _trellis,
}
"""Codec name -> its form in MLX."""


def mlx_codec(codec: Codec) -> MlxCodec:
    """The MLX form of a codec; equal codecs share one object.

    Raises:
        UnsupportedError: there is none; the message says which there are.
    """
    return _mlx_codec(codec.spec)


@lru_cache(maxsize=256)
def _mlx_codec(spec: CodecSpec) -> MlxCodec:
    if spec.name not in FORMS:
        raise UnsupportedError(f"codec {spec.name!r} has no form in MLX: allowed are {', '.join(FORMS)}")
    return FORMS[spec.name](make_codec(spec))


def _mask(bits: int) -> int:
    return (1 << bits) - 1


def _padded(array: Array, multiple: int) -> Array:
    """`array` with zeros behind its last axis up to a multiple of `multiple`."""
    missing = -array.shape[-1] % multiple
    return mx.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array
