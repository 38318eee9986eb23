"""Codebooks by evolution (CMA-ES, Hansen and Ostermeier 2001), through the package `cma`."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tqai.core.codebook import optimal_codebook
from tqai.core.solvers.objectives import SAMPLED_KEYS, objective_value
from tqai.errors import ConfigError, UnsupportedError

__all__ = ["solve_cmaes"]

STEP = 0.02
"""First step size of the logarithms of the gaps between levels."""
WORTHWHILE = 1.0 - 1e-9
"""A candidate counts as better below this share of the best value: rounding is no improvement."""


def solve_cmaes(
    d: int,
    bits: int,
    objective: str = "mse",
    max_generations: int = 200,
    n_samples: int = SAMPLED_KEYS,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Positive half `[2**(bits-1)]` of the best codebook found, from the Lloyd-Max one on.

    What evolves are the logarithms of the first level and of the gaps between neighbours, so that levels
    stay positive and in order. The start is a candidate too: the result is never worse than it by the
    objective as evaluated (for "attention" on the sample of that seed).

    Raises:
        ConfigError: max_generations or n_samples below 1, or a seed below 0.
        UnsupportedError: the package `cma` is not installed.
    """
    for name, value, least in (
        ("max_generations", max_generations, 1),
        ("n_samples", n_samples, 1),
        ("seed", seed, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r}: allowed are whole numbers from {least}")
    try:
        import cma
    except ImportError as error:
        raise UnsupportedError("solver='cmaes' needs the package cma: pip install 'tqai[solvers]'") from error
    start = optimal_codebook(d, bits).centroids[2 ** (bits - 1) :]

    def fitness(logs: NDArray[np.floating]) -> float:
        half = np.cumsum(np.exp(logs))
        if not half[-1] < 1.0 or not math.isfinite(half[-1]):
            return math.inf
        return objective_value(half, d, objective, n_samples, seed)

    first = np.log(np.diff(start, prepend=0.0))
    best, best_value = first, fitness(first)
    if len(first) == 1:  # the package wants two dimensions at least
        for logs in first + np.linspace(-0.2, 0.2, 401)[:, None]:
            height = fitness(logs)
            if height < best_value * WORTHWHILE:
                best, best_value = logs, height
        return np.cumsum(np.exp(best))
    # the package takes seed 0 for "choose one"
    options = {"maxiter": max_generations, "seed": seed + 1, "verbose": -9, "tolfun": 1e-14}
    search = cma.CMAEvolutionStrategy(first.tolist(), STEP, options)
    while not search.stop():
        candidates = search.ask()
        values = [fitness(np.asarray(candidate)) for candidate in candidates]
        search.tell(candidates, values)
        winner = int(np.argmin(values))
        if values[winner] < best_value * WORTHWHILE:
            best, best_value = np.asarray(candidates[winner]), values[winner]
    return np.cumsum(np.exp(best))
