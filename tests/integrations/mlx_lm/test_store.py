"""The store of one layer: the same pages and window as with torch, and sequences that stay apart."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai.backends.base import ExactTokens
from tqai.cache.layer import CompressedLayer
from tqai.cache.layer_state import export_layer
from tqai.config import CacheConfig
from tqai.errors import InputError, NonFiniteError
from tqai.integrations.mlx_lm import store as store_module
from tqai.integrations.mlx_lm.attention import attend_step
from tqai.integrations.mlx_lm.combining import combined
from tqai.integrations.mlx_lm.exact import joined
from tqai.integrations.mlx_lm.saving import _exported
from tqai.integrations.mlx_lm.store import TokenStore

CONFIG = CacheConfig(bits_k=4, bits_v=3, offsets="off")


def draw(seed, batch, tokens, heads=2, dim=64):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((batch, heads, tokens, dim)).astype(np.float32) for _ in range(2))


def fed(store, keys, values, chunks):
    at = 0
    for chunk in chunks:
        step = store.append(*(mx.array(x[:, :, at : at + chunk]) for x in (keys, values)))
        at += chunk
    return step


def close_but_for_scales(found, wanted):
    """Rows `[..., head_dim]` are the same to float32, but one in 200 (or one) may have the next bfloat16
    as its scale: least squares of two frameworks fall on either side of the middle between two."""
    far = np.abs(found - wanted) > 2e-6 + 1e-7 * np.abs(wanted)
    rows = far.any(-1)
    assert rows.sum() <= max(1, rows.size // 200)
    np.testing.assert_allclose(found[rows], wanted[rows], rtol=2.0**-7, atol=2e-6)


@pytest.mark.parametrize("slab_pages", [2, 64])
@pytest.mark.parametrize(
    ("chunks", "settings_", "window"),
    [
        ((1,), {}, None),
        ((63, 1, 1), {}, None),
        ((64, 65, 200, 1), {}, None),
        ((300, 1, 1, 70), {"sink_tokens": 4, "residual_window": 40}, None),
        ((3, 2, 130), {"sink_tokens": 9}, None),
        ((200, 1, 62, 1, 1, 300, 5), {}, 100),
        ((40, 40, 40, 1, 64, 64), {"residual_window": 10}, 64),
        ((65, 70, 1), {"codec": "trellis", "bits_k": 3, "bits_v": 2, "sink_tokens": 4}, None),
    ],
)
def test_state_is_that_of_the_layer_in_torch(monkeypatch, slab_pages, chunks, settings_, window):
    monkeypatch.setattr(store_module, "SLAB_PAGES", slab_pages)
    config = CONFIG.with_changes(**settings_)
    keys, values = draw(sum(chunks), 2, sum(chunks))
    store, layer = (
        TokenStore(config, window, 2),
        CompressedLayer(config.with_changes(backend="torch"), 0, window),
    )
    at = 0
    for chunk in chunks:
        part = [x[:, :, at : at + chunk] for x in (keys, values)]
        step = store.append(*(mx.array(x) for x in part))
        torch_step = layer.append(*(torch.from_numpy(x) for x in part))
        at += chunk
        assert step.tokens == torch_step.tokens
        for found, wanted in zip(step.materialize(), torch_step.materialize(), strict=True):
            close_but_for_scales(np.array(found), wanted.numpy())
    wanted, about = export_layer(layer)
    found, found_about = _exported(store)
    assert {name: found_about[name] for name in ("length", "sliding_window")} == {
        name: about[name] for name in ("length", "sliding_window")
    }
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].shape == tuple(tensor.shape)
        here, there = np.array(found[name]), tensor.numpy()
        if name.endswith("codes"):  # a coordinate within float32 rounding of a boundary
            assert (here != there).mean() < 1e-4, name
        elif name.endswith("scales"):
            assert np.abs(here.astype(int) - there).max() <= 4, name
            assert (here != there).mean() < 5e-3, name
        else:
            np.testing.assert_array_equal(here, there, err_msg=name)
    assert store.nbytes == sum(array.nbytes for array in store.arrays())


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 150)),
        st.tuples(st.just("padded"), st.integers(0, 2**16)),
        st.tuples(st.just("trim"), st.integers(0, 140)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 3), min_size=1, max_size=4)),
        st.tuples(st.just("extend"), st.integers(0, 130)),
    ),
    min_size=2,
    max_size=6,
)


@settings(max_examples=20, deadline=None)
@given(operations=OPERATIONS, sinks=st.sampled_from([0, 5]), window=st.sampled_from([None, 90]))
def test_sequences_of_a_batch_are_as_if_alone(operations, sinks, window):
    """Whatever is done to a batch: every sequence holds and attends to what it would alone."""
    config = CONFIG.with_changes(sink_tokens=0 if window else sinks)
    together = combined([TokenStore(config, window) for _ in range(2)])
    alone = [TokenStore(config, window) for _ in range(2)]
    rng = np.random.default_rng(0)

    def new(batch, tokens):
        return [mx.array(rng.standard_normal((batch, 1, tokens, 64)).astype(np.float32)) for _ in range(2)]

    for kind, what in operations:
        if kind in ("append", "padded"):
            count = what if kind == "append" else 1 + what % 100
            keys, values = new(len(alone), count)
            first, stop = [0] * len(alone), [count] * len(alone)
            if kind == "padded":
                stop = [int(x) for x in rng.integers(0, count + 1, len(alone))]
            query = mx.array(rng.standard_normal((len(alone), 2, count, 64)).astype(np.float32))
            step = together.append(keys, values, first, stop)
            out = np.array(attend_step(step, query, None if count == 1 else "causal", 0.125).out)
            whole = step.materialize()
            for row, store in enumerate(alone):
                real = slice(0, stop[row])
                if not stop[row]:
                    continue
                part = store.append(keys[row : row + 1, :, real], values[row : row + 1, :, real])
                mask = None if stop[row] == 1 else "causal"
                wanted = attend_step(part, query[row : row + 1, :, real], mask, 0.125).out
                np.testing.assert_allclose(out[row : row + 1, :, real], np.array(wanted), atol=2e-5)
                assert whole.keys.shape[2] == step.tokens
        elif kind == "trim":
            if window is not None and any(seen >= window for seen in together.seen):
                continue
            together.trim(what)
            for store in alone:
                store.trim(what)
        elif kind == "select":
            rows = [row % len(alone) for row in what]
            together = together.selected(rows)
            alone = [alone[row].extracted(0) for row in rows]
        else:
            other = TokenStore(config, window)
            if what:
                other.append(*new(1, what))
            together = combined([together, other])
            alone.append(other.extracted(0))
        assert together.seen == [store.seen[0] for store in alone]
    for row, store in enumerate(alone):
        part = together.extracted(row)
        for name in ("counts", "first_pages", "sink_counts", "window_counts"):
            assert getattr(part, name) == getattr(store, name)
        pairs = zip(*([x for x in held.arrays() if x.size] for held in (part, store)), strict=True)
        for found, wanted in pairs:
            assert found.shape == wanted.shape
            assert mx.array_equal(found, wanted)


def test_taking_tokens_back_decompresses_the_page_that_is_cut():
    keys, values = draw(1, 1, 300)
    store = TokenStore(CONFIG)
    fed(store, keys, values, (300,))
    before = store.view().materialize()
    store.trim(300 - 130)
    assert (store.counts, store.window_counts, store.seen) == ([2], [2], [130])
    after = store.view().materialize()
    np.testing.assert_array_equal(np.array(after.keys), np.array(before.keys)[:, :, :130])
    store.trim(1000)
    assert store.seen == [0]
    step = fed(store, keys, values, (70,))
    np.testing.assert_allclose(np.array(step.materialize().keys), keys[:, :, :70])


def test_sliding_window_refuses_to_take_back_what_it_dropped():
    store = TokenStore(CONFIG, 70)
    fed(store, *draw(2, 1, 400), (400,))
    with pytest.raises(InputError, match="sliding window has dropped the first 320"):
        store.trim(200)
    assert store.seen == [400]


def test_sliding_window_holds_no_more_than_a_page_beyond_it():
    store = TokenStore(CONFIG, 100)
    keys, values = draw(3, 1, 1000)
    fed(store, keys, values, (500,))
    for at in range(500, 700):
        store.append(mx.array(keys[:, :, at : at + 1]), mx.array(values[:, :, at : at + 1]))
        assert store.counts[0] * 64 + store.window_counts[0] <= 100 + 63 + 64


def test_pages_that_nobody_will_see_are_not_encoded(monkeypatch):
    counts = []

    def counted(keys, values, page_format):
        counts.append(keys.shape[2])
        return encode(keys, values, page_format)

    encode = store_module.encode_pages
    monkeypatch.setattr(store_module, "encode_pages", counted)
    fed(TokenStore(CONFIG, 100), *draw(6, 1, 1000), (1000,))
    assert counts == [1]


def test_what_does_not_fit_is_refused_and_changes_nothing():
    store = TokenStore(CONFIG.with_changes(check_finite=True))
    keys, values = (mx.array(x) for x in draw(4, 1, 65))
    store.append(keys, values)
    for bad in ((keys[:, :1], values[:, :1]), (keys.astype(mx.float16),) * 2, (keys[..., :32], values)):
        with pytest.raises(InputError, match="do not continue a cache"):
            store.append(*bad)
    with pytest.raises(InputError, match="alike but for head_dim"):
        store.append(keys, values[:, :, :3])
    with pytest.raises(NonFiniteError, match="values hold NaN or inf in the tokens after 65"):
        store.append(keys, values * mx.nan)
    assert store.seen == [65]
    assert store.counts == [1]


def test_arrays_are_not_views_of_larger_ones():
    """`nbytes` is what the allocator gave, for one head too, where a slice is contiguous in memory."""
    store = TokenStore(CONFIG)
    keys, values = (mx.array(x) for x in draw(5, 1, 64 * 30 + 5, heads=1, dim=128))
    store.append(keys, values)
    mx.eval(store.arrays())
    del keys, values
    before = mx.get_active_memory()
    held = store.nbytes
    del store
    freed = before - mx.get_active_memory()
    assert held <= freed < held + 32768, "the allocator rounds up, but not to the 985600 bytes of the keys"


def test_exact_tokens_are_joined_in_order():
    one = ExactTokens(mx.zeros((1, 1, 2, 4)), mx.zeros((1, 1, 2, 4)))
    assert joined([one]) is one
    assert joined([one, one]).keys.shape == (1, 1, 4, 4)
