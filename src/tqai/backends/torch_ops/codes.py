"""Codes in torch: pack, unpack, look up centroids, encode and decode vectors.

The byte order is the canonical one (`core.packing`), so pages of this backend are canonical pages.

Looking codes up one by one costs an index operation per coordinate. Instead several codes are looked
up at once: a byte (1, 2, 4, 8 bits) or 12 bits (3 and 6 bits) index a table of 8, 4, 2 or 1 centroids.
5 and 7 bits, which no such chunk divides, are unpacked code by code.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from math import lcm
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tqai.backends.torch_ops.rotated import rotated, scales_of, unrotated
from tqai.core.codec import Codec, CodecSpec, make_codec
from tqai.errors import UnsupportedError

__all__ = ["FORMS", "TorchCodec", "TorchForm", "pack", "torch_codec", "unpack"]


def pack(indices: Tensor, bits: int) -> Tensor:
    """Bit-pack integer `indices` `[..., n]` (0 to 2**bits - 1) into uint8 `[..., ceil(n * bits / 8)]`."""
    if bits == 8:
        return indices.to(torch.uint8)
    count = indices.shape[-1]
    per_word = lcm(8, bits) // bits
    word_bytes = per_word * bits // 8
    padded = F.pad(indices.long(), (0, -count % per_word)).unflatten(-1, (-1, per_word))
    shifts = torch.arange(0, per_word * bits, bits, device=indices.device)
    words = (padded << shifts).sum(-1, keepdim=True)
    octets = (words >> torch.arange(0, 8 * word_bytes, 8, device=indices.device)) & 255
    return octets.to(torch.uint8).flatten(-2)[..., : -(-count * bits // 8)]


def unpack(codes: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: int64 indices `[..., count]` of uint8 `codes` `[..., ceil(count * bits / 8)]`."""
    per_word = lcm(8, bits) // bits
    word_bytes = per_word * bits // 8
    octets = F.pad(codes, (0, -codes.shape[-1] % word_bytes)).long().unflatten(-1, (-1, word_bytes))
    words = (octets << torch.arange(0, 8 * word_bytes, 8, device=codes.device)).sum(-1, keepdim=True)
    indices = (words >> torch.arange(0, per_word * bits, bits, device=codes.device)) & ((1 << bits) - 1)
    return indices.flatten(-2)[..., :count]


class TorchCodec:
    """The scalar codec of `core.scalar` on one torch device, in float32.

    Attributes:
        rotation: float32 `[head_dim, head_dim]`; a row vector x is coded as x @ rotation.T.
        centroids: float32 `[2**bits]`.
        boundaries: float32 `[2**bits - 1]`.
    """

    def __init__(self, codec: Codec, device: torch.device) -> None:
        tables = codec.tables()
        self.head_dim = codec.spec.head_dim
        self.bits = codec.spec.bits
        self.row_bytes = codec.row_bytes
        self.scale_rule = codec.spec.scale
        self.rotation = torch.from_numpy(codec.rotation_matrix.copy()).to(device, torch.float32)
        self.centroids = torch.from_numpy(tables["centroids"].copy()).to(device)
        self.boundaries = torch.from_numpy(tables["boundaries"].copy()).to(device)
        self._chunk_bits = {1: 8, 2: 8, 4: 8, 8: 8, 3: 12, 6: 12}.get(self.bits)
        if self._chunk_bits is not None:
            chunks = torch.arange(1 << self._chunk_bits, device=device)
            shifts = torch.arange(0, self._chunk_bits, self.bits, device=device)
            self._chunk_table = self.centroids[(chunks[:, None] >> shifts) & ((1 << self.bits) - 1)]

    def lookup(self, codes: Tensor) -> Tensor:
        """Centroids float32 `[..., head_dim]` of packed codes uint8 `[..., row_bytes]`, without scale."""
        if self._chunk_bits is None:
            return self.centroids[unpack(codes, self.bits, self.head_dim)]
        if self._chunk_bits == 8:
            chunks = codes.int()
        else:
            triples = F.pad(codes, (0, -codes.shape[-1] % 3)).int().unflatten(-1, (-1, 3))
            first, second, third = triples.unbind(-1)
            low = first | ((second & 15) << 8)
            chunks = torch.stack((low, (second >> 4) | (third << 4)), -1).flatten(-2)
        return F.embedding(chunks, self._chunk_table).flatten(-2)[..., : self.head_dim]

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 `[..., row_bytes]` and scales bfloat16 `[...]` of `vectors` `[..., head_dim]`.

        Indices equal those of core except where a coordinate lies within float32 rounding of a
        boundary (tests/conformance); special values are treated as `Codec.encode` says.
        """
        found = rotated(vectors, self.rotation)
        indices = torch.bucketize(found.y / found.norm, self.boundaries, right=True)
        scales = scales_of(found, self.centroids[indices], self.scale_rule)
        return pack(torch.where(found.finite, indices, 0), self.bits), scales

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Vectors `[..., head_dim]` in the original space as `dtype`, clamped to its range."""
        return unrotated(self.lookup(codes), scales, self.rotation, dtype)


class TorchForm(Protocol):
    """A codec on one torch device, as the torch backend uses it.

    Attributes:
        head_dim: coordinates per vector.
        row_bytes: bytes of codes per vector.
        rotation: float32 `[head_dim, head_dim]`; a row vector x is coded as x @ rotation.T.
    """

    head_dim: int
    row_bytes: int
    rotation: Tensor

    def lookup(self, codes: Tensor) -> Tensor:
        """Float32 `[..., head_dim]` in the rotated space of codes uint8 `[..., row_bytes]`, without scale."""

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 `[..., row_bytes]` and scales bfloat16 `[...]` of `vectors` `[..., head_dim]`."""

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Vectors `[..., head_dim]` in the original space as `dtype`, clamped to its range."""


FORMS: dict[str, str] = {
    "qjl": "tqai.backends.torch_ops.sketched:TorchSketchedCodec",
    "scalar": "tqai.backends.torch_ops.codes:TorchCodec",
    "trellis": "tqai.backends.torch_ops.trellis:TorchTrellisCodec",
    "trellis256": "tqai.backends.torch_ops.trellis:TorchTrellisCodec",
}
"""Codec name -> "module:class" of its torch form, made from the codec and a device."""


@lru_cache(maxsize=256)
def _torch_codec(spec: CodecSpec, device: torch.device) -> TorchForm:
    if spec.name not in FORMS:
        raise UnsupportedError(f"codec {spec.name!r} has no torch form: allowed are {', '.join(FORMS)}")
    module_name, class_name = FORMS[spec.name].split(":")
    form: TorchForm = getattr(import_module(module_name), class_name)(make_codec(spec), device)
    return form


def torch_codec(codec: Codec, device: torch.device) -> TorchForm:
    """The torch form of a codec on a device; equal codecs share one object.

    Raises:
        UnsupportedError: there is none; the message says which there are.
    """
    return _torch_codec(codec.spec, device)
