"""core.codebook and core.lloyd_max: optimal, as good as published, shipped tables as solved.

What whole numbers of a byte change is in test_grid.py."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from tqai.core import lloyd_max
from tqai.core.codebook import (
    SHIPPED_HEAD_DIMS,
    codebook,
    distortion_bound,
    optimal_codebook,
    solved_codebook,
)
from tqai.core.grid import GRID_BITS
from tqai.core.tables import __main__ as regenerate
from tqai.errors import ConfigError

SHIPPED = [(dim, bits) for dim in SHIPPED_HEAD_DIMS for bits in range(1, 9)]
ODD_DIMS = (1, 2, 3, 4, 5, 7, 33, 72, 160, 384, 1000, 4096)
# Squared error per unit vector of Lloyd-Max at (head_dim, bits); agreed to 1 %.
PUBLISHED = {
    (128, 1): 0.3609,
    (128, 2): 0.1160,
    (128, 3): 0.0340,
    (128, 4): 0.00932,
    (64, 2): 0.1145,
    (64, 3): 0.0334,
    (64, 4): 0.00913,
}


def independent_moments(dim, edges):
    """Mass and mean of the cells, dim >= 3: quadrature in x itself, the mean's numerator in closed form."""
    nodes, weights = np.polynomial.legendre.leggauss(48)
    parts = 8
    fine = edges[:-1, None] + np.diff(edges)[:, None] * np.arange(parts + 1) / parts
    half = 0.5 * np.diff(fine, axis=1)[..., None]
    at = 0.5 * (fine[:, 1:] + fine[:, :-1])[..., None] + half * nodes
    mass = (half * weights * (1 - at**2) ** ((dim - 3) / 2)).sum((1, 2))
    antiderivative = -((1 - edges**2) ** ((dim - 1) / 2)) / (dim - 1)
    return mass, np.diff(antiderivative) / mass


@pytest.mark.parametrize(("dim", "bits"), PUBLISHED)
def test_distortion_is_the_published_one(dim, bits):
    assert codebook(dim, bits).mse_per_unit_vector == pytest.approx(PUBLISHED[dim, bits], rel=0.01)


@pytest.mark.parametrize(("dim", "bits"), SHIPPED)
def test_distortion_is_that_of_the_centroids(dim, bits):
    """E|x - c|^2 = E|x|^2 - E|c|^2 for centroids that are means, with E|x|^2 = 1."""
    book = codebook(dim, bits)
    edges = np.concatenate([[0.0], book.boundaries[len(book.boundaries) // 2 + 1 :], [1.0]])
    mass, _ = independent_moments(dim, edges)
    half = book.centroids[len(book.centroids) // 2 :]
    assert mass.sum() == pytest.approx(math.sqrt(math.pi) / 2 * gamma_ratio(dim), rel=1e-12)
    explained = dim * (mass * half**2).sum() / mass.sum()
    assert book.mse_per_unit_vector == pytest.approx(1 - explained, abs=1e-12)


def gamma_ratio(dim):
    return math.exp(math.lgamma((dim - 1) / 2) - math.lgamma(dim / 2))


@pytest.mark.parametrize("dim", [*SHIPPED_HEAD_DIMS, *ODD_DIMS])
def test_distortion_is_below_the_theorem(dim):
    for bits in range(1, 9):
        assert codebook(dim, bits).mse_per_unit_vector < distortion_bound(bits)


def test_bound_is_that_of_the_paper():
    assert distortion_bound(2) == pytest.approx(math.sqrt(3) * math.pi / 2 / 16, rel=1e-15)


@pytest.mark.parametrize(("dim", "bits"), [*SHIPPED, (3, 5), (5, 8), (33, 4), (1000, 3)])
def test_optimality_conditions(dim, bits):
    book = codebook(dim, bits) if bits > GRID_BITS else optimal_codebook(dim, bits)
    edges = np.concatenate([[-1.0], book.boundaries, [1.0]])
    # Quadrature over the whole line, so that symmetry is not assumed.
    _, mean = independent_moments(dim, edges)
    np.testing.assert_allclose(book.centroids, mean, rtol=0, atol=1e-9)
    middles = 0.5 * (book.centroids[1:] + book.centroids[:-1])
    np.testing.assert_allclose(book.boundaries, middles, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dim", "bits"), SHIPPED)
def test_shipped_table_is_the_solvers(dim, bits):
    shipped, solved = codebook(dim, bits), solved_codebook(dim, bits)
    np.testing.assert_allclose(shipped.centroids, solved.centroids, rtol=1e-11)
    np.testing.assert_allclose(shipped.mse_per_unit_vector, solved.mse_per_unit_vector, rtol=1e-11)


def test_shipped_dims_are_read_and_not_solved(monkeypatch):
    def refuse(head_dim, bits):
        raise AssertionError(f"solved {head_dim}, {bits}")

    monkeypatch.setattr("tqai.core.codebook.solved_half", refuse)
    codebook.cache_clear()
    for dim, bits in SHIPPED:
        assert len(codebook(dim, bits).centroids) == 2**bits
    with pytest.raises(AssertionError, match="solved 65, 2"):
        codebook(65, 2)


def test_regeneration_writes_the_shipped_file_again(tmp_path):
    regenerate.main(tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text("utf-8"))
    shipped = json.loads(Path(regenerate.__file__).with_name("lloyd_max.json").read_text("utf-8"))
    assert again["note"] == shipped["note"]
    assert list(again["head_dims"]) == [str(dim) for dim in SHIPPED_HEAD_DIMS]
    for dim, tables in shipped["head_dims"].items():
        for bits, table in tables.items():
            other = again["head_dims"][dim][bits]
            np.testing.assert_allclose(
                [float.fromhex(level) for level in other["centroids"]],
                [float.fromhex(level) for level in table["centroids"]],
                rtol=1e-11,
            )


@pytest.mark.parametrize("dim", [*SHIPPED_HEAD_DIMS, *ODD_DIMS])
@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_symmetric_and_apart_even_in_float32(dim, bits):
    book = codebook(dim, bits)
    assert book.centroids.shape == (2**bits,)
    assert book.boundaries.shape == (2**bits - 1,)
    assert book.centroids.dtype == book.boundaries.dtype == np.float64
    np.testing.assert_array_equal(book.centroids, -book.centroids[::-1])
    assert book.boundaries[2 ** (bits - 1) - 1] == 0.0
    levels = np.empty(2 * len(book.centroids) - 1, np.float32)
    levels[::2], levels[1::2] = book.centroids, book.boundaries
    assert (np.diff(levels) > 0).all()
    assert (np.abs(levels) <= 1).all()
    for array in (book.centroids, book.boundaries):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("bits", range(1, 9))
def test_one_dimension_is_exact(bits):
    book = codebook(1, bits)
    assert book.centroids[0] == -1.0
    assert book.centroids[-1] == 1.0
    assert book.mse_per_unit_vector == 0.0


@pytest.mark.parametrize("bits", range(1, 9))
def test_three_dimensions_are_uniform(bits):
    """A coordinate of a unit vector in space is uniform on [-1, 1] (Archimedes)."""
    cells = 2**bits
    want = (2 * np.arange(cells) + 1 - cells) / cells
    book = optimal_codebook(3, bits)
    np.testing.assert_allclose(book.centroids, want, rtol=0, atol=1e-13)
    assert book.mse_per_unit_vector == pytest.approx(4.0**-bits, rel=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_two_dimensions_by_plain_iteration_from_random_starts(bits):
    """The arcsine density: mass and mean of a cell in closed form, Lloyd's iteration from three starts.

    The whole line is iterated, so a better codebook that is not symmetric would be found.
    """
    for seed in range(3):
        levels = np.sort(np.random.default_rng(seed).uniform(-1, 1, 2**bits))
        for _ in range(6000):
            edges = np.concatenate([[-1.0], 0.5 * (levels[1:] + levels[:-1]), [1.0]])
            angles = np.arcsin(edges)
            levels = -np.diff(np.cos(angles)) / np.diff(angles)
        np.testing.assert_allclose(optimal_codebook(2, bits).centroids, levels, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dim", [2, 65, 4096])
def test_solving_is_quick(dim):
    start = time.process_time()
    lloyd_max.solve(dim, 8)
    assert time.process_time() - start < 0.3


@pytest.mark.parametrize(
    ("dim", "bits", "words"),
    [
        (0, 2, "head_dim=0"),
        (-3, 2, "head_dim=-3"),
        (64.0, 2, r"head_dim=64\.0"),
        (64, 0, "bits=0"),
        (64, 9, "bits=9"),
        (64, True, "bits=True"),
    ],
)
def test_errors_name_field_and_value(dim, bits, words):
    for make in (codebook, solved_codebook, optimal_codebook):
        with pytest.raises(ConfigError, match=words):
            make(dim, bits)
