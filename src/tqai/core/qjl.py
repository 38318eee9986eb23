"""QJL: one bit per projection of a vector, from which inner products are estimated without bias.

A sketch keeps sign(S r) and |r|. For any y,

    <y, r>  ~  |r| * sqrt(pi/2) / m * <S y, sign(S r)>            S Gaussian, m rows

is right on average over S, with variance (pi/2 |y|^2 |r|^2 - <y, r>^2) / m (Zandieh, Daliri, Han,
arXiv 2406.03482). With "orthogonal" rows (a Haar matrix times sqrt(dim), at most dim rows) the factor
sqrt(pi/2) becomes the inverse mean |coordinate| of a uniform vector of length sqrt(dim), which keeps it
unbiased; with m = dim the variance falls to about (pi/2 - 1) |y|^2 |r|^2 / m, as the errors of different
rows no longer overlap.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tqai.core.packing import pack, packed_bytes, unpack
from tqai.core.rotation import gaussians, orthogonalised
from tqai.errors import ConfigError, InputError

__all__ = ["SKETCHES", "SignSketch", "Sketched"]

SKETCHES = ("gaussian", "orthogonal")


class Sketched(NamedTuple):
    """Sketch of a batch of vectors.

    Attributes:
        signs: uint8 `[..., ceil(rows / 8)]`, one bit per row of S (`core.packing` order), 1 where the
            projection is 0 or more.
        norms: float64 `[...]`, Euclidean length; NaN where a vector holds NaN or inf (its bits are 0).
    """

    signs: NDArray[np.uint8]
    norms: NDArray[np.float64]


class SignSketch:
    """Sketches vectors of `dim` coordinates with a seeded matrix of `rows` rows (default: dim).

    Attributes:
        matrix: S, float64 `[rows, dim]`, read-only; the same on every platform to about 1e-12.
        factor: an estimate is norm * factor * (signs @ S), signs -1 and 1.

    Raises:
        ConfigError: dim or rows below 1, an unknown kind, a seed out of range, or more than dim
            orthogonal rows.
    """

    def __init__(self, dim: int, seed: int = 0, rows: int | None = None, kind: str = "gaussian") -> None:
        rows = dim if rows is None else rows
        if dim < 1 or rows < 1:
            raise ConfigError(f"dim={dim}, rows={rows}: both must be at least 1")
        if kind not in SKETCHES:
            raise ConfigError(f"sketch={kind!r}: allowed are {', '.join(SKETCHES)}")
        if kind == "orthogonal" and rows > dim:
            raise ConfigError(f"rows={rows}: an orthogonal sketch has at most dim={dim} rows")
        self.dim = dim
        self.rows = rows
        self.matrix = _matrix(dim, seed, rows, kind)
        self.factor = _inverse_mean_projection(dim, kind) / rows

    def sketch(self, vectors: NDArray[np.floating]) -> Sketched:
        """Sketch of `vectors` `[..., dim]`, any float dtype.

        Raises:
            InputError: a last axis that is not dim.
        """
        rows = self._checked(vectors)
        largest = np.max(np.abs(rows), axis=-1)
        finite = np.isfinite(largest)
        # A power of two, so that no norm overflows or vanishes and nothing else changes.
        exponents = np.frexp(np.where(finite, largest, 0.0))[1]
        rows = np.ldexp(np.where(finite[..., None], rows, 0.0), -exponents[..., None])
        norms = np.ldexp(np.sqrt(np.sum(rows * rows, axis=-1)), exponents)
        signs = (rows @ self.matrix.T >= 0.0) & finite[..., None]
        return Sketched(pack(signs.astype(np.uint8), 1), np.where(finite, norms, np.nan))

    def estimate(self, sketched: Sketched) -> NDArray[np.float64]:
        """Vectors `[..., dim]` whose inner product with any y estimates that of the sketched vectors."""
        signs = unpack(sketched.signs, 1, self.rows).astype(np.float64) * 2.0 - 1.0
        norms = np.asarray(sketched.norms, dtype=np.float64)
        return (self.factor * norms)[..., None] * (signs @ self.matrix)

    def inner_product(self, y: NDArray[np.floating], sketched: Sketched) -> NDArray[np.float64]:
        """Estimates of <y, r>: `y` `[..., dim]` broadcast against the leading axes of the sketch.

        Raises:
            InputError: a last axis of y that is not dim.
        """
        projected = self._checked(y) @ self.matrix.T
        signs = unpack(sketched.signs, 1, self.rows).astype(np.float64) * 2.0 - 1.0
        dots = np.einsum("...m,...m->...", projected, signs)
        estimates: NDArray[np.float64] = self.factor * np.asarray(sketched.norms, dtype=np.float64) * dots
        return estimates

    @property
    def row_bytes(self) -> int:
        """Bytes of signs of one vector."""
        return packed_bytes(self.rows, 1)

    def _checked(self, vectors: NDArray[np.floating]) -> NDArray[np.float64]:
        vectors = np.asarray(vectors)
        if vectors.ndim == 0 or vectors.shape[-1] != self.dim:
            raise InputError(f"shape {list(vectors.shape)}: [..., {self.dim}] is wanted")
        return vectors.astype(np.float64)


@lru_cache(maxsize=8)
def _matrix(dim: int, seed: int, rows: int, kind: str) -> NDArray[np.float64]:
    if kind == "orthogonal":
        square = gaussians("qjl_orthogonal", dim, seed, dim * dim).reshape(dim, dim)
        out = np.ascontiguousarray(orthogonalised(square)[:rows] * math.sqrt(dim))
    else:
        out = gaussians("qjl", dim, seed, rows * dim).reshape(rows, dim)
    out.setflags(write=False)
    return out


def _inverse_mean_projection(dim: int, kind: str) -> float:
    """1 / E|<s, u>| of a row s of S and a unit vector u."""
    if kind == "gaussian":
        return math.sqrt(0.5 * math.pi)
    mean_coordinate = math.exp(math.lgamma(0.5 * dim) - math.lgamma(0.5 * (dim + 1))) / math.sqrt(math.pi)
    return 1.0 / (math.sqrt(dim) * mean_coordinate)
