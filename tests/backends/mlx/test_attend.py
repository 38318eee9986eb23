"""Attention on codes in MLX against float64 attention to the tokens that core decodes."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from tqai.backends import load, resolve
from tqai.backends.base import ExactTokens, History
from tqai.backends.mlx import attention
from tqai.backends.mlx.attention import attend
from tqai.backends.mlx.pages import decode_pages, encode_pages, join_parts, split_pages
from tqai.core.page import pages_from_bytes, pages_to_bytes
from tqai.errors import UnsupportedError

# Relative L2 of the whole output; half types are bounded by the rounding of the output.
TOLERANCE = {"float32": 5e-6, "bfloat16": 4e-3, "float16": 5e-4}


def reference(query, keys, values, mask, scaling, softcap=None):
    """Attention in float64: the definition, written out. Returns output and log-sum-exp."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (np.repeat(x.astype(float), groups, axis=1) for x in (keys, values))
    logits = scaling * query.astype(float) @ keys.swapaxes(-1, -2)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    new, tokens = logits.shape[-2:]
    seen = np.tril(np.ones((new, tokens), bool), tokens - new) if mask is None else mask
    seen = np.broadcast_to(seen, logits.shape)
    logits = np.where(seen, logits, -np.inf)
    top = np.where(seen.any(-1), logits.max(-1), 0.0)[..., None]
    weights = np.where(seen, np.exp(logits - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    out = np.where(total > 0, weights / np.where(total > 0, total, 1.0), 0.0) @ np.where(
        seen.any(-2)[..., None], values, 0.0
    )
    with np.errstate(divide="ignore"):
        return out, np.log(total[..., 0]) + top[..., 0]


@dataclass
class Case:
    """Pages of MLX, and all tokens in order as numpy, those of the pages as core decodes them."""

    page_format: object
    slabs: list
    sinks: ExactTokens
    recent: ExactTokens
    query: object
    keys: np.ndarray
    values: np.ndarray
    scaling: float


@pytest.fixture
def case_of(format_of, normal):
    def make(
        bits_k, bits_v, key_dim, value_dim, batch, heads, groups, pages, own, new, dtype="float32", sinks=3
    ):
        page_format = format_of(bits_k, bits_v, key_dim, value_dim)
        seed = bits_k * 100 + bits_v * 10 + pages
        sides = []
        for side, dim in enumerate((key_dim, value_dim)):
            size = np.exp(normal(seed + 50 + side, batch, heads, pages, 64, 1))
            sides.append(normal(seed + side, batch, heads, pages, 64, dim) * size)
        raw = encode_pages(*(mx.array(x) for x in sides), page_format)
        canonical = pages_from_bytes(np.array(raw), page_format)
        decoded = [page_format.key.decode(canonical.key), page_format.value.decode(canonical.value)]

        def exact(count, at):
            draw = (
                normal(seed + at + side, batch, heads, count, dim)
                for side, dim in enumerate((key_dim, value_dim))
            )
            return ExactTokens(*(mx.array(x).astype(getattr(mx, dtype)) for x in draw))

        first, recent = exact(sinks, 10), exact(own, 20)
        columns = []
        for side in range(2):
            parts = [np.array(part[side].astype(mx.float32)) for part in (first, recent)]
            middle = decoded[side].reshape(batch, heads, pages * 64, -1)
            columns.append(np.concatenate([parts[0], middle, parts[1]], axis=2))
        query = mx.array(2.0 * normal(seed + 30, batch, heads * groups, new, key_dim)).astype(
            getattr(mx, dtype)
        )
        cut = max(pages // 2, 1)
        slabs = [slab for slab in (raw[:, :, :cut], raw[:, :, cut:]) if slab.shape[2]]
        return Case(page_format, slabs, first, recent, query, *columns, key_dim**-0.5)

    return make


def check(case, attended, mask=None, softcap=None):
    dtype = str(case.query.dtype).rpartition(".")[2]
    query = np.array(case.query.astype(mx.float32))
    wanted, lse = reference(query, case.keys, case.values, mask, case.scaling, softcap)
    found = np.array(attended.out.astype(mx.float32)).astype(float)
    assert attended.out.dtype == case.query.dtype
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < TOLERANCE[dtype]
    worst = np.linalg.norm(found - wanted, axis=-1) / np.maximum(np.linalg.norm(wanted, axis=-1), 1e-6)
    assert worst.max() < 5 * TOLERANCE[dtype]
    np.testing.assert_allclose(np.array(attended.lse), lse, rtol=1e-4, atol=1e-4)


CASES = [
    # bits_k, bits_v, key_dim, value_dim, batch, heads, groups, pages, own, new, dtype
    (4, 2, 128, 128, 1, 2, 4, 5, 7, 1, "float32"),
    (4, 4, 128, 128, 3, 2, 4, 1, 1, 1, "float32"),
    (3, 3, 128, 128, 2, 2, 1, 3, 64, 1, "bfloat16"),
    (3, 2, 64, 64, 1, 1, 8, 4, 20, 3, "float32"),
    (4, 3, 96, 96, 2, 3, 2, 4, 33, 16, "float16"),
    (2, 2, 80, 80, 1, 2, 2, 6, 5, 2, "float32"),
    (8, 1, 64, 64, 2, 2, 4, 3, 63, 1, "float32"),
    (6, 7, 256, 256, 1, 1, 4, 3, 9, 1, "bfloat16"),
    (1, 8, 128, 128, 1, 2, 3, 2, 65, 65, "float32"),
    (5, 2, 192, 128, 1, 2, 4, 3, 6, 1, "float32"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tile_pages", [1, 64])
def test_attention_equals_reference(monkeypatch, case_of, case, tile_pages):
    monkeypatch.setattr(attention, "TILE_TOKENS", 64 * tile_pages)
    made = case_of(*case)
    check(made, attend(made.query, made.slabs, made.page_format, made.sinks, made.recent, None, made.scaling))


@pytest.mark.parametrize("additive", [False, True])
def test_masks_hide_and_hidden_tokens_may_hold_anything(case_of, additive):
    made = case_of(4, 2, 64, 64, 2, 2, 2, 3, 9, 5)
    tokens = made.keys.shape[2]
    mask = np.random.default_rng(0).random((2, 1, 5, tokens)) < 0.5
    mask[1, :, 2] = False
    mask[..., 70] = False
    mask[..., -1] = False
    raw = np.array(made.slabs[1])
    scale_at = made.page_format.key_scales_at + 2 * (70 - 3 - 64)
    raw[:, :, 0, scale_at : scale_at + 2] = (0xC0, 0x7F)
    value_at = made.page_format.value_scales_at + 2 * (70 - 3 - 64)
    raw[:, :, 0, value_at : value_at + 2] = (0xC0, 0x7F)
    slabs = [made.slabs[0], mx.array(raw)]
    keys, values = (np.array(x) for x in made.recent)
    keys[:, :, -1], values[:, :, -1] = np.nan, np.inf
    recent = ExactTokens(mx.array(keys), mx.array(values))
    given = mx.array(mask)
    if additive:
        given = mx.where(given, 0.0, -mx.inf)
    found = attend(made.query, slabs, made.page_format, made.sinks, recent, given, made.scaling)
    made.keys[:, :, [70, -1]] = made.values[:, :, [70, -1]] = 0.0
    wanted, lse = reference(np.array(made.query), made.keys, made.values, mask, made.scaling)
    assert np.linalg.norm(np.array(found.out) - wanted) / np.linalg.norm(wanted) < TOLERANCE["float32"]
    assert (np.array(found.out)[1, :, 2] == 0).all()
    assert (np.array(found.lse)[1, :, 2] == -np.inf).all()
    np.testing.assert_allclose(np.array(found.lse)[0], lse[0], atol=1e-4)


def test_mask_per_head_and_softcap(case_of):
    made = case_of(3, 3, 64, 64, 2, 2, 2, 2, 5, 4)
    mask = np.random.default_rng(1).random((1, 4, 4, made.keys.shape[2])) < 0.7
    found = attend(
        made.query, made.slabs, made.page_format, made.sinks, made.recent, mx.array(mask), made.scaling, 5.0
    )
    check(made, found, mask, 5.0)


def test_a_nan_in_sight_shows(case_of):
    made = case_of(4, 4, 64, 64, 1, 2, 2, 1, 4, 1)
    keys = np.array(made.recent.keys)
    keys[0, 1, 0] = np.nan
    recent = ExactTokens(mx.array(keys), made.recent.values)
    out = attend(made.query, made.slabs, made.page_format, made.sinks, recent, None, made.scaling).out
    assert np.isfinite(np.array(out)[:, :2]).all()
    assert np.isnan(np.array(out)[:, 2:]).all()


def test_backend_reads_pages_in_any_order(case_of):
    """`Backend.attend`: pages scattered over slabs, some sequences with fewer, some tokens out of sight."""
    made = case_of(4, 2, 64, 64, 2, 2, 2, 4, 6, 2, sinks=0)
    backend = load("mlx")
    pages = mx.concatenate(made.slabs, axis=2)
    scattered = {0: (0, 3), 1: (0, 1), 2: (1, 2), 3: (1, 0), 4: (0, 0), 5: (0, 2), 6: (1, 3), 7: (1, 1)}
    rows = mx.stack([pages[b, :, p] for b, p in scattered.values()])
    where = {place: number for number, place in scattered.items()}
    table = np.array([[where[b, p] for p in range(4)] for b in range(2)], dtype=np.int32)
    table[1, 3] = 0
    history = History(made.page_format, (rows[:3], rows[3:]), (0, 3), table, None, 5, mx.array([4, 3]))
    found = backend.attend(made.query, history, None, made.recent, None, made.scaling)
    tokens = made.keys.shape[2]
    mask = np.tril(np.ones((2, tokens), bool), tokens - 2)[None, None].repeat(2, axis=0)
    mask[..., :5] = False
    mask[1, ..., 192:256] = False
    check(made, found, mask)
    dense = mx.array(mask[..., 5:])
    check(made, backend.attend(made.query, history, None, made.recent, dense, made.scaling), mask)


def test_backend_pages_are_canonical(case_of):
    made = case_of(3, 5, 80, 96, 2, 2, 1, 3, 1, 1)
    backend, raw = load("mlx"), made.slabs[0]
    canonical = backend.to_canonical(raw, made.page_format)
    np.testing.assert_array_equal(backend.from_canonical(canonical, made.page_format), np.array(raw))
    np.testing.assert_array_equal(pages_to_bytes(canonical, made.page_format), np.array(raw))
    assert mx.array_equal(join_parts(split_pages(raw, made.page_format)), raw)
    out = mx.full(raw.shape, 0xFF, dtype=mx.uint8)
    decoded = decode_pages(raw, made.page_format, mx.float32)
    backend.encode(*decoded, made.page_format, out)
    assert mx.array_equal(out, encode_pages(*decoded, made.page_format))
    again = backend.decode(raw, made.page_format, mx.float16)
    assert again.keys.dtype == mx.float16
    assert again.values.shape == (2, 2, 1, 64, 96)


def test_backend_refuses_what_is_not_of_mlx(format_of):
    page_format = format_of(4, 2, 64)
    for device in ("cpu", "cuda"):
        with pytest.raises(UnsupportedError, match=r"arrays of MLX, not on torch tensors.*mlx-lm"):
            resolve(page_format, device, "float32", "mlx")
    assert resolve(page_format, "mlx", "bfloat16", "mlx").backend.name == "mlx"
    with pytest.raises(UnsupportedError, match="float64"):
        resolve(page_format, "mlx", "float64", "mlx")


def test_no_more_than_a_tile_is_decompressed(monkeypatch, format_of, normal):
    """Peak memory of a step does not grow with the history beyond its tiles."""
    page_format = format_of(4, 2, 128)
    monkeypatch.setattr(attention, "TILE_TOKENS", 4 * 64)
    one = mx.array(normal(0, 1, 1, 4, 64, 128))
    raw = mx.tile(encode_pages(one, one, page_format), (1, 1, 32, 1))
    recent = ExactTokens(mx.zeros((1, 1, 1, 128)), mx.zeros((1, 1, 1, 128)))
    query = mx.ones((1, 4, 1, 128))
    mx.eval(raw, recent, query)
    mx.eval(attend(query, [raw], page_format, None, recent, None, 1.0).out)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(attend(query, [raw], page_format, None, recent, None, 1.0).out)
    tile_bytes = 4 * 64 * 128 * 4
    assert mx.get_peak_memory() - before < 8 * tile_bytes < 128 * 64 * 128 * 4 / 3
