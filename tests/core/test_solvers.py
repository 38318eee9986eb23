"""core.solvers: what each solver finds, that nothing beats the shipped tables, the registry."""

import json
import math

import numpy as np
import pytest

from tqai.core.codebook import SHIPPED_HEAD_DIMS, codebook, optimal_codebook
from tqai.core.solvers import OBJECTIVES, CodebookRegistry, Levels, objective_value, solve_codebook
from tqai.errors import ConfigError, CorruptFileError, UnsupportedError

EDGES = 1000


def half(levels):
    return levels.centroids[len(levels.centroids) // 2 :].astype(float)


def best_possible(dim, cells):
    """Squared error of the best codebook whose boundaries lie on a fine grid, by dynamic programming: an
    optimum found without any of the conditions that the solvers rest on. Its error is above the true
    optimum's by about (cells / EDGES)^2."""
    limit = min(0.5 * math.pi, 9.0 / math.sqrt(dim))
    fine = np.linspace(0.0, limit, 16 * EDGES + 1)
    x, step = np.sin(fine), fine[1]
    density = np.cos(fine) ** (dim - 2) * step

    def running(values):
        trapezoids = 0.5 * (values[1:] + values[:-1])
        return np.concatenate([[0.0], np.cumsum(trapezoids)])[::16]

    mass, first, second = running(density), running(density * x), running(density * x * x)

    def cost(start, stop):
        m, f, s = mass[stop] - mass[start], first[stop] - first[start], second[stop] - second[start]
        return s - np.where(m > 0, f * f / np.where(m > 0, m, 1.0), 0.0)

    best = cost(np.zeros(EDGES + 1, int), np.arange(EDGES + 1))
    for _ in range(cells - 1):
        best = _one_more_cell(best, cost)
    return float(dim * best[-1] / mass[-1])


def _one_more_cell(best, cost):
    """best'[j] = min over i of best[i] + cost(i, j); the minimizing i grows with j (divide and conquer)."""
    out = np.empty_like(best)
    ranges = [(0, len(best) - 1, 0, len(best) - 1)]
    while ranges:
        low, high, first, last = ranges.pop()
        middle = (low + high) // 2
        at = np.arange(first, min(middle, last) + 1)
        values = best[at] + cost(at, middle)
        chosen = int(np.argmin(values))
        out[middle] = values[chosen]
        if low < middle:
            ranges.append((low, middle - 1, first, int(at[chosen])))
        if middle < high:
            ranges.append((middle + 1, high, int(at[chosen]), last))
    return out


@pytest.mark.parametrize(("dim", "bits"), [(64, 2), (128, 2), (96, 3), (128, 4), (256, 4), (80, 5)])
def test_shipped_tables_are_the_best_possible(dim, bits):
    best, found = best_possible(dim, 2 ** (bits - 1)), codebook(dim, bits).mse_per_unit_vector
    assert 0.999 * best < found < 1.001 * best


@pytest.mark.parametrize("dim", SHIPPED_HEAD_DIMS)
def test_shipped_tables_of_many_bits_approach_the_limit_as_they_must(dim):
    """Panter and Dite: the error times 4^bits tends to (1/12) (integral of f^(1/3))^3, with a gap that falls
    by half per bit. Two neighbours without that gap are off by what falls faster; a table 0.1 % above its
    optimum would move its pair by 0.1 % or 0.2 %, out of these ranges."""
    angles = (np.arange(200_000) + 0.5) / 200_000 * min(0.5 * math.pi, 21.0 / math.sqrt(dim))
    width = angles[1] - angles[0]
    density = np.cos(angles) ** (dim - 3)
    mass = 2 * (density * np.cos(angles)).sum() * width
    third = 2 * ((density / mass) ** (1 / 3) * np.cos(angles)).sum() * width
    limit = dim * third**3 / 12
    share = {bits: codebook(dim, bits).mse_per_unit_vector * 4.0**bits / limit for bits in (5, 6, 7, 8)}
    assert 0.9970 < 2 * share[6] - share[5] < 0.9976
    assert 0.9989 < 2 * share[7] - share[6] < 0.9993
    assert 0.9995 < 2 * share[8] - share[7] < 0.9999


@pytest.mark.parametrize(
    ("solver", "dim", "bits"),
    [
        ("auto", 128, 3),
        ("lloyd_max", 128, 1),
        ("fuzzy", 64, 2),
        ("fuzzy", 128, 3),
        ("cmaes", 64, 2),
        ("cmaes", 128, 1),
    ],
)
def test_every_solver_reaches_the_optimum(solver, dim, bits):
    pytest.importorskip("cma")
    options = {"max_generations": 60} if solver == "cmaes" else {}
    levels = solve_codebook(dim, bits, solver, **options)
    centroids, boundaries = levels
    assert centroids.dtype == boundaries.dtype == np.float32
    assert centroids.shape == (2**bits,) and boundaries.shape == (2**bits - 1,)
    assert np.all(np.diff(centroids) > 0)
    np.testing.assert_array_equal(centroids, -centroids[::-1])
    np.testing.assert_allclose(boundaries, 0.5 * (centroids[1:] + centroids[:-1]), atol=1e-7)
    best = optimal_codebook(dim, bits).mse_per_unit_vector
    assert best * (1 - 1e-6) < objective_value(half(levels), dim, "mse") < 1.001 * best


@pytest.mark.parametrize(("bits", "limit"), [(4, 1.005), (6, 1.01)])
def test_fuzzy_with_more_levels(bits, limit):
    value = objective_value(half(solve_codebook(128, bits, "fuzzy")), 128, "mse")
    assert value < limit * codebook(128, bits).mse_per_unit_vector


def test_objectives_are_what_they_say():
    """Against plain sampling of unit vectors."""
    dim, levels = 64, solve_codebook(64, 2)
    shifted = half(levels) * [1.1, 0.9]
    x = np.random.default_rng(0).standard_normal((4000, dim))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    chosen = shifted[np.searchsorted([shifted.mean()], np.abs(x), side="right")] * np.sign(x)
    mse = ((x - chosen) ** 2).sum(-1).mean()
    cosine = 1 - ((x * chosen).sum(-1) / np.linalg.norm(chosen, axis=-1)).mean()
    assert objective_value(shifted, dim, "mse") == pytest.approx(mse, rel=0.01)
    assert objective_value(shifted, dim, "cosine") == pytest.approx(cosine, rel=0.02)
    for objective in OBJECTIVES:
        assert objective_value(shifted, dim, objective) > objective_value(half(levels), dim, objective)


def test_cosine_and_attention_have_the_optimum_of_mse():
    """Evolution for attention fits its sample and is no better on others; for cosine it stays put."""
    pytest.importorskip("cma")
    plain = half(solve_codebook(64, 2))
    for_cosine = half(solve_codebook(64, 2, "cmaes", "cosine", max_generations=40))
    ratio = for_cosine / plain
    assert ratio.max() / ratio.min() - 1 < 0.01
    options = {"max_generations": 12, "n_samples": 64}
    fitted = half(solve_codebook(64, 2, "cmaes", "attention", **options))
    seen = [objective_value(levels, 64, "attention", 64, seed=0) for levels in (plain, fitted)]
    assert seen[1] <= seen[0]
    unseen = [
        np.mean([objective_value(levels, 64, "attention", 64, seed=seed) for seed in range(1, 60)])
        for levels in (plain, fitted)
    ]
    assert unseen[1] > 0.99 * unseen[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"solver": "newton"}, "solver='newton'"),
        ({"objective": "speed"}, "objective='speed'"),
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "bits=9"),
        ({"d": 0}, "head_dim=0"),
        ({"d": 1, "solver": "fuzzy"}, "d=1"),
        ({"solver": "fuzzy", "objective": "attention"}, "objective='attention'"),
        ({"solver": "fuzzy", "cooling": 1.0}, "cooling=1.0"),
        ({"solver": "fuzzy", "steps": 0}, "steps=0"),
        ({"solver": "cmaes", "max_generations": 0}, "max_generations=0"),
        ({"solver": "cmaes", "seed": -1}, "seed=-1"),
        ({"solver": "lloyd_max", "seed": 1}, "'seed' is no option of lloyd_max"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ConfigError, match=words.replace("'", ".")):
        solve_codebook(**{"d": 64, "bits": 2, **arguments})


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cma", None)
    with pytest.raises(UnsupportedError, match=r"tqai\[solvers\]"):
        solve_codebook(64, 2, "cmaes")
    assert len(solve_codebook(64, 2).centroids) == 4


def test_registry_gives_back_what_was_saved(tmp_path):
    registry = CodebookRegistry(tmp_path / "books")
    shipped = registry.load(128, 3)
    np.testing.assert_array_equal(shipped.centroids, codebook(128, 3).centroids.astype(np.float32))
    changed = Levels(shipped.centroids * np.float32(1.25), shipped.boundaries * np.float32(1.25))
    path = registry.save(128, 3, changed, solver="mine")
    loaded = CodebookRegistry(tmp_path / "books").load(128, 3)
    np.testing.assert_array_equal(loaded.centroids, changed.centroids)
    np.testing.assert_allclose(loaded.boundaries, changed.boundaries, rtol=1e-6)
    assert json.loads(path.read_text("utf-8"))["about"] == {"solver": "mine"}
    np.testing.assert_array_equal(registry.load(128, 2).centroids, CodebookRegistry().load(128, 2).centroids)
    elsewhere = registry.save(64, 4, path=tmp_path / "one.json")
    assert elsewhere.is_file() and not registry.path_of(64, 4).exists()


WHOLE = json.dumps(
    {"format": "tqai-codebook", "version": 1, "head_dim": 64, "bits": 1, "centroids": ["-0x1p-3", "0x1p-3"]}
)


def test_the_undamaged_file_loads(tmp_path):
    registry = CodebookRegistry(tmp_path)
    registry.path_of(64, 1).write_text(WHOLE)
    assert registry.load(64, 1).centroids.tolist() == [-0.125, 0.125]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": "tqai-codebook"}',
        WHOLE.replace("tqai-codebook", "x"),
        WHOLE.replace('"version": 1', '"version": 2'),
        WHOLE.replace('"bits": 1', '"bits": 2'),
        WHOLE.replace("-0x", "0x"),
    ],
)
def test_damaged_files(tmp_path, content):
    registry = CodebookRegistry(tmp_path)
    registry.path_of(64, 1).write_text(content)
    with pytest.raises(CorruptFileError, match="d64_b1"):
        registry.load(64, 1)


def test_registry_refuses_what_is_no_codebook(tmp_path):
    with pytest.raises(ConfigError, match="ascending"):
        CodebookRegistry(tmp_path).save(64, 2, Levels(np.zeros(4, np.float32), np.zeros(3, np.float32)))
    with pytest.raises(ConfigError, match="no folder"):
        CodebookRegistry().save(64, 2)
    assert not list(tmp_path.iterdir())
