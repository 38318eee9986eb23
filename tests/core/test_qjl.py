"""core.qjl: unbiased, with the variance that theory gives, in real bits."""

import math

import numpy as np
import pytest

from tqai.core.packing import unpack
from tqai.core.qjl import SignSketch, Sketched
from tqai.errors import ConfigError, InputError

SEEDS = 400


def unit(dim, seed):
    out = np.random.default_rng(seed).standard_normal(dim)
    return out / np.linalg.norm(out)


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
@pytest.mark.parametrize(("dim", "rows"), [(32, 32), (32, 8), (5, 5), (24, 17)])
@pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
def test_unbiased_over_seeds(kind, dim, rows, correlation):
    r = 3.0 * unit(dim, 0)
    across = unit(dim, 1)
    across -= across @ r * r / (r @ r)
    across /= np.linalg.norm(across)
    y = 2.0 * (correlation * r / 3.0 + math.sqrt(1 - correlation**2) * across)
    sketches = [SignSketch(dim, seed, rows, kind) for seed in range(SEEDS)]
    estimates = np.array([sketch.inner_product(y, sketch.sketch(r)) for sketch in sketches])
    deviation = estimates.std(ddof=1)
    assert abs(estimates.mean() - y @ r) < 4 * deviation / math.sqrt(SEEDS) + 1e-12
    if kind == "gaussian":
        # (pi/2 |y|^2 |r|^2 - <y, r>^2) / rows; a sample variance of 400 is within 5 sigma of 35 %.
        variance = (math.pi / 2 * 36 - (y @ r) ** 2) / rows
        assert deviation**2 == pytest.approx(variance, rel=0.35)


def test_orthogonal_rows_of_a_full_sketch_have_less_variance():
    dim, y, r = 64, unit(64, 1), unit(64, 2)
    spread = {}
    for kind in ("gaussian", "orthogonal"):
        sketches = [SignSketch(dim, seed, kind=kind) for seed in range(SEEDS)]
        spread[kind] = dim * np.var([sketch.inner_product(y, sketch.sketch(r)) for sketch in sketches])
    assert spread["gaussian"] == pytest.approx(math.pi / 2, rel=0.3)
    assert spread["orthogonal"] == pytest.approx(math.pi / 2 - 1, rel=0.3)


@pytest.mark.usefixtures("poisoned_allocations")
def test_one_bit_per_row_and_the_true_norm():
    sketch = SignSketch(20, seed=3, rows=11)
    vectors = np.random.default_rng(0).standard_normal((4, 6, 20))
    signs, norms = sketch.sketch(vectors)
    assert signs.shape == (4, 6, 2)
    assert sketch.row_bytes == 2
    assert signs.dtype == np.uint8
    np.testing.assert_array_equal(unpack(signs, 1, 11), vectors @ sketch.matrix.T >= 0)
    np.testing.assert_allclose(norms, np.linalg.norm(vectors, axis=-1), rtol=1e-14)


def test_matrices():
    gaussian, orthogonal = SignSketch(16, 5).matrix, SignSketch(16, 5, kind="orthogonal").matrix
    np.testing.assert_allclose(orthogonal @ orthogonal.T, 16 * np.eye(16), atol=1e-12)
    assert np.abs(gaussian @ gaussian.T - 16 * np.eye(16)).max() > 1
    assert not np.array_equal(gaussian, SignSketch(16, 6).matrix)
    np.testing.assert_array_equal(SignSketch(16, 5, rows=4).matrix, gaussian[:4])
    assert SignSketch(3, 0, rows=10).matrix.shape == (10, 3)
    # Pinned: what a sketch means must not change.
    np.testing.assert_allclose(gaussian[0, :2], [PINNED[0], PINNED[1]], rtol=1e-12)
    with pytest.raises(ValueError, match="read-only"):
        gaussian[0, 0] = 0


PINNED = (-1.5553440674450751, 0.10920068028583119)


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
def test_estimate_and_inner_product_agree(kind):
    sketch = SignSketch(24, 1, kind=kind)
    rng = np.random.default_rng(0)
    sketched = sketch.sketch(rng.standard_normal((3, 5, 24)))
    y = rng.standard_normal((2, 1, 1, 24))
    dots = sketch.inner_product(y, sketched)
    assert dots.shape == (2, 3, 5)
    np.testing.assert_allclose(dots, (y * sketch.estimate(sketched)).sum(-1), rtol=0, atol=1e-12)


def test_zero_huge_tiny_and_bad_vectors():
    sketch = SignSketch(16, 0)
    base = unit(16, 4)
    vectors = np.stack([0 * base, 1e300 * base, 1e-300 * base, base, base])
    vectors[3, 2], vectors[4, 0] = np.nan, -np.inf
    with np.errstate(over="raise", invalid="raise"):
        sketched = sketch.sketch(vectors)
    np.testing.assert_allclose(sketched.norms[:3], [0, 1e300, 1e-300], rtol=1e-14)
    assert np.isnan(sketched.norms[3:]).all()
    assert (sketched.signs[3:] == 0).all()
    np.testing.assert_array_equal(sketched.signs[1], sketch.sketch(base).signs)
    assert (sketch.estimate(Sketched(*(part[:1] for part in sketched))) == 0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 4, "rows": 0}, "rows=0"),
        ({"dim": 4, "kind": "sparse"}, "sketch='sparse'"),
        ({"dim": 4, "rows": 5, "kind": "orthogonal"}, "rows=5"),
        ({"dim": 4, "seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ConfigError, match=words):
        SignSketch(**arguments)


def test_wrong_last_axis():
    sketch = SignSketch(8)
    with pytest.raises(InputError, match=r"shape \[2, 7\]: \[\.\.\., 8\]"):
        sketch.sketch(np.zeros((2, 7)))
    with pytest.raises(InputError, match=r"shape \[\]"):
        sketch.inner_product(np.float64(1), sketch.sketch(np.zeros(8)))
