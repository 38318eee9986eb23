"""Lloyd-Max quantizer of one coordinate of a uniformly random unit vector, solved numerically.

One coordinate x of a uniform unit vector in d dimensions has density f(x) proportional to
(1 - x^2)^((d-3)/2) on [-1, 1]. With x = sin(angle), f(x) dx is proportional to cos(angle)^(d-2) d(angle),
which is smooth for every d >= 2 (the arcsine density of d = 2, singular at -1 and 1, becomes constant).

The best quantizer has each centroid at the mean of its cell and each boundary half way between its
centroids. f is symmetric, so only the upper half is solved: n = 2^(bits-1) cells from 0 to 1. The n equations
c_i = mean(cell i) are solved by Newton's method (tridiagonal Jacobian, formed densely: n <= 128) from the
quantiles of f^(1/3), which is where many bits tend to. For d >= 3 f is log-concave, hence the optimum is
the only stationary point (Fleischer 1964); for d = 2 a test compares with other starts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["HalfCodebook", "cell_moments", "companding_start", "solve"]

Floats = NDArray[np.float64]

QUADRATURE_NODES = 64
COMPANDING_STEPS = 8192
# In units of the standard deviation 1/sqrt(d): beyond it lies less than 1e-30 of the mass.
TAIL = 12.0
NEWTON_STEPS = 100
STATIONARY = 1e-14


class HalfCodebook(NamedTuple):
    """Positive half of a symmetric codebook.

    Attributes:
        centroids: float64 `[2**(bits-1)]`, ascending, all positive.
        mse_per_unit_vector: expected squared error of all d coordinates of a unit vector.
    """

    centroids: Floats
    mse_per_unit_vector: float


def solve(head_dim: int, bits: int) -> HalfCodebook:
    """Lloyd-Max codebook of `head_dim` >= 1 dimensions and `bits` 1 to 8. Accurate to about 1e-13."""
    cells = 1 << (bits - 1)
    if head_dim == 1:
        # x is 1 or -1, so every codebook that holds both is exact: evenly spaced levels.
        levels = (2.0 * np.arange(cells, dtype=np.float64) + 1.0) / (2.0 * cells - 1.0)
        return HalfCodebook(levels, 0.0)
    centroids = companding_start(head_dim, cells)
    residual, jacobian = _stationarity(head_dim, centroids)
    for _ in range(NEWTON_STEPS):
        if np.max(np.abs(residual)) < STATIONARY * centroids[-1]:
            break
        step: Floats = np.linalg.solve(jacobian, residual).astype(np.float64)
        centroids, residual, jacobian, improved = _damped(head_dim, centroids, residual, jacobian, step)
        if not improved:
            break
    mass, _, spread = cell_moments(head_dim, _edges(centroids), centroids)
    return HalfCodebook(centroids, float(head_dim * spread.sum() / mass.sum()))


def cell_moments(head_dim: int, edges: Floats, about: Floats) -> tuple[Floats, Floats, Floats]:
    """Integrals over the cells [edges_i, edges_i+1] of f, (x - about_i) f and (x - about_i)^2 f.

    f(x) = (1 - x^2)^((d-3)/2), unnormalised, 0 <= edges <= 1, d = head_dim >= 2. Gauss-Legendre with 64
    nodes per cell in the angle; moments are taken about `about` so that nothing cancels.
    """
    nodes, weights = np.polynomial.legendre.leggauss(QUADRATURE_NODES)
    limit = min(0.5 * math.pi, TAIL / math.sqrt(head_dim))
    angles = np.minimum(np.arcsin(edges), limit)
    half_width = 0.5 * np.diff(angles)[:, None]
    at = 0.5 * (angles[1:] + angles[:-1])[:, None] + half_width * nodes
    density = half_width * weights * np.cos(at) ** (head_dim - 2)
    deviation = np.sin(at) - about[:, None]
    return density.sum(-1), (density * deviation).sum(-1), (density * deviation * deviation).sum(-1)


def _edges(centroids: Floats) -> Floats:
    return np.concatenate([[0.0], 0.5 * (centroids[1:] + centroids[:-1]), [1.0]])


def _stationarity(head_dim: int, centroids: Floats) -> tuple[Floats, Floats]:
    """c_i - mean(cell i) and its derivative by the centroids."""
    edges = _edges(centroids)
    mass, first, _ = cell_moments(head_dim, edges, centroids)
    excess = first / mass
    inner = edges[1:-1]
    density = (1.0 - inner * inner) ** (0.5 * (head_dim - 3))
    mean = centroids + excess
    # A boundary moves by half of what either neighbour moves.
    by_upper_edge = 0.5 * density * (inner - mean[:-1]) / mass[:-1]
    by_lower_edge = 0.5 * density * (mean[1:] - inner) / mass[1:]
    jacobian = np.eye(len(centroids))
    rows = np.arange(len(centroids))
    jacobian[rows[:-1], rows[:-1]] -= by_upper_edge
    jacobian[rows[:-1], rows[1:]] -= by_upper_edge
    jacobian[rows[1:], rows[1:]] -= by_lower_edge
    jacobian[rows[1:], rows[:-1]] -= by_lower_edge
    return -excess, jacobian


def _damped(
    head_dim: int,
    centroids: Floats,
    residual: Floats,
    jacobian: Floats,
    step: Floats,
) -> tuple[Floats, Floats, Floats, bool]:
    """The longest of the steps 1, 1/2, 1/4, ... that keeps the order and lowers the residual."""
    size = float(np.max(np.abs(residual)))
    for halvings in range(40):
        trial = centroids - step * 0.5**halvings
        if trial[0] > 0.0 and trial[-1] < 1.0 and np.all(np.diff(trial) > 0.0):
            trial_residual, trial_jacobian = _stationarity(head_dim, trial)
            if np.max(np.abs(trial_residual)) < size:
                return trial, trial_residual, trial_jacobian, True
    return centroids, residual, jacobian, False


def companding_start(head_dim: int, cells: int) -> Floats:
    """Quantiles (i + 1/2) / cells of the density proportional to f^(1/3) on [0, 1]."""
    limit = min(0.5 * math.pi, TAIL * math.sqrt(3.0 / head_dim))
    angles = np.linspace(0.0, limit, COMPANDING_STEPS + 1)
    middles = 0.5 * (angles[1:] + angles[:-1])
    # f^(1/3) dx = cos^((d-3)/3) * cos d(angle)
    cumulative = np.concatenate([[0.0], np.cumsum(np.cos(middles) ** (head_dim / 3.0))])
    wanted = (np.arange(cells) + 0.5) / cells * cumulative[-1]
    start: Floats = np.sin(np.interp(wanted, cumulative, angles))
    return start
