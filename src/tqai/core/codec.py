"""The contract between a codec and everything that stores or reads codes, and the registry of codecs.

A codec turns one vector of `head_dim` numbers into `row_bytes` bytes of codes and one 16-bit scale.
It works vector by vector, so any token can be decoded alone. Its arithmetic here is numpy and is the
specification: backends implement the same codec from `tables()` and are tested against it.

To add a codec: one file in `core/` with a class that satisfies `Codec`, and one
`register_codec(name, factory)` call in it. The cache and the file format need no change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tqai.errors import ConfigError

__all__ = ["Codec", "CodecSpec", "Encoded", "known_codecs", "make_codec", "register_codec"]

SCALE_BYTES = 2


class Encoded(NamedTuple):
    """Codes and scales of a batch of vectors, canonical form.

    Attributes:
        codes: uint8 `[..., row_bytes]`, bit-packed (`core.packing`).
        scales: uint16 `[...]`, the upper half of a float32, that is bfloat16 bits.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.uint16]


@dataclass(frozen=True)
class CodecSpec:
    """What identifies a codec: equal specs decode equal bytes to equal values, on every platform.

    Attributes:
        name: registered name, such as "scalar".
        head_dim: coordinates per vector, at least 1.
        bits: bits per coordinate, 1 to 8.
        rotation: "haar", "hadamard", "hadamard2", "identity" or "auto" (see `core.rotation.resolve`).
        scale: "least_squares" or "norm".
        seed: seed of the rotation.
        sketch: sign bits of a vector's residual, for the codec "qjl" (1 or more); 0 for all others.

    Raises:
        ConfigError: head_dim, bits, seed or sketch is no whole number.
    """

    name: str
    head_dim: int
    bits: int
    rotation: str = "auto"
    scale: str = "least_squares"
    seed: int = 0
    sketch: int = 0

    def __post_init__(self) -> None:
        # Here and not in the codecs, as make_codec would take 2.0 or True for an equal spec it has seen.
        for name in ("head_dim", "bits", "seed", "sketch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise ConfigError(f"{name}={value!r}: a whole number is wanted")
            object.__setattr__(self, name, index(value))


class Codec(Protocol):
    """What the cache, the backends and the file format ask of a codec."""

    @property
    def spec(self) -> CodecSpec:
        """The spec that it was made from, with `rotation` resolved (never "auto")."""

    @property
    def row_bytes(self) -> int:
        """Bytes of codes of one vector: ceil(head_dim * bits / 8) for the scalar codec."""

    @property
    def bits_per_value(self) -> float:
        """Codes and scale of one vector, in bits, over head_dim."""

    @property
    def rotation_matrix(self) -> NDArray[np.float64]:
        """Orthogonal `[head_dim, head_dim]`; a vector x (as a row) is coded as x @ R.T."""

    def encode(self, vectors: NDArray[np.floating]) -> Encoded:
        """Codes of `vectors` `[..., head_dim]`.

        A zero or subnormal vector has scale 0; a vector with NaN or inf has scale NaN and all codes 0.
        """

    def decode_rotated(self, encoded: Encoded) -> NDArray[np.float32]:
        """Approximations `[..., head_dim]` in the rotated space, scale applied."""

    def decode(self, encoded: Encoded) -> NDArray[np.float32]:
        """Approximations `[..., head_dim]` of the encoded vectors, finite wherever the scale is."""

    def tables(self) -> Mapping[str, NDArray[np.float32]]:
        """What a kernel needs. "centroids": `[2**bits]` ascending, symmetric about 0; "boundaries":
        `[2**bits - 1]`, between neighbours; a coordinate on a boundary belongs to the upper cell."""


_FACTORIES: dict[str, Callable[[CodecSpec], Codec]] = {}


def register_codec(name: str, factory: Callable[[CodecSpec], Codec]) -> None:
    """Make `name` known to `make_codec`, replacing an earlier registration of the same name."""
    _FACTORIES[name] = factory
    make_codec.cache_clear()


def known_codecs() -> tuple[str, ...]:
    """Registered names, sorted."""
    return tuple(sorted(_FACTORIES))


@lru_cache(maxsize=256)
def make_codec(spec: CodecSpec) -> Codec:
    """The codec of a spec; equal specs share one object.

    Raises:
        ConfigError: no codec of that name, or a field that it does not take.
    """
    factory = _FACTORIES.get(spec.name)
    if factory is None:
        raise ConfigError(f"codec={spec.name!r}: allowed are {', '.join(known_codecs())}")
    return factory(spec)
