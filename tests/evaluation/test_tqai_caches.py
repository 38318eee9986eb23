"""tqai's own cache under the same measures: bytes as it reports them, quality that follows the bits."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tqai.evaluation import cache_maker, evaluate_quality, held_bytes, measure_speed, prefill_caches


@pytest.fixture(scope="module")
def own_model(model):
    """A model that this file may switch to attention on codes."""
    torch.manual_seed(5)
    config = LlamaConfig(**model.config.to_dict())
    other = LlamaForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 193])
@pytest.mark.parametrize("options", [{}, {"sink_tokens": 4, "residual_window": 32}], ids=["plain", "windows"])
def test_memory_reports_what_is_held(own_model, text, tokens, options):
    maker = cache_maker("K3/V2", own_model, **options)
    cache = prefill_caches(own_model, text[None, :tokens], [maker])[0]
    assert cache.memory().total_bytes == held_bytes(cache) > 0
    with torch.inference_mode():
        own_model(text[None, :70], past_key_values=cache, use_cache=True)
    assert cache.memory().total_bytes == held_bytes(cache)


def test_constants_of_the_process_are_counted_when_asked_for(own_model, text):
    cache = prefill_caches(own_model, text[None], [cache_maker("K3/V2", own_model)])[0]
    levels, boundaries = 8 + 4, 7 + 3
    # Tables in float32, and in float64 for the specification.
    assert held_bytes(cache, constants=True) >= held_bytes(cache) + (4 + 8) * (levels + boundaries)


def test_maker_passes_its_settings_on(own_model):
    maker = cache_maker("k4v2", own_model, sink_tokens=3, seed=9)
    assert (maker.name, maker.family) == ("K4/V2", "tqai")
    settings = maker().settings
    assert (settings.bits_k, settings.bits_v, settings.sink_tokens, settings.seed) == (4, 2, 3, 9)
    assert maker.settings == settings.to_dict()


def test_one_pass_fills_it_as_a_pass_of_its_own_would(own_model, text):
    maker = cache_maker("K4/V2", own_model)
    shared = prefill_caches(own_model, text[None, :150], [maker])[0]
    own = maker()
    with torch.inference_mode():
        own_model(text[None, :150], past_key_values=own, use_cache=True)
        expected = own_model(text[None, 150:], past_key_values=own, use_cache=True).logits
        got = own_model(text[None, 150:], past_key_values=shared, use_cache=True).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_kl_falls_with_bits_and_rotation_seeds_differ(own_model, text):
    makers = [
        cache_maker("K4/V4", own_model, label="8 bits", bits_k=8, bits_v=8),
        cache_maker("K4/V4", own_model),
        cache_maker("K4/V2", own_model),
        cache_maker("K4/V2", own_model, label="K4/V2, seed 1", seed=1),
        cache_maker("K4/V2", own_model, label="decompressed", cache_strategy="full"),
    ]
    reports = evaluate_quality(own_model, [text[:160]], makers, 130, 15)
    kl = {name: report.summary.kl_mean.value for name, report in reports.items()}
    assert 0 < kl["8 bits"] < kl["K4/V4"] / 10
    assert kl["K4/V4"] < kl["K4/V2"] / 2
    assert kl["K4/V2, seed 1"] != pytest.approx(kl["K4/V2"], rel=1e-6)
    # On codes and on decompressed tensors: the same numbers but for rounding.
    assert kl["decompressed"] == pytest.approx(kl["K4/V2"], rel=1e-3)


def test_other_caches_are_unchanged_beside_it(own_model, model, text):
    alone = evaluate_quality(model, [text], [cache_maker("dynamic", model)], 64)["dynamic"]
    makers = [cache_maker("K4/V2", own_model), cache_maker("dynamic", own_model)]
    beside = evaluate_quality(own_model, [text], makers, 64)["dynamic"]
    assert beside.summary.kl_mean.value < 1e-12
    assert beside.summary.perplexity.value == pytest.approx(alone.summary.perplexity.value, rel=1e-5)


def test_speed_runs_on_codes(own_model, text):
    report = measure_speed(own_model, text, [cache_maker("K4/V4", own_model)], 140, 2, 3)["K4/V4"]
    assert 0 < report.kl_mean < 1
    assert report.tokens_per_second > 0


@pytest.mark.parametrize("settings", [{"balance": "auto"}, {"bits_budget": 6.0}], ids=str)
def test_caches_that_look_at_queries_see_those_of_the_prompt(own_model, text, settings):
    maker = cache_maker("K3/V3", own_model, **settings)
    shared = prefill_caches(own_model, text[None, :150], [cache_maker("dynamic", own_model), maker])[1]
    own = maker()
    with torch.inference_mode():
        own_model(text[None, :150], past_key_values=own)
    for one, other in zip(shared.layers, own.layers, strict=True):
        assert one.store.pool.pages == other.store.pool.pages == 2
        assert torch.equal(one.store.pool.raw(), other.store.pool.raw())
        energies = one.store._energy, other.store._energy
        assert energies == (None, None) or torch.equal(*energies)
        assert (energies[0] is None) == ("balance" not in settings)
