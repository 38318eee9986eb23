"""Integer levels for the tensor cores, close to the codebook's float32 centroids.

The kernels multiply int8. A table gives each code an int8 `a` (and `b`, where there are two tables), and

    (a[code] * coef_a + b[code] * coef_b) * unit  =  centroid[code] + kappa + error

with one constant kappa, which the kernels take off again. The greater of the two coefficients is 1.

    1, 2, 3 bits   one table, on whole or on half numbers
    4 bits         two tables of 8: the 8 inner codes (4 to 11) and the 8 outer, each with its own step. The
                   byte permute that reads a table yields 0 or -1 (the sign of the entry at the code's low
                   three bits) for the codes of the other, which the tables allow for.
    8 bits         16-bit levels: `a` their high and `b` their low byte, both signed

`relative_error` is the root of the expected squared error over the expected squared centroid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tqai.core.codec import Codec

__all__ = ["Levels", "integer_levels"]

Floats = NDArray[np.float64]
EVEN_WEIGHT = 1.0


@dataclass(frozen=True, eq=False)
class Levels:
    """Attributes: `a`, `b` int64 `[2**bits]`, what each table yields for each *code*; and the constants."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    coef_a: float
    coef_b: float
    unit: float
    kappa: float
    relative_error: float

    @property
    def values(self) -> Floats:
        """The level that the kernels use for each code."""
        return (self.a * self.coef_a + self.b * self.coef_b) * self.unit - self.kappa

    def permute_tables(self) -> tuple[int, int, int, int]:
        """The four 32-bit words of the two tables, for up to 4 bits (8 bits have a table in memory)."""
        count = len(self.a)
        if count == 16:
            low = np.arange(8)
            inner = np.where(low < 4, low + 8, low)
            outer = np.where(low < 4, low, low + 8)
            first, second = self.a[inner], self.b[outer]
        elif count <= 8:
            first = self.a[np.arange(8) % count]
            second = np.zeros(8, dtype=np.int64)
        else:
            raise ValueError(f"{count} levels do not fit a byte permute")
        words = np.concatenate([first, second]).astype(np.int8).view("<u4")
        return int(words[0]), int(words[1]), int(words[2]), int(words[3])

    def lookup(self) -> NDArray[np.uint32]:
        """uint32 `[256]`: `a` in byte 0, `b` in byte 1."""
        return ((self.a & 0xFF) | (self.b & 0xFF) << 8).astype(np.uint32)


def integer_levels(codec: Codec) -> Levels:
    """Levels for a scalar codec of 1, 2, 3, 4 or 8 bits."""
    return _levels(tuple(float(c) for c in codec.tables()["centroids"]), codec.spec.head_dim)


@lru_cache(maxsize=64)
def _levels(centroids: tuple[float, ...], dim: int) -> Levels:
    c = np.array(centroids)
    weights = _probabilities(c, dim)
    if len(c) == 256:
        return _wide(c, weights)
    if len(c) == 16:
        return _paired(c, weights)
    return _single(c, weights)


def _probabilities(centroids: Floats, dim: int) -> Floats:
    """Chance of each cell for a coordinate of a random unit vector; enough digits to weigh errors by."""
    x = np.linspace(-1.0, 1.0, 20001)
    density = (1.0 - x * x).clip(0.0) ** max((dim - 3) / 2.0, 0.0)
    cells = np.searchsorted(0.5 * (centroids[1:] + centroids[:-1]), x)
    mass = np.bincount(cells, weights=density, minlength=len(centroids))
    out: Floats = (mass + mass[::-1]) / (2.0 * mass.sum())
    return out


def _relative(c: Floats, weights: Floats, errors: Floats) -> float:
    return float(np.sqrt(np.sum(weights * errors**2) / np.sum(weights * c**2)))


def _single(c: Floats, weights: Floats) -> Levels:
    steps = np.linspace(0.45, 1.0, 20001) * 127.4 / c[-1]
    best: Levels | None = None
    for half in (0.0, 0.5):
        whole = np.round(c * steps[:, None] - half)
        shifted = whole + half
        unit = np.sum(weights * shifted * c, axis=-1) / np.sum(weights * shifted**2, axis=-1)
        errors = np.sum(weights * (shifted * unit[:, None] - c) ** 2, axis=-1)
        k = int(np.argmin(errors))
        a = whole[k].astype(np.int64)
        u = float(unit[k])
        relative = _relative(c, weights, (a + half) * u - c)
        if best is None or relative < best.relative_error:
            best = Levels(a, np.zeros_like(a), 1.0, 0.0, u, -half * u, relative)
    assert best is not None
    return best


def _wide(c: Floats, weights: Floats) -> Levels:
    unit = c[-1] / 32500.0
    whole = np.round(c / unit).astype(np.int64)
    a = (whole + 128) >> 8
    b = whole - 256 * a
    return Levels(a, b, 1.0, 1.0 / 256.0, 256.0 * unit, 0.0, _relative(c, weights, whole * unit - c))


def _paired(c: Floats, weights: Floats) -> Levels:
    tops = (126.0 / c[11], 126.0 / c[15])
    grid = np.linspace(0.5, 1.0, 300)
    _, step_a, step_b, choice = _search(c, weights, grid * tops[0], grid * tops[1])
    for finer in (0.004, 0.0002):
        around = np.linspace(1.0 - finer, 1.0 + finer, 41)
        near_a, near_b = np.minimum(step_a * around, tops[0]), np.minimum(step_b * around, tops[1])
        _, step_a, step_b, choice = _search(c, weights, near_a, near_b)
    kappa = _kappas(step_a, step_b)[choice]
    a, b = _tables(c, step_a, step_b, kappa)
    # The mean error must vanish: over many tokens it would not average out, as the rest does.
    mean = float(np.sum(weights * (a / step_a + b / step_b - c)))
    made = (a / step_a + b / step_b) - mean
    # a / step_a + b / step_b = (a * step_b / step_a + b) / step_b
    return Levels(
        a, b, float(step_b / step_a), 1.0, float(1.0 / step_b), mean, _relative(c, weights, made - c)
    )


def _kappas(step_a: Floats, step_b: Floats) -> tuple[Floats, ...]:
    return (-0.5 / step_a, -0.5 / step_b, -0.5 / step_a - 0.5 / step_b, 0.0 * step_a)


def _search(
    c: Floats, weights: Floats, steps_a: Floats, steps_b: Floats
) -> tuple[float, Floats, Floats, int]:
    """Least squared error over a grid of steps: (error, step of a, step of b, which kappa)."""
    sa, sb = np.meshgrid(steps_a, steps_b, indexing="ij")
    found: list[tuple[float, Floats, Floats, int]] = []
    for choice, kappa in enumerate(_kappas(sa, sb)):
        errors = np.zeros_like(sa)
        for low in range(8):
            pair = []
            for code in (low, 15 - low):
                own, target = _target(code, c, sa, sb, kappa)
                pair.append(_rounded(code, own * target) / own - target)
            # Even parts (what opposite levels err by alike) weigh more: they make the mean.
            errors += weights[low] * (pair[0] ** 2 + pair[1] ** 2 + EVEN_WEIGHT * (pair[0] + pair[1]) ** 2)
        k = np.unravel_index(int(np.argmin(errors)), errors.shape)
        found.append((float(errors[k]), sa[k], sb[k], choice))
    return min(found, key=lambda f: f[0])


def _target(code: int, c: Floats, sa: Floats, sb: Floats, kappa: Floats) -> tuple[Floats, Floats]:
    """Step of the code's own table, and what that table must give for it."""
    inner = 4 <= code < 12
    own, other = (sa, sb) if inner else (sb, sa)
    # The other table's entry at the same low three bits is of the other sign: inner 8..11 lie beside
    # outer 0..3, inner 4..7 beside outer 12..15; a negative entry there yields -1 here.
    return own, c[code] + kappa + (1.0 / other if code >= 8 else 0.0)


def _rounded(code: int, value: Floats) -> Floats:
    rounded: Floats = np.clip(np.round(value), *((0.0, 127.0) if code >= 8 else (-128.0, -1.0)))
    return rounded


def _tables(
    c: Floats, step_a: Floats, step_b: Floats, kappa: Floats
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    a, b = np.zeros(16, dtype=np.int64), np.zeros(16, dtype=np.int64)
    for code in range(16):
        own, target = _target(code, c, step_a, step_b, kappa)
        mine, others = (a, b) if 4 <= code < 12 else (b, a)
        mine[code] = int(_rounded(code, own * target))
        others[code] = -1 if code >= 8 else 0
    return a, b
