"""Seeded orthogonal matrices that spread a vector's energy evenly over its coordinates.

The kinds (`tqai.config.ROTATIONS`, beside "auto"):

    haar       Haar-distributed: Q of the QR factorisation of Gaussians, signs fixed so that the
               diagonal of the triangular factor is positive (Mezzadri, math-ph/0609050)
    hadamard   (1/sqrt d) H D_1          H the Sylvester matrix, H[i, j] = (-1)^popcount(i & j);
    hadamard2  (1/d) H D_2 H D_1         D_r diagonal matrices of random signs; d a power of two
    identity   none at all, for vectors that come rotated already (a converted model's values)

Randomness is the raw output of the counter-based generator Philox4x64-10, whose stream numpy guarantees;
no other part of numpy's random module is used, as it may change between versions. Word k of the stream
(kind, head_dim, seed) is word k of `numpy.random.Philox(key=(seed, tag * 2**32 + head_dim)).random_raw`.
Hadamard matrices are the same to the last bit everywhere, Haar matrices to about 1e-12 (log, cos and
LAPACK differ in their last bits from platform to platform).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tqai.config import ROTATIONS
from tqai.errors import ConfigError

__all__ = [
    "checked_seed",
    "fast_hadamard",
    "gaussians",
    "hadamard_signs",
    "is_power_of_two",
    "orthogonalised",
    "resolve",
    "rotate",
    "rotation_matrix",
    "unrotate",
]

# Streams are apart by their tag. Changing one changes the meaning of every saved cache.
STREAM_TAGS = {"haar": 1, "hadamard": 2, "hadamard2": 3, "qjl": 4, "qjl_orthogonal": 5}
HADAMARD_ROUNDS = {"hadamard": 1, "hadamard2": 2}
IDENTITY = "identity"
MAX_SEED = 2**63 - 1


def resolve(kind: str, head_dim: int) -> str:
    """The kind that serves vectors of `head_dim` coordinates; never "auto".

    "auto" is "hadamard2" for powers of two and "haar" otherwise.

    Raises:
        ConfigError: no such kind, or a Hadamard kind with a head_dim that is no power of two.
    """
    if kind not in ROTATIONS:
        raise ConfigError(f"rotation={kind!r}: allowed are {', '.join(ROTATIONS)}")
    if isinstance(head_dim, bool) or not isinstance(head_dim, (int, np.integer)) or head_dim < 1:
        raise ConfigError(f"head_dim={head_dim!r}: allowed are whole numbers from 1")
    if kind == "auto":
        return "hadamard2" if is_power_of_two(head_dim) else "haar"
    if kind in HADAMARD_ROUNDS and not is_power_of_two(head_dim):
        raise ConfigError(
            f"rotation={kind!r} needs a head_dim that is a power of two, not head_dim={head_dim}: "
            f"use 'haar' or 'auto'"
        )
    return kind


def is_power_of_two(number: int) -> bool:
    """True for 1, 2, 4, 8 and so on."""
    return number >= 1 and number & (number - 1) == 0


def rotation_matrix(kind: str, head_dim: int, seed: int) -> NDArray[np.float64]:
    """Orthogonal matrix R, float64 `[head_dim, head_dim]`, cached and read-only.

    A vector x (as a row) is coded as x @ R.T and comes back as y @ R.

    Raises:
        ConfigError: as `resolve`, or a seed outside 0 to 2**63 - 1.
    """
    return _matrix(resolve(kind, head_dim), int(head_dim), checked_seed(seed))


def hadamard_signs(kind: str, head_dim: int, seed: int) -> NDArray[np.int8]:
    """Random signs of a Hadamard rotation, int8 `[rounds, head_dim]` of -1 and 1, read-only.

    Row 0 is applied first: R x = H D_r ... H D_1 x / sqrt(head_dim)**rounds with D_k = diag(row k-1).

    Raises:
        ConfigError: `kind` (after `resolve`) is no Hadamard kind, or as `rotation_matrix`.
    """
    resolved = resolve(kind, head_dim)
    if resolved not in HADAMARD_ROUNDS:
        raise ConfigError(f"rotation={kind!r} with head_dim={head_dim} has no signs: it is no Hadamard kind")
    return _signs(resolved, int(head_dim), checked_seed(seed))


def fast_hadamard(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    """H x for every row x of `[..., d]`, d a power of two, *unnormalised*; float64, a new array.

    Additions only, in an order that depends on d alone: the result of a row is the same to the last
    bit whatever rows stand beside it and on every platform. H is symmetric and H H = d I.

    Raises:
        ConfigError: d is no power of two.
    """
    out = np.array(rows, dtype=np.float64, order="C")
    dim = out.shape[-1]
    if not is_power_of_two(dim):
        raise ConfigError(f"head_dim={dim}: the fast Hadamard transform needs a power of two")
    half = 1
    while half < dim:
        pairs = out.reshape(*out.shape[:-1], dim // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        difference = low - high
        low += high
        high[...] = difference
        half *= 2
    return out


def rotate(rows: NDArray[np.floating], kind: str, seed: int) -> NDArray[np.float64]:
    """`rows @ rotation_matrix(kind, d, seed).T` for `[..., d]`, by the fast transform where there is one.

    Raises:
        ConfigError: as `rotation_matrix`.
    """
    dim = rows.shape[-1]
    resolved = resolve(kind, dim)
    if resolved == IDENTITY:
        return np.array(rows, dtype=np.float64)
    if resolved not in HADAMARD_ROUNDS:
        product: NDArray[np.float64] = rows.astype(np.float64) @ rotation_matrix(resolved, dim, seed).T
        return product
    signs = hadamard_signs(resolved, dim, seed)
    out = rows.astype(np.float64)
    for row in signs:
        out = fast_hadamard(out * row)
    out *= _normaliser(dim, len(signs))
    return out


def unrotate(rows: NDArray[np.floating], kind: str, seed: int) -> NDArray[np.float64]:
    """`rows @ rotation_matrix(kind, d, seed)`: the inverse of `rotate`.

    Raises:
        ConfigError: as `rotation_matrix`.
    """
    dim = rows.shape[-1]
    resolved = resolve(kind, dim)
    if resolved == IDENTITY:
        return np.array(rows, dtype=np.float64)
    if resolved not in HADAMARD_ROUNDS:
        product: NDArray[np.float64] = rows.astype(np.float64) @ rotation_matrix(resolved, dim, seed)
        return product
    signs = hadamard_signs(resolved, dim, seed)
    out = rows.astype(np.float64)
    for row in signs[::-1]:
        out = fast_hadamard(out) * row
    out *= _normaliser(dim, len(signs))
    return out


def gaussians(stream: str, dim: int, seed: int, count: int) -> NDArray[np.float64]:
    """`count` independent standard normal numbers of a named stream, float64, by Box-Muller.

    Words 2k and 2k+1 of the stream give numbers 2k (cosine) and 2k+1 (sine).
    """
    words = _words(stream, dim, seed, count + count % 2).reshape(-1, 2)
    uniforms = (words >> np.uint64(11)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((uniforms[:, 0] + 1.0) * 2.0**-53))
    angle = (2.0 * math.pi * 2.0**-53) * uniforms[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)[:count]


def orthogonalised(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Q of the QR factorisation whose R has a positive diagonal: Haar-distributed if Gaussian is given."""
    q, r = np.linalg.qr(matrix)
    return np.ascontiguousarray(q * np.where(np.diagonal(r) < 0.0, -1.0, 1.0))


@lru_cache(maxsize=32)
def _matrix(kind: str, dim: int, seed: int) -> NDArray[np.float64]:
    if kind == "haar":
        out = orthogonalised(gaussians("haar", dim, seed, dim * dim).reshape(dim, dim))
    elif kind == IDENTITY:
        out = np.eye(dim)
    else:
        out = np.ascontiguousarray(rotate(np.eye(dim), kind, seed).T)
    out.setflags(write=False)
    return out


@lru_cache(maxsize=256)
def _signs(kind: str, dim: int, seed: int) -> NDArray[np.int8]:
    rounds = HADAMARD_ROUNDS[kind]
    top_bits = (_words(kind, dim, seed, rounds * dim) >> np.uint64(63)).astype(np.int8)
    out: NDArray[np.int8] = (1 - 2 * top_bits).reshape(rounds, dim)
    out.setflags(write=False)
    return out


def _words(stream: str, dim: int, seed: int, count: int) -> NDArray[np.uint64]:
    key = np.array([checked_seed(seed), (STREAM_TAGS[stream] << 32) + dim], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def _normaliser(dim: int, rounds: int) -> float:
    return 1.0 / dim if rounds == 2 else 1.0 / math.sqrt(dim)


def checked_seed(seed: int) -> int:
    """`seed` as an int.

    Raises:
        ConfigError: no whole number from 0 to 2**63 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed={seed!r}: allowed are whole numbers from 0 to {MAX_SEED}")
    return int(seed)
