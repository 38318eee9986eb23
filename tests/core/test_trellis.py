"""core.trellis against a bit-by-bit reading of docs/format.md, its measured error; paths of core.viterbi."""

import copy
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai.core import bfloat16
from tqai.core.codec import CodecSpec, Encoded, make_codec
from tqai.core.packing import packed_bytes, unpack
from tqai.core.trellis import STATES, windows_of
from tqai.core.trellis_code import PART_BITS, trellis_code
from tqai.core.viterbi import cheapest_path, tail_biting_path
from tqai.errors import ConfigError, InputError

# Squared error per unit vector of 64 states, (bits, head_dim), measured on 16 000 to 32 000 vectors; that of
# 300 vectors has a standard error of 0.7 % (128) or 1 % (64).
ERROR = {
    (2, 64): 0.0720,
    (3, 64): 0.01862,
    (4, 64): 0.00503,
    (2, 128): 0.0728,
    (3, 128): 0.01889,
    (4, 128): 0.00514,
}
ERROR_TOLERANCE = 0.025
NAMES = tuple(STATES)


def codec_of(dim=64, bits=3, name="trellis", **changes):
    return make_codec(CodecSpec(name, dim, bits, **changes))


def unit_vectors(count, dim, seed=0):
    out = np.random.default_rng(seed).standard_normal((count, dim))
    return out / np.linalg.norm(out, axis=-1, keepdims=True)


def value_by_definition(codec, row, i):
    """Coordinate i of a unit vector, from the bytes of its row, bit by bit."""
    dim, bits, code = codec.spec.head_dim, codec.spec.bits, codec.code
    window = [
        int(row[k // 8]) >> (k % 8) & 1
        for k in ((i * bits + j) % (dim * bits) for j in range(code.state_bits + bits))
    ]
    m = 0
    for j, mask in enumerate(code.rows):
        m |= sum(bit for at, bit in enumerate(window) if mask >> at & 1) % 2 << j
    return float(code.levels[m]) * code.step / math.sqrt(dim)


@given(
    st.sampled_from(NAMES),
    st.integers(1, 4),
    st.sampled_from([16, 17, 64, 80, 101, 128]),
    st.randoms(use_true_random=False),
)
@settings(max_examples=30)
def test_any_coordinate_is_decoded_alone(name, bits, dim, random):
    codec = codec_of(dim, bits, name)
    rows = np.array(
        [[random.randrange(256) for _ in range(packed_bytes(dim, bits))] for _ in range(2)], np.uint8
    )
    scales = np.array([1.0, -0.375])
    decoded = codec.decode_rotated(Encoded(rows, bfloat16.to_bits(scales)))
    for i in (0, 1, dim // 2, dim - 2, dim - 1):
        for row in range(2):
            wanted = scales[row] * value_by_definition(codec, rows[row], i)
            assert decoded[row, i] == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_the_window_of_the_format_page():
    """docs/format.md: codes 5, 2, 7, 0 of 3 bits; the circle goes on with the first code."""
    codes = np.array([[5, 2, 7, 0]], np.uint8)
    windows = windows_of(codes, 3, 9)
    assert [format(int(w), "09b") for w in windows[0]] == ["111010101", "000111010", "101000111", "010101000"]


@pytest.mark.parametrize(("bits", "dim"), ERROR)
def test_error_per_unit_vector(bits, dim):
    vectors = unit_vectors(300, dim, seed=bits)
    codec = codec_of(dim, bits)
    error = ((vectors - codec.decode(codec.encode(vectors))) ** 2).sum(-1).mean()
    assert error == pytest.approx(ERROR[bits, dim], rel=ERROR_TOLERANCE)


def test_more_states_have_less_error():
    vectors = unit_vectors(100, 64)
    few, many = (codec_of(64, 2, name) for name in NAMES)
    errors = [((vectors - codec.decode(codec.encode(vectors))) ** 2).sum() for codec in (few, many)]
    assert errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize("bits", [1, 2])
def test_cheapest_path_is_the_cheapest(bits):
    """Over all paths of three steps, from any state and from and to a given one."""
    code = trellis_code(6, bits)
    table = code.window_levels.astype(np.float32)
    rng = np.random.default_rng(bits)
    targets = (rng.standard_normal((5, 3)) / code.step).astype(np.float32)
    paths = np.arange(1 << (6 + 3 * bits))
    windows = np.stack([paths >> (i * bits) & (len(table) - 1) for i in range(3)], -1)
    costs = ((targets[:, None].astype(float) - table[windows]) ** 2).sum(-1)
    found = cheapest_path(targets, table, 6)
    cost = ((targets - table[found].astype(float)) ** 2).sum(-1)
    np.testing.assert_allclose(cost, costs.min(-1), rtol=1e-6)
    assert ((found[:, :-1] >> bits) == (found[:, 1:] & 63)).all()

    # three steps replace 3 * bits of the 6 state bits: some ends cannot be reached from there
    ends = np.array([0b010101, 0, 63, 63, 0])
    ends_meet = (paths & 63 == ends[:, None]) & (paths >> (3 * bits) == ends[:, None])
    held = cheapest_path(targets, table, 6, ends)
    cost = ((targets - table[held].astype(float)) ** 2).sum(-1)
    for row in range(5):
        if ends_meet[row].any():
            assert cost[row] == pytest.approx(costs[row, ends_meet[row]].min(), rel=1e-6)


@pytest.mark.parametrize("steps", [16, 50, 200])
def test_paths_are_circles(steps):
    code = trellis_code(6, 3)
    targets = np.random.default_rng(steps).standard_normal((3, steps)) / code.step
    windows = tail_biting_path(targets, code.window_levels.astype(np.float32), 6)
    np.testing.assert_array_equal(windows >> 3, np.roll(windows, -1, -1) & 63)


def test_the_seam_costs_little():
    """Against the best of all 64 states there, which is the exact solution."""
    code = trellis_code(6, 2)
    table = code.window_levels.astype(np.float32)
    targets = (unit_vectors(12, 64, seed=3) * 8.0 / code.step).astype(np.float32)

    def cost(windows):
        return ((targets - table[windows].astype(float)) ** 2).sum(-1)

    every = np.stack([cost(cheapest_path(targets, table, 6, np.full(12, state))) for state in range(64)])
    ours = cost(tail_biting_path(targets, table, 6))
    assert (ours >= every.min(0) * (1 - 1e-6)).all()
    assert ours.sum() < 1.01 * every.min(0).sum()


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("dim", [17, 80])
def test_least_squares_scale_is_the_best_scale(dim, bits):
    vectors = 7.0 * unit_vectors(10, dim)
    best, norm = (codec_of(dim, bits, scale=scale) for scale in ("least_squares", "norm"))
    found, other = best.encode(vectors), norm.encode(vectors)
    np.testing.assert_array_equal(found.codes, other.codes)
    np.testing.assert_array_equal(other.scales, bfloat16.to_bits(np.full(10, 7.0)))
    chosen = best.decode(Encoded(found.codes, bfloat16.to_bits(np.ones(10)))).astype(float)
    wanted = (vectors * chosen).sum(-1) / (chosen**2).sum(-1)
    np.testing.assert_allclose(bfloat16.from_bits(found.scales), wanted, rtol=2.0**-8)


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("name", NAMES)
def test_special_vectors_stay_in_their_rows(name):
    codec = codec_of(64, 2, name)
    vectors = np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32)
    clean = codec.encode(vectors)
    vectors[1] = 0.0
    vectors[3, 5] = np.nan
    vectors[4, 6] = -np.inf
    vectors[5] = np.nextafter(np.float32(2.0**-126), np.float32(0))
    vectors[7] = 3e38
    with np.errstate(all="raise"):
        encoded = codec.encode(vectors)
        decoded = codec.decode(encoded)
    assert (encoded.codes[[1, 3, 4, 5]] == 0).all()
    assert (encoded.scales[[1, 5]] == 0).all()
    assert (encoded.scales[[3, 4]] == bfloat16.NAN_BITS).all()
    assert (decoded[[1, 5]] == 0).all() and np.isnan(decoded[[3, 4]]).all()
    assert encoded.scales[7] == 0x7F7F and np.isfinite(decoded[7]).all()
    rest = [0, 2, 6, 8]
    np.testing.assert_array_equal(encoded.codes[rest], clean.codes[rest])
    np.testing.assert_array_equal(encoded.scales[rest], clean.scales[rest])


def test_scaling_by_a_power_of_two_moves_only_the_scale():
    codec = codec_of(64, 3)
    vectors = np.random.default_rng(0).standard_normal((4, 64))
    base = codec.encode(vectors)
    for exponent in (-100, 100):
        moved = codec.encode(np.ldexp(vectors, exponent))
        np.testing.assert_array_equal(moved.codes, base.codes)
        shifted = np.ldexp(bfloat16.from_bits(base.scales), exponent)
        np.testing.assert_array_equal(bfloat16.from_bits(moved.scales), shifted)


@pytest.mark.parametrize("lead", [(), (1,), (3, 2), (0,), (2, 0, 5)])
def test_leading_axes_and_strides(lead):
    codec = codec_of(80, 3)
    vectors = np.random.default_rng(0).standard_normal((*lead, 80)).astype(np.float16)
    encoded = codec.encode(vectors)
    assert encoded.codes.shape == (*lead, 30) and encoded.codes.dtype == np.uint8
    assert encoded.scales.shape == lead and encoded.scales.dtype == np.uint16
    assert codec.decode(encoded).shape == (*lead, 80)
    turned = np.asfortranarray(vectors.astype(np.float64))
    np.testing.assert_array_equal(codec.encode(turned).codes, encoded.codes)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_tables_and_copies(name):
    codec = codec_of(128, 3, name)
    assert (codec.row_bytes, codec.bits_per_value) == (48, 3.125)
    assert codec.spec.rotation == "hadamard2"
    windows = codec.tables()["windows"]
    assert windows.shape == (1 << (3 + STATES[name]),) and windows.dtype == np.float32
    assert 0.8 < np.sqrt(np.mean(windows**2) * 128) < 1.4
    with pytest.raises(ValueError, match="read-only"):
        windows[0] = 0
    resolved = make_codec(codec.spec)
    assert pickle.loads(pickle.dumps(codec)) is resolved
    assert copy.deepcopy(codec) is resolved


@pytest.mark.parametrize("state_bits", [6, 8])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_centroids_and_rows_independent(state_bits, bits):
    """What the recipe promises: every level is reached, and lies near the mean of what is coded with it."""
    code = trellis_code(state_bits, bits)
    index = code.mixed(np.arange(1 << code.window_bits))
    assert (np.bincount(index) == (1 << code.window_bits) // len(code.levels)).all()
    assert len(code.levels) == 1 << len(code.rows) and len(code.levels) in (64, 128)
    assert 120 <= np.abs(code.levels.astype(int)).max() <= 127
    half = np.random.default_rng(7).standard_normal((20, 150 if state_bits == 8 else 400))
    x = np.concatenate([half, -half]).astype(np.float32)
    chosen = index[cheapest_path(x / code.step, code.window_levels.astype(np.float32), state_bits)]
    count = np.bincount(chosen.ravel(), minlength=len(code.levels))
    mean = np.bincount(chosen.ravel(), weights=x.ravel(), minlength=len(code.levels)) / np.maximum(count, 1)
    error = np.mean((x - code.levels[chosen] * code.step) ** 2)
    if bits == 4:  # of sums, what is coded with either part has the mean
        off = [((count * (mean - code.levels * code.step)).reshape(8, 16)).sum(axis) for axis in (0, 1)]
        number = [count.reshape(8, 16).sum(axis) for axis in (0, 1)]
        off, count = np.concatenate(off), np.concatenate(number)
        off = off / np.maximum(count, 1)
    else:
        off = mean - code.levels * code.step
    off, count = off[count > 30], count[count > 30]
    assert len(off) >= 24
    # a mean of n has a standard error of sqrt(error / n), beside half a whole number
    assert ((np.abs(off) - 0.5 * code.step * (bits == 4)) * np.sqrt(count / error)).max() < 5.5


@pytest.mark.parametrize("state_bits", [6, 8])
def test_levels_of_four_bits_are_sums_of_two_parts_found_by_shifts(state_bits):
    code = trellis_code(state_bits, 4)
    windows = np.arange(1 << code.window_bits)
    index = []
    for part, width in zip(code.terms, PART_BITS, strict=True):
        found = np.zeros_like(windows)
        for shift, mask in part:
            found ^= (windows >> shift) & mask
        assert found.max() < 1 << width
        index.append(found)
    sums = code.parts[0].astype(int)[index[0]] + code.parts[1][index[1]]
    np.testing.assert_array_equal(sums, code.window_levels)
    assert (code.parts[0][:8] < 0).all() and (code.parts[0][8:] >= 0).all()
    assert not any(trellis_code(state_bits, bits).parts for bits in (1, 2, 3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 5}, "bits=5.*1 to 4 bits"),
        ({"bits": 0}, "bits=0"),
        ({"head_dim": 15}, "head_dim=15.*16 and more"),
        ({"scale": "max"}, "scale='max'.*least_squares"),
        ({"rotation": "hadamard", "head_dim": 80}, "head_dim=80"),
        ({"seed": 2**63}, "seed="),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_make_codec_refuses(name, changes, words):
    with pytest.raises(ConfigError, match=words):
        make_codec(CodecSpec(**{"name": name, "head_dim": 64, "bits": 4, **changes}))


@pytest.mark.parametrize(
    ("vectors", "words"), [(np.zeros((2, 63)), r"\[2, 63\]"), (np.zeros((2, 64), np.int32), "int32")]
)
def test_encode_refuses(vectors, words):
    with pytest.raises(InputError, match=words):
        codec_of(64, 4).encode(vectors)


def test_codes_are_the_low_bits_of_the_windows():
    codec = codec_of(48, 4)
    vectors = unit_vectors(5, 48)
    codes = unpack(codec.encode(vectors).codes, 4, 48)
    np.testing.assert_array_equal(windows_of(codes, 4, 10) & 15, codes)
