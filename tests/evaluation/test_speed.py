"""What is timed is each cache's own token, and what it decoded is compared with the uncompressed model."""

import time

import pytest
from transformers import DynamicCache

from tqai.errors import InputError
from tqai.evaluation import CacheMaker, cache_maker, measure_speed


class SlowCache(DynamicCache):
    """Sleeps 20 ms in the first layer."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx == 0:
            time.sleep(0.02)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def test_a_slow_cache_is_measured_slow(model, text):
    slow = CacheMaker("slow", "test", lambda: SlowCache(config=model.config))
    reports = measure_speed(model, text, [cache_maker("dynamic", model), slow], 100, bursts=3, burst_tokens=4)
    assert list(reports) == ["dynamic", "slow"]
    assert 20 <= reports["slow"].token_ms[0] < 200
    assert reports["slow"].tokens_per_second == pytest.approx(1e3 / reports["slow"].token_ms[0])
    assert reports["slow"].prefill_seconds >= 0.02
    assert reports["dynamic"].token_ms[0] < reports["slow"].token_ms[0]
    low, high = reports["slow"].token_ms[1:]
    assert low <= reports["slow"].token_ms[0] <= high


def test_report_says_what_was_measured(model, text):
    report = measure_speed(model, text, [cache_maker("dynamic", model)], 100, 3, 4)["dynamic"]
    assert report.timed_tokens == 9
    assert report.context_tokens == 100
    assert report.held_bytes == 2 * 2 * 2 * 100 * 64 * 4
    assert report.bits_per_value == 32.0
    assert report.kl_mean < 1e-12
    assert report.to_dict()["tokens_per_second"] == report.tokens_per_second


def test_wrong_outputs_show_beside_the_speed(model, text, forgetful):
    report = measure_speed(model, text, [forgetful], 100, bursts=2, burst_tokens=4)["forgetful"]
    assert report.kl_mean > 0.3


@pytest.mark.parametrize(("context", "bursts", "tokens"), [(180, 4, 8), (0, 1, 2), (10, 0, 8), (10, 1, 1)])
def test_lengths_that_do_not_fit_are_refused(model, text, context, bursts, tokens):
    with pytest.raises(InputError, match="context_tokens="):
        measure_speed(model, text, [cache_maker("dynamic", model)], context, bursts, tokens)
