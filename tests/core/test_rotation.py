"""core.rotation: orthogonal, seeded, the same everywhere."""

import numpy as np
import pytest

from tqai.core import rotation
from tqai.core.rotation import (
    fast_hadamard,
    gaussians,
    hadamard_signs,
    resolve,
    rotate,
    rotation_matrix,
    unrotate,
)
from tqai.errors import ConfigError

CASES = [
    *[("haar", dim) for dim in (1, 2, 3, 64, 80, 96, 128, 256)],
    *[(kind, dim) for kind in ("hadamard", "hadamard2") for dim in (1, 2, 4, 64, 128, 256)],
]
# Absolute, against entries of about 1/sqrt(dim): a Hadamard matrix is exact but for one division.
TOLERANCE = {"haar": 1e-12, "hadamard": 1e-15, "hadamard2": 1e-15}


def sylvester(dim):
    """H by its recursive definition, not by popcount or butterflies."""
    out = np.ones((1, 1))
    while len(out) < dim:
        out = np.kron(np.array([[1, 1], [1, -1]]), out)
    return out


def philox_words(key, blocks):
    """Philox4x64-10 from its paper (Salmon et al. 2011), counter 1, 2, ... as numpy counts."""
    mask = 2**64 - 1
    words = []
    for number in range(1, blocks + 1):
        counter, (k0, k1) = [number, 0, 0, 0], key
        for _ in range(10):
            left = 0xD2E7470EE14C6C93 * counter[0]
            right = 0xCA5A826395121157 * counter[2]
            counter = [
                (right >> 64) ^ counter[1] ^ k0,
                right & mask,
                (left >> 64) ^ counter[3] ^ k1,
                left & mask,
            ]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        words += counter
    return words


@pytest.mark.parametrize(("kind", "dim"), CASES)
def test_matrix_is_orthogonal(kind, dim):
    matrix = rotation_matrix(kind, dim, seed=3)
    assert matrix.shape == (dim, dim)
    assert matrix.dtype == np.float64
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), rtol=0, atol=1e-13 * max(dim, 10))


@pytest.mark.parametrize(("kind", "dim"), CASES)
def test_rotate_is_the_matrix_and_unrotate_its_inverse(kind, dim):
    rows = np.random.default_rng(0).standard_normal((2, 5, dim))
    matrix = rotation_matrix(kind, dim, seed=9)
    np.testing.assert_allclose(rotate(rows, kind, 9), rows @ matrix.T, rtol=0, atol=1e-13)
    np.testing.assert_allclose(unrotate(rows, kind, 9), rows @ matrix, rtol=0, atol=1e-13)
    np.testing.assert_allclose(unrotate(rotate(rows, kind, 9), kind, 9), rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 8, 128, 1024])
def test_fast_hadamard_is_the_unnormalised_sylvester_matrix(dim):
    for dtype in (np.float32, np.float64):
        rows = np.random.default_rng(1).integers(-9, 9, (3, dim)).astype(dtype)
        kept = rows.copy()
        np.testing.assert_array_equal(fast_hadamard(rows), rows.astype(np.float64) @ sylvester(dim))
        np.testing.assert_array_equal(rows, kept)


@pytest.mark.parametrize(("kind", "rounds"), [("hadamard", 1), ("hadamard2", 2)])
@pytest.mark.parametrize("dim", [2, 64, 256])
def test_signs_describe_the_matrix(kind, rounds, dim):
    signs = hadamard_signs(kind, dim, 5)
    assert signs.shape == (rounds, dim)
    assert signs.dtype == np.int8
    assert set(np.unique(signs)) <= {-1, 1}
    matrix = np.eye(dim)
    for row in signs:
        matrix = sylvester(dim) @ np.diag(row) @ matrix / np.sqrt(dim)
    np.testing.assert_allclose(rotation_matrix(kind, dim, 5), matrix, rtol=0, atol=1e-14)


def test_the_stream_is_philox_4x64_10():
    words = rotation._words("haar", 80, 7, 10)
    assert words.tolist() == philox_words((7, (1 << 32) + 80), 3)[:10]


# Pinned: a change here changes what every saved cache means.
def test_pinned_signs():
    packed = {
        kind: [np.packbits(row < 0, bitorder="little").tobytes().hex() for row in hadamard_signs(kind, 64, 7)]
        for kind in ("hadamard", "hadamard2")
    }
    assert packed == {
        "hadamard": ["17dba719f63aaa13"],
        "hadamard2": ["90460e7e556612c5", "df43706a9cdaaf7f"],
    }


def test_pinned_hadamard_matrix_to_the_last_bit():
    want = 0.5 * np.array([[-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, -1, -1], [1, 1, -1, -1]])
    np.testing.assert_array_equal(rotation_matrix("hadamard2", 4, 1), want)


def test_pinned_haar_matrices():
    want = [
        [0.6922707609020105, 0.6339857175653628, -0.3447075623238968],
        [-0.6509787655119548, 0.34249113653548113, -0.6774411179188681],
        [-0.3114287084593885, 0.693369981552249, 0.6498078394645228],
    ]
    np.testing.assert_allclose(rotation_matrix("haar", 3, 0), want, rtol=0, atol=TOLERANCE["haar"])
    matrix = rotation_matrix("haar", 80, 7)
    np.testing.assert_allclose(
        [matrix[0, 0], matrix[3, 41], matrix[79, 79]],
        [0.07870827572061989, 0.21185516721191092, 0.004779727573665681],
        rtol=0,
        atol=TOLERANCE["haar"],
    )


def test_pinned_gaussians():
    want = [-0.33450987198142546, 1.7028799485398831, 1.2926161031995753]
    np.testing.assert_allclose(gaussians("qjl", 128, 7, 3), want, rtol=1e-13)


def test_gaussians_are_standard_normal():
    numbers = gaussians("qjl", 1, 0, 200_001)
    assert numbers.shape == (200_001,)
    # Moments 1 to 4 and the share within one sigma, each within 5 of its own standard errors.
    for measured, expected, variance in [
        (numbers.mean(), 0.0, 1.0),
        ((numbers**2).mean(), 1.0, 2.0),
        ((numbers**3).mean(), 0.0, 15.0),
        ((numbers**4).mean(), 3.0, 96.0),
        ((np.abs(numbers) < 1).mean(), 0.6826895, 0.2166),
        ((numbers[:-1] * numbers[1:]).mean(), 0.0, 1.0),
    ]:
        assert abs(measured - expected) < 5 * np.sqrt(variance / len(numbers))


def test_haar_matrices_have_no_preferred_direction():
    # Without the sign fix the diagonal of Q has a sign of its own, which shows in its mean.
    count, dim = 600, 6
    matrices = np.stack([rotation._matrix.__wrapped__("haar", dim, seed) for seed in range(count)])
    assert np.abs(matrices.mean(axis=0)).max() < 4.5 / np.sqrt(dim * count)
    # Var of a squared entry is 2 (d - 1) / (d^2 (d + 2)).
    spread = np.sqrt(2 * (dim - 1) / (dim**2 * (dim + 2)) / count)
    assert np.abs((matrices**2).mean(axis=0) - 1 / dim).max() < 4.5 * spread
    assert 0.4 < (np.linalg.det(matrices) > 0).mean() < 0.6


@pytest.mark.parametrize("kind", ["haar", "hadamard", "hadamard2"])
def test_seed_kind_and_dim_all_matter(kind):
    base = rotation_matrix(kind, 64, 0)
    assert not np.array_equal(base, rotation_matrix(kind, 64, 1))
    assert not np.array_equal(np.abs(base[:32, :32]), np.abs(rotation_matrix(kind, 32, 0)))
    others = {"haar", "hadamard", "hadamard2"} - {kind}
    assert all(not np.array_equal(base, rotation_matrix(other, 64, 0)) for other in others)
    assert not np.array_equal(hadamard_signs("hadamard", 64, 0)[0], hadamard_signs("hadamard2", 64, 0)[0])


def test_largest_seed_is_taken():
    assert rotation_matrix("hadamard", 8, 2**63 - 1).shape == (8, 8)


def test_matrices_and_signs_are_shared_and_read_only():
    matrix, signs = rotation_matrix("auto", 64, 0), hadamard_signs("auto", 64, 0)
    assert rotation_matrix("hadamard2", 64, 0) is matrix
    for array in (matrix, signs, rotation_matrix("haar", 80, 0)):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 0


@pytest.mark.parametrize("kind", ["hadamard", "hadamard2"])
def test_fast_rotation_of_a_row_is_bitwise_independent_of_the_others(kind):
    rows = np.random.default_rng(2).standard_normal((65, 128))
    together = rotate(rows, kind, 0)
    for at in (0, 31, 64):
        np.testing.assert_array_equal(rotate(rows[at], kind, 0), together[at])


@pytest.mark.parametrize(
    ("kind", "dim", "want"),
    [
        ("auto", 128, "hadamard2"),
        ("auto", 1, "hadamard2"),
        ("auto", 80, "haar"),
        ("haar", 128, "haar"),
        ("hadamard", 64, "hadamard"),
        ("hadamard2", 64, "hadamard2"),
    ],
)
def test_resolve(kind, dim, want):
    assert resolve(kind, dim) == want


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: resolve("hadamard", 80), ["hadamard", "head_dim=80", "power of two"]),
        (lambda: resolve("hadamard2", 96), ["hadamard2", "head_dim=96"]),
        (lambda: resolve("fourier", 64), ["rotation='fourier'", "haar"]),
        (lambda: resolve("auto", 0), ["head_dim=0"]),
        (lambda: resolve("auto", 64.0), ["head_dim=64.0"]),
        (lambda: hadamard_signs("haar", 64, 0), ["haar"]),
        (lambda: hadamard_signs("auto", 80, 0), ["auto", "80"]),
        (lambda: rotation_matrix("haar", 8, -1), ["seed=-1"]),
        (lambda: rotation_matrix("haar", 8, 2**63), [f"seed={2**63}"]),
        (lambda: rotation_matrix("hadamard", 8, True), ["seed=True"]),
        (lambda: fast_hadamard(np.zeros((2, 12))), ["head_dim=12"]),
    ],
)
def test_errors_name_field_and_value(call, words):
    with pytest.raises(ConfigError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
