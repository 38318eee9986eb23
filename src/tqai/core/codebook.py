"""Codebooks of the scalar codec: Lloyd-Max levels for a coordinate of a uniformly random unit vector.

Those of 1 to 4 bits are rounded to whole numbers of a byte (`core.grid`), which costs 0.05 % of squared error
at 4 bits and less below. Tables for the head_dims in `SHIPPED_HEAD_DIMS` are package data
(`core/tables/lloyd_max.json`, written by `python -m tqai.core.tables`), so that every platform uses the very
same numbers; any other head_dim is solved at run time, and a test holds the two together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqai.config import MAX_BITS
from tqai.core.grid import GRID_BITS, on_grid
from tqai.core.lloyd_max import HalfCodebook, solve
from tqai.errors import ConfigError

__all__ = [
    "SHIPPED_HEAD_DIMS",
    "TABLE_FILE",
    "Codebook",
    "codebook",
    "distortion_bound",
    "optimal_codebook",
    "solved_codebook",
    "solved_half",
]

SHIPPED_HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
TABLE_FILE = "lloyd_max.json"


@dataclass(frozen=True, eq=False)
class Codebook:
    """Levels of one coordinate of a unit vector. Arrays are read-only.

    Attributes:
        centroids: float64 `[2**bits]`, ascending, antisymmetric to the last bit.
        boundaries: float64 `[2**bits - 1]`, half way between neighbours; the middle one is exactly 0.
        mse_per_unit_vector: expected squared error of a unit vector of head_dim coordinates with every
            coordinate replaced by its centroid, rotation and scale being exact.
    """

    centroids: NDArray[np.float64]
    boundaries: NDArray[np.float64]
    mse_per_unit_vector: float


@lru_cache(maxsize=256, typed=True)  # typed, as 64.0 == 64 and True == 1 must reach the check
def codebook(head_dim: int, bits: int) -> Codebook:
    """The codebook of `head_dim` >= 1 coordinates and `bits` 1 to 8: shipped table or solved, then cached.

    Raises:
        ConfigError: head_dim or bits out of range.
    """
    _check(head_dim, bits)
    entry = _shipped().get(str(head_dim), {}).get(str(bits))
    if entry is None:
        return _whole(solved_half(head_dim, bits))
    half = np.array([float.fromhex(level) for level in entry["centroids"]])
    return _whole(HalfCodebook(half, float(entry["mse_per_unit_vector"])))


def solved_codebook(head_dim: int, bits: int) -> Codebook:
    """As `codebook`, always solved anew.

    Raises:
        ConfigError: head_dim or bits out of range.
    """
    _check(head_dim, bits)
    return _whole(solved_half(head_dim, bits))


def optimal_codebook(head_dim: int, bits: int) -> Codebook:
    """The Lloyd-Max codebook itself, not rounded to whole numbers of a byte; solved anew.

    Raises:
        ConfigError: head_dim or bits out of range.
    """
    _check(head_dim, bits)
    return _whole(solve(head_dim, bits))


def solved_half(head_dim: int, bits: int) -> HalfCodebook:
    """What is shipped, or would be: Lloyd-Max levels, on the grid where there are at most 16."""
    half = solve(head_dim, bits)
    return on_grid(head_dim, half) if 1 < bits <= GRID_BITS and head_dim > 1 else half


def distortion_bound(bits: int) -> float:
    """Upper bound of the squared error per unit vector, sqrt(3) * pi / 2 * 4**-bits.

    Source: TurboQuant (arXiv 2504.19874), theorem 1.
    """
    return float(np.sqrt(3.0) * np.pi / 2.0 * 4.0**-bits)


@lru_cache(maxsize=1)
def _shipped() -> dict[str, Any]:
    text = resources.files("tqai.core.tables").joinpath(TABLE_FILE).read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)["head_dims"]
    return tables


def _whole(half: HalfCodebook) -> Codebook:
    centroids = np.concatenate([-half.centroids[::-1], half.centroids])
    boundaries = 0.5 * (centroids[1:] + centroids[:-1])
    centroids.setflags(write=False)
    boundaries.setflags(write=False)
    return Codebook(centroids, boundaries, half.mse_per_unit_vector)


def _check(head_dim: int, bits: int) -> None:
    for name, value, high in (("head_dim", head_dim, None), ("bits", bits, MAX_BITS)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < 1 or (high is not None and value > high):
            allowed = "from 1" if high is None else f"from 1 to {high}"
            raise ConfigError(f"{name}={value!r}: allowed are whole numbers {allowed}")
