"""Caches as a line of text, any bits, and several seeds in one report."""

import numpy as np
import pytest

from tqai.errors import ConfigError
from tqai.evaluation import (
    cache_maker,
    combine_seeds,
    evaluate_quality,
    maker_from_spec,
    makers_of_seeds,
    parse_spec,
)


def test_a_line_is_a_name_and_settings():
    assert parse_spec("K3/V3, codec=trellis,window=128,sinks=4,seed=-1,check_finite=none") == (
        "K3/V3",
        {"codec": "trellis", "residual_window": 128, "sink_tokens": 4, "seed": -1, "check_finite": None},
    )
    assert parse_spec("quanto-4") == ("quanto-4", {})
    assert parse_spec("K4/V2,label=7") == ("K4/V2", {"label": "7"})


@pytest.mark.parametrize(
    "text", ["", "seed=1", "K4/V2,seed", "K4/V2,seed=", "K4/V2,=3", "K4/V2,seed=1,seed=2"]
)
def test_no_line(text):
    with pytest.raises(ConfigError, match="cache"):
        parse_spec(text)


def test_two_names_of_one_setting_are_one():
    with pytest.raises(ConfigError, match="residual_window is given twice"):
        parse_spec("K4/V2,window=1,residual_window=2")


def test_bits_that_no_preset_has(model):
    maker = cache_maker("k5v1", model, sink_tokens=3)
    assert (maker.settings["bits_k"], maker.settings["bits_v"], maker.settings["sink_tokens"]) == (5, 1, 3)
    with pytest.raises(ConfigError, match="bits_k=9"):
        cache_maker("K9/V4", model)


def test_settings_and_label_reach_the_cache(model):
    maker = maker_from_spec("K3/V4,window=64,label=mine", model, seed=11, backend="torch")
    settings = maker().settings
    assert maker.name == "mine"
    assert (settings.bits_k, settings.bits_v, settings.residual_window) == (3, 4, 64)
    assert (settings.seed, settings.backend) == (11, "torch")
    assert maker_from_spec("K3/V4,seed=2", model, seed=11)().settings.seed == 2


def test_seeds_are_of_caches_that_rotate(model):
    assert [m.settings["seed"] for m in makers_of_seeds("K2/V2", model, (3, 5))] == [3, 5]
    assert [m.name for m in makers_of_seeds("K2/V2,label=a", model, (3, 5))] == ["a seed=3", "a seed=5"]
    assert [m.name for m in makers_of_seeds("K2/V2,seed=4", model, (3, 5))] == ["K2/V2,seed=4"]
    assert [m.name for m in makers_of_seeds("dynamic", model, (3, 5))] == ["dynamic"]


def test_all_seeds_count_alike(model, text):
    documents = [text[:150], text[40:193]]
    makers = makers_of_seeds("K2/V2", model, (3, 5))
    reports = evaluate_quality(model, documents, makers, 64)
    named = dict(zip((3, 5), reports.values(), strict=True))
    both = combine_seeds("both", named)
    each = {seed: report.summary.kl_mean.value for seed, report in named.items()}
    assert each[3] != each[5] and both.kl_by_seed == each
    assert both.summary.kl_mean.value == pytest.approx((each[3] + each[5]) / 2)
    assert both.summary.kl_mean.low < both.summary.kl_mean.high
    assert both.summary.tokens == 2 * named[3].summary.tokens and len(both.documents) == 2
    assert both.name == "both" and "seed" not in both.settings


def test_documents_in_a_batch_score_as_they_do_alone(model, text):
    documents = [text[:150], text[43:193], text[10:131]]
    makers = [cache_maker("dynamic", model), cache_maker("K4/V4", model, residual_window=0)]
    alone = evaluate_quality(model, documents, makers, 64)
    seen = []
    together = evaluate_quality(model, documents, makers, 64, documents_at_once=2, on_document=seen.append)
    assert seen == [2, 3]
    for name in alone:
        assert together[name].bits_per_value == pytest.approx(alone[name].bits_per_value, rel=0.05)
        for left, right in zip(alone[name].documents, together[name].documents, strict=True):
            np.testing.assert_allclose(left.nll, right.nll, rtol=2e-3, atol=2e-3)
    assert alone["K4/V4"].summary.kl_mean.value == pytest.approx(
        together["K4/V4"].summary.kl_mean.value, rel=0.05
    )
