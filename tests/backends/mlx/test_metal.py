"""The Metal kernels, compiled as C++ and run on the CPU, against MLX operations and core; their check."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tqai.backends.mlx import pages as mlx_pages
from tqai.backends.mlx.attention import Partial, empty_partial, history_partial
from tqai.backends.mlx.codes import mlx_codec
from tqai.backends.mlx.metal import checks, launch
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cpu_kernels import CpuKernels, compiler

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


def page_format_of(bits_k, bits_v, key_dim, value_dim, scale="least_squares"):
    specs = (("scalar", key_dim, bits_k), ("scalar", value_dim, bits_v))
    return PageFormat(*(make_codec(CodecSpec(*spec, scale=scale, seed=i)) for i, spec in enumerate(specs)))


PAIRS = [(page_format_of(k, v, 32, 32), 2) for k in range(1, 9) for v in range(1, 9)]
SHAPES = [
    (page_format_of(4, 2, 128, 128), 1),
    (page_format_of(4, 2, 128, 128), 7),
    (page_format_of(3, 5, 80, 96, "norm"), 4),
    (page_format_of(2, 3, 256, 256), 3),
    (page_format_of(5, 4, 65, 33), 16),
    (page_format_of(4, 4, 192, 128), 2),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """All cases in one library."""
    return CpuKernels(tmp_path_factory.mktemp("metal"), PAIRS + SHAPES)


def drawn(seed, page_format, *lead):
    rng = np.random.default_rng(seed)
    return tuple(
        mx.array(rng.standard_normal((*lead, 64, codec.spec.head_dim)).astype(np.float32))
        for codec in (page_format.key, page_format.value)
    )


def attention_error(kernels, case, seed, ranges, pages=3, batch=1, per_split=1, order=0):
    """Of output and log-sum-exp of the kernel, merged, against MLX operations."""
    page_format, rows = case
    heads = 2
    slab = mlx_pages.encode_pages(*drawn(seed, page_format, batch, heads, pages), page_format)
    dim = page_format.key.spec.head_dim
    rng = np.random.default_rng(seed)
    query = mx.array(rng.standard_normal((batch, heads, rows, 1, dim)).astype(np.float32) * 2 * dim**-0.5)
    rotated = np.array(mlx_codec(page_format.key).rotate(query))[:, :, :, 0]
    out, stats = kernels.attend(case, rotated, np.array(slab), ranges, per_split, order)
    state = empty_partial(query, page_format.value.spec.head_dim)
    columns = np.arange(pages * 64)
    seen = np.stack([(columns >= first) & (columns < last) for first, last in ranges])
    wanted, _ = history_partial(
        state, query, [slab], page_format, mx.array(seen)[:, None, None, None], 0, None
    )
    found = launch.merged(state, mx.array(out), mx.array(stats))
    return max(
        float(mx.linalg.norm(a - b) / mx.maximum(mx.linalg.norm(b), 1e-30))
        for a, b in zip(finished(found), finished(wanted), strict=True)
    )


def finished(partial: Partial):
    some = partial.total > 0
    total = mx.where(some, partial.total, 1.0)
    lse = mx.where(some, mx.where(some, partial.top, 0.0) + mx.log(total), 0.0)
    return partial.coded / total[..., None], lse


@needs_compiler
@pytest.mark.parametrize("case", PAIRS, ids=lambda case: f"{case[0].key.spec.bits}-{case[0].value.spec.bits}")
def test_kernels_serve_every_pair_of_bits(kernels, case):
    page_format, _ = case
    assert attention_error(kernels, case, 1, [(5, 150)], per_split=2) < 1e-5
    check_encode(kernels, case, drawn(2, page_format, 2))


@needs_compiler
@pytest.mark.parametrize("case", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("order", [0, 1])
def test_kernels_serve_other_sizes(kernels, case, order):
    """Head dimensions, query heads per KV head, and threads that run in either order."""
    assert attention_error(kernels, case, 3, [(0, 192), (0, 64)], batch=2, order=order) < 1e-5
    check_encode(kernels, case, drawn(4, case[0], 1), order)


@needs_compiler
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 191])
@pytest.mark.parametrize("first", [0, 1, 63])
def test_attention_over_odd_lengths(kernels, length, first):
    case = SHAPES[0]
    assert attention_error(kernels, case, length, [(min(first, length), length)], per_split=2) < 1e-5


@needs_compiler
def test_a_sequence_that_sees_nothing_adds_nothing(kernels):
    case = SHAPES[0]
    assert attention_error(kernels, case, 9, [(0, 0), (64, 65)], batch=2) < 1e-5
    slab = np.full((1, 2, 2, case[0].page_bytes), 0xFF, np.uint8)  # every scale is a NaN
    out, stats = kernels.attend(case, np.ones((1, 2, 1, 128), np.float32), slab, [(0, 0)], 1)
    assert (out == 0).all()
    assert (stats[..., 0] == -np.inf).all()
    assert (stats[..., 1] == 0).all()


@needs_compiler
def test_attention_does_not_feel_tokens_out_of_sight(kernels):
    case = SHAPES[0]
    page_format = case[0]
    slab = np.array(mlx_pages.encode_pages(*drawn(5, page_format, 1, 2, 1), page_format))
    query = np.random.default_rng(5).standard_normal((1, 2, 1, 128)).astype(np.float32)
    clean = kernels.attend(case, query, slab, [(3, 60)], 1)
    for at in (page_format.key_scales_at, page_format.value_scales_at):
        for token in (0, 2, 60, 63):
            slab[..., at + 2 * token : at + 2 * token + 2] = (0xC0, 0x7F)
    for found, wanted in zip(kernels.attend(case, query, slab, [(3, 60)], 1), clean, strict=True):
        np.testing.assert_array_equal(found, wanted)


@needs_compiler
def test_encode_of_special_vectors(kernels):
    case = SHAPES[0]
    keys, values = (np.array(x) for x in drawn(6, case[0], 1))
    for part in (keys, values):
        part[0, 0], part[0, 1], part[0, 2], part[0, 3, 1], part[0, 4, 2] = 0, 1e-40, 3e38, np.nan, np.inf
    check_encode(kernels, case, (mx.array(keys), mx.array(values)))


def check_encode(kernels, case, vectors, order=0):
    page_format = case[0]
    rotated = [
        np.array(part)
        for codec, x in zip((page_format.key, page_format.value), vectors, strict=True)
        for part in mlx_codec(codec).rotated_rows(x)
    ]
    found = kernels.encode(case, *rotated, order=order)
    wanted = np.array(mlx_pages.encode_pages(*vectors, page_format))
    assert found.shape == wanted.shape
    # a coordinate or a scale within float32 rounding of a boundary
    assert (found != wanted).sum() <= 2


@needs_compiler
@pytest.mark.parametrize("barrier", [0, 1, 2])
def test_a_missing_barrier_would_be_found(tmp_path, barrier):
    """The test of the test: without one of the barriers in the loop a result changes or a thread hangs."""
    mark = "threadgroup_barrier(mem_flags::mem_threadgroup);"

    def without(text):
        pieces = text.split(mark)
        return (
            mark.join(pieces[: barrier + 1]) + pieces[barrier + 1] + mark.join(["", *pieces[barrier + 2 :]])
        )

    case = SHAPES[0]
    broken = CpuKernels(tmp_path, [case], changed=without)
    errors = [attention_error(broken, case, 7, [(0, 192)], per_split=3, order=order) for order in (0, 1)]
    assert not max(errors) < 1e-5


def as_metal(kernels, case):
    """What `mx.fast.metal_kernel` returns, computed by the C++ form."""

    def attend(inputs, grid, threadgroup, output_shapes, output_dtypes):
        query, slab, _, _, ranges, sizes = (np.array(x) for x in inputs)
        assert threadgroup == (128, 1, 1)
        assert grid == (output_shapes[0][2] * 128, slab.shape[1], slab.shape[0])
        out, stats = kernels.attend(case, query[:, :, :, 0], slab, ranges, int(sizes[2]))
        assert [out.shape, stats.shape] == output_shapes
        return [mx.array(out), mx.array(stats)]

    def encode(inputs, grid, threadgroup, output_shapes, output_dtypes):
        parts = [np.array(x) for x in inputs[:4]]
        count = grid[1]
        assert (grid[0], grid[2], threadgroup) == (64, 2, (64, 1, 1))
        parts = [part.reshape(count, 64, -1) for part in parts]
        parts[1], parts[3] = parts[1][..., 0], parts[3][..., 0]
        return [mx.array(kernels.encode(case, *parts)).reshape(output_shapes[0])]

    return attend, encode


@pytest.fixture
def on_metal(monkeypatch, request):
    """A machine that says it has Metal, with the kernels in their C++ form."""
    for check in (checks.attend_is_right, checks.encode_is_right):
        check.cache_clear()
    monkeypatch.setattr(launch, "serves", lambda: True)
    yield
    for check in (checks.attend_is_right, checks.encode_is_right):
        check.cache_clear()


@needs_compiler
def test_launch_and_check_with_the_kernels_in_place(monkeypatch, kernels, on_metal, caplog):
    """Everything around the kernels: shapes, grids, merge, a history of two slabs, the check itself."""
    case = SHAPES[1]
    page_format, rows = case
    attend, encode = as_metal(kernels, case)
    monkeypatch.setattr(launch, "_attend_kernel", lambda page_format, rows: attend)
    monkeypatch.setattr(launch, "_encode_kernel", lambda page_format: encode)
    assert checks.encode_is_right(page_format)
    assert checks.attend_is_right(page_format, rows)
    assert not caplog.records
    keys, values = drawn(8, page_format, 2, 2, 3)
    raw = launch.encode_pages(keys, values, page_format)
    assert float((raw != mlx_pages.encode_pages(keys, values, page_format)).sum()) <= 2
    query = mx.array(np.random.default_rng(8).standard_normal((2, 2, rows, 1, 128)).astype(np.float32)) * 0.1
    slabs = [raw[:, :, :2], raw[:, :, 2:]]
    reader = launch.history_reader(slabs, page_format, [70, 0], [192, 100])
    found = reader(query, empty_partial(query, 128))
    columns = np.arange(192)
    seen = np.stack([(columns >= 70), (columns < 100)])[:, None, None, None]
    wanted, _ = history_partial(empty_partial(query, 128), query, slabs, page_format, mx.array(seen), 0, None)
    for a, b in zip(finished(found), finished(wanted), strict=True):
        assert float(mx.linalg.norm(a - b) / mx.linalg.norm(b)) < 1e-5
    assert reader(mx.zeros((2, 2, rows, 2, 128)), empty_partial(query, 128)) is None
    assert reader(mx.zeros((2, 2, 99, 1, 128)), empty_partial(query, 128)) is None


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_kernel_that_differs_is_turned_off_loudly(monkeypatch, on_metal, caplog, fault):
    page_format = page_format_of(4, 2, 64, 64)

    def kernel(inputs, grid, threadgroup, output_shapes, output_dtypes):
        if fault == "raises":
            raise RuntimeError("[metal::Device] Unable to build metal library")
        return [mx.ones(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

    monkeypatch.setattr(launch, "_attend_kernel", lambda page_format, rows: kernel)
    monkeypatch.setattr(launch, "_encode_kernel", lambda page_format: kernel)
    keys, values = drawn(9, page_format, 1, 2, 2)
    with caplog.at_level(logging.WARNING, "tqai"):
        raw = launch.encode_pages(keys, values, page_format)
        query = mx.ones((1, 2, 2, 1, 64))
        reader = launch.history_reader([raw], page_format, [0], [128])
        assert reader(query, empty_partial(query, 64)) is None
        assert reader(query, empty_partial(query, 64)) is None
    assert mx.array_equal(raw, mlx_pages.encode_pages(keys, values, page_format))
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert "kernel for encoding is turned off" in said[0]
    assert "kernel for attention is turned off" in said[1]
    assert ("Unable to build metal library" in said[1]) == (fault == "raises")


def test_no_kernel_is_launched_without_metal_or_when_told_not_to(monkeypatch):
    assert not launch.serves()
    assert launch.history_reader([], page_format_of(4, 2, 64, 64), [0], [0]) is None

    class Gpu:
        type = mx.DeviceType.gpu

    monkeypatch.setattr(mx, "default_device", lambda: Gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert launch.serves()
    monkeypatch.setenv("TQAI_MLX_KERNELS", "0")
    assert not launch.serves()


@pytest.mark.parametrize(("pages", "heads"), [(1, 1), (64, 8), (64, 1000), (3, 2), (1000, 1)])
def test_division_covers_every_page_once(pages, heads):
    per_split, splits = launch.division(pages, heads)
    assert (splits - 1) * per_split < pages <= splits * per_split
    assert splits * heads <= max(launch.TARGET_THREADGROUPS, heads)
