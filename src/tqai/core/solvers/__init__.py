"""Codebooks by several solvers and for several objectives, to compare with what the codec uses.

    lloyd_max   Newton's method on the optimality conditions (core.lloyd_max): exact, milliseconds
    cmaes       evolution of the levels (the package `cma`), on samples or exact
    fuzzy       soft assignment, hardened step by step

    mse         squared error per unit vector, exact
    cosine      1 - cosine of a vector and its code, exact but for O(1/d)
    attention   KL divergence of softmax(q K / sqrt d) when keys are coded, on samples

Under a random rotation and with a least-squares scale all three objectives have the same optimum, but for
O(1/d): see `objectives`. So "auto" is lloyd_max, and docs/quality-options.md has what the others gain.
"""

from __future__ import annotations

from typing import Any

from tqai.core.codebook import optimal_codebook
from tqai.core.solvers.evolution import solve_cmaes
from tqai.core.solvers.fuzzy import solve_fuzzy
from tqai.core.solvers.levels import Levels, levels_of
from tqai.core.solvers.objectives import OBJECTIVES, objective_value
from tqai.core.solvers.registry import CodebookRegistry
from tqai.errors import ConfigError

__all__ = ["OBJECTIVES", "SOLVERS", "CodebookRegistry", "Levels", "objective_value", "solve_codebook"]

SOLVERS = ("auto", "lloyd_max", "cmaes", "fuzzy")


def solve_codebook(d: int, bits: int, solver: str = "auto", objective: str = "mse", **options: Any) -> Levels:
    """Centroids and boundaries for one coordinate of a unit vector of `d` coordinates.

    Args:
        d: at least 1 (cmaes and fuzzy: at least 2).
        bits: 1 to 8.
        solver: one of `SOLVERS`; "auto" is "lloyd_max", which no other beats.
        objective: one of `OBJECTIVES`. fuzzy knows "mse" alone; the optimum that lloyd_max finds is that of
            all three.
        options: for cmaes `max_generations`, `n_samples`, `seed`; for fuzzy `cooling`, `steps`.

    Returns:
        float32 centroids `[2**bits]` and boundaries `[2**bits - 1]`, ascending.

    Raises:
        ConfigError: an unknown solver, objective or option, or a number out of range.
        UnsupportedError: cmaes without the package `cma`.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"solver={solver!r}: allowed are {', '.join(SOLVERS)}")
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective={objective!r}: allowed are {', '.join(OBJECTIVES)}")
    start = optimal_codebook(d, bits)
    allowed = {"cmaes": ("max_generations", "n_samples", "seed"), "fuzzy": ("cooling", "steps")}.get(
        solver, ()
    )
    for name in options:
        if name not in allowed:
            raise ConfigError(
                f"{name!r} is no option of {solver}: allowed are {', '.join(allowed) or 'none'}"
            )
    if solver in ("auto", "lloyd_max"):
        return levels_of(start.centroids[2 ** (bits - 1) :])
    if d < 2:
        raise ConfigError(f"d={d!r}: {solver} begins at 2")
    if solver == "cmaes":
        return levels_of(solve_cmaes(d, bits, objective, **options))
    if objective != "mse":
        raise ConfigError(f"objective={objective!r}: fuzzy knows mse alone; cmaes and lloyd_max know all")
    return levels_of(solve_fuzzy(d, bits, **options))
