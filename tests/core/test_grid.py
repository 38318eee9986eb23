"""core.grid: levels are whole numbers of a byte, the best such, and cost what the docstring says."""

import numpy as np
import pytest

from tqai.core.codebook import SHIPPED_HEAD_DIMS, codebook, optimal_codebook
from tqai.core.grid import GRID_BITS, LARGEST, on_grid
from tqai.core.lloyd_max import HalfCodebook, cell_moments, solve

DIMS = [*SHIPPED_HEAD_DIMS, 2, 4, 5, 16, 33, 1000]
# Squared error above Lloyd-Max's, at most, relative.
COST = {2: 1e-5, 3: 1e-4, 4: 9e-4}


def whole_numbers(half):
    """The smallest whole numbers that `half` are multiples of, with the largest residue."""
    for largest in range(1, LARGEST + 1):
        scaled = half / half[-1] * largest
        whole = np.rint(scaled)
        if np.abs(scaled - whole).max() < 2e-5:  # float32 rounds by 8e-6 at most
            return whole
    raise AssertionError(f"{half} are no multiples up to {LARGEST}")


def error_of(dim, half):
    edges = np.concatenate([[0.0], 0.5 * (half[1:] + half[:-1]), [1.0]])
    mass, _, spread = cell_moments(dim, edges, half)
    return dim * spread.sum() / mass.sum()


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_whole_numbers_of_a_byte_even_in_float32(dim, bits):
    half = codebook(dim, bits).centroids[2 ** (bits - 1) :]
    whole = whole_numbers(half.astype(np.float32).astype(np.float64))
    assert whole[0] >= 1 and np.all(np.diff(whole) >= 1) and whole[-1] <= LARGEST


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_cost(dim, bits):
    book, best = codebook(dim, bits), optimal_codebook(dim, bits)
    assert best.mse_per_unit_vector <= book.mse_per_unit_vector * (1 + 1e-13)
    assert book.mse_per_unit_vector < best.mse_per_unit_vector * (1 + COST[bits])
    assert book.mse_per_unit_vector == pytest.approx(
        error_of(dim, book.centroids[2 ** (bits - 1) :]), rel=1e-12
    )


@pytest.mark.parametrize(("dim", "bits"), [(64, 3), (128, 4), (96, 2)])
def test_no_neighbour_and_no_other_step_is_better(dim, bits):
    half = codebook(dim, bits).centroids[2 ** (bits - 1) :]
    whole, least = whole_numbers(half), error_of(dim, half)
    step = half[-1] / whole[-1]
    for factor in (0.999, 1.001):
        assert error_of(dim, half * factor) > least
    for i in range(len(whole)):
        for by in (-1, 1):
            other = whole.copy()
            other[i] += by
            assert min(error_of(dim, other * step * f) for f in np.linspace(0.99, 1.01, 41)) > least


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_other_codebooks_are_lloyd_max(bits):
    assert bits == 1 or bits > GRID_BITS
    np.testing.assert_allclose(
        codebook(128, bits).centroids, optimal_codebook(128, bits).centroids, rtol=1e-11
    )


def test_levels_that_are_on_a_grid_stay():
    start = solve(3, 3)  # uniform: 1, 3, 5, 7
    book = on_grid(3, HalfCodebook(start.centroids, start.mse_per_unit_vector))
    np.testing.assert_allclose(book.centroids, start.centroids, rtol=1e-12)
