"""The contract of mlx-lm's caches, method by method, on caches that no model drives."""

from __future__ import annotations

import numpy as np
import pytest

from tqai.config import CacheConfig
from tqai.integrations.mlx_lm.batch_caches import TurboQuantBatchKVCache, TurboQuantBatchRotatingKVCache
from tqai.integrations.mlx_lm.caches import TurboQuantKVCache, TurboQuantRotatingKVCache

CONFIG = CacheConfig(bits_k=4, bits_v=3, sink_tokens=3)
WITHOUT_SINKS = CacheConfig(bits_k=4, bits_v=3)
HEADS, DIM = 2, 64


def filled(cache, vectors, tokens, seed=0, batch=1):
    return cache.update_and_fetch(*vectors(seed, batch, HEADS, tokens, DIM))


def single(window):
    if window is None:
        return TurboQuantKVCache(CONFIG)
    return TurboQuantRotatingKVCache(window, config=WITHOUT_SINKS)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("tokens", [1, 63, 65, 400])
def test_cache_from_its_state_goes_on_as_the_first(vectors, window, tokens):
    cache = single(window)
    filled(cache, vectors, tokens)
    again = type(cache).from_state(cache.state)
    assert (again.offset, again.size(), again.nbytes) == (cache.offset, cache.size(), cache.nbytes)
    assert again.is_trimmable() == cache.is_trimmable()
    for step in range(3):
        for found, expected in zip(
            filled(again, vectors, 50, step), filled(cache, vectors, 50, step), strict=True
        ):
            np.testing.assert_array_equal(np.array(found), np.array(expected))
    assert again.make_mask(1, return_array=True) is None or np.array_equal(
        np.array(again.make_mask(1, return_array=True)), np.array(cache.make_mask(1, return_array=True))
    )


def test_trim_takes_no_more_than_there_is_and_says_how_many(vectors):
    cache = TurboQuantKVCache(CONFIG)
    filled(cache, vectors, 130)
    assert (cache.trim(30), cache.offset) == (30, 100)
    assert (cache.trim(1000), cache.offset) == (100, 0)
    assert (cache.trim(5), cache.offset) == (0, 0)


@pytest.mark.parametrize("tokens, size, trimmable", [(69, 69, True), (70, 70, False), (200, 70, False)])
def test_sliding_window_tells_its_size_and_whether_it_can_be_trimmed(vectors, tokens, size, trimmable):
    cache = single(70)
    assert (cache.size(), cache.is_trimmable(), cache.empty()) == (0, True, True)
    filled(cache, vectors, tokens)
    assert (cache.size(), cache.is_trimmable(), cache.empty()) == (size, trimmable, False)
    assert (cache.max_size, cache.offset) == (70, tokens)
    whole = TurboQuantKVCache(CONFIG)
    filled(whole, vectors, 200)
    assert (whole.size(), whole.is_trimmable()) == (200, True)


@pytest.mark.parametrize("window", [None, 128])
def test_report_of_a_batch_counts_the_tokens_of_each_sequence(vectors, window):
    kind = (TurboQuantBatchKVCache,) if window is None else (TurboQuantBatchRotatingKVCache, window)
    cache = kind[0](*kind[1:], [0, 100], WITHOUT_SINKS)
    filled(cache, vectors, 165, batch=2)
    report = cache.memory()
    held = [165, 65]
    assert report.tokens == max(held)
    assert report.values == sum(held) * HEADS * 2 * DIM
    assert report.total_bytes == cache.nbytes
    rows = (DIM * 4 + DIM * 3) // 8
    assert report.codes_bytes == sum(tokens // 64 for tokens in held) * 64 * HEADS * rows
    assert report.scales_bytes == sum(tokens // 64 for tokens in held) * 64 * HEADS * 4


def test_position_of_a_padded_sequence_is_behind_by_its_padding(vectors):
    cache = TurboQuantBatchKVCache([0, 100], WITHOUT_SINKS)
    assert np.array(cache.offset).tolist() == [0, -100]
    filled(cache, vectors, 40, batch=2)
    assert (np.array(cache.offset).tolist(), np.array(cache.left_padding).tolist()) == ([40, -60], [0, 60])
    filled(cache, vectors, 70, batch=2)
    assert (np.array(cache.offset).tolist(), np.array(cache.left_padding).tolist()) == ([110, 10], [0, 0])


def test_sequences_that_join_keep_what_is_left_of_their_padding(vectors):
    first, second = (TurboQuantBatchKVCache([0, 100 * which], WITHOUT_SINKS) for which in (0, 1))
    for cache in (first, second):
        filled(cache, vectors, 40, batch=2)
    first.extend(second)
    assert np.array(first.left_padding).tolist() == [0, 0, 0, 60]
    first.filter([3, 0])
    assert np.array(first.left_padding).tolist() == [60, 0]
    assert np.array(first.offset).tolist() == [-60, 40]


@pytest.mark.parametrize("chunks", [(70,), (20, 50), (1, 68, 1)])
def test_padding_on_both_sides_is_left_out_whatever_the_chunks(vectors, chunks):
    keys, values = vectors(5, 2, HEADS, sum(chunks), DIM)
    cache = TurboQuantBatchKVCache([0, 0], WITHOUT_SINKS)
    cache.prepare(left_padding=[0, 5], lengths=[70, 10], right_padding=[0, 55])
    at = 0
    for count in chunks:
        cache.update_and_fetch(keys[:, :, at : at + count], values[:, :, at : at + count])
        at += count
    cache.finalize()
    assert np.array(cache.offset).tolist() == [70, 10]
    held = np.array(cache.extract(1).keys)
    np.testing.assert_array_equal(held, np.array(keys[1:, :, 5:15]))
    filled(cache, vectors, 1, batch=2)
    assert np.array(cache.offset).tolist() == [71, 11]


def test_caches_with_different_settings_or_windows_do_not_make_a_batch(vectors):
    other = TurboQuantKVCache(CacheConfig(bits_k=3, bits_v=3))
    for caches in ([TurboQuantKVCache(CONFIG), other], [single(70), single(80)]):
        for cache in caches:
            filled(cache, vectors, 10)
        with pytest.raises(ValueError, match="caches of different settings cannot be merged"):
            type(caches[0]).merge(caches)
