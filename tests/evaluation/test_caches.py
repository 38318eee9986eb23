"""Caches by name, and several caches filled at the price of one pass."""

import sys

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, QuantizedCache

from tqai.errors import ConfigError, UnsupportedError
from tqai.evaluation import cache_maker, known_caches, prefill_caches


def test_dynamic_makes_a_new_one_each_time(model):
    maker = cache_maker("dynamic", model)
    first, second = maker(), maker()
    assert type(first) is DynamicCache and first is not second
    assert (maker.name, maker.family, maker.settings) == ("dynamic", "dynamic", {})


@pytest.mark.parametrize("bits", [4, 2])
def test_quanto_has_the_asked_bits_and_the_stated_settings(model, quanto, bits):
    maker = cache_maker(f"quanto-{bits}", model, residual_length=96)
    cache = maker()
    assert isinstance(cache, QuantizedCache)
    assert maker.family == "quanto"
    assert maker.settings == {"nbits": bits, "q_group_size": 64, "residual_length": 96}
    for layer in cache.layers:
        assert (layer.nbits, layer.q_group_size, layer.residual_length) == (bits, 64, 96)


def test_quanto_defaults_are_those_of_transformers(model, quanto):
    stated = cache_maker("quanto-4", model).settings
    layer = QuantizedCache("quanto", model.config).layers[0]
    assert {name: getattr(layer, name) for name in stated} == stated


def test_label_replaces_the_name(model):
    assert cache_maker("dynamic", model, label="exact").name == "exact"


@pytest.mark.parametrize("name", ["", "dynamic-4", "quanto-3", "quanto", "K9/V9x", "DYNAMIC"])
def test_unknown_names_are_refused_with_the_known_ones(model, name):
    with pytest.raises(ConfigError, match="allowed are dynamic, quanto-4") as caught:
        cache_maker(name, model)
    assert all(known in str(caught.value) for known in known_caches())


def test_unknown_options_are_refused(model, quanto):
    with pytest.raises(ConfigError, match="takes no options"):
        cache_maker("dynamic", model, bits=3)
    with pytest.raises(ConfigError, match="nonsense"):
        cache_maker("quanto-4", model, nonsense=3)
    with pytest.raises(ConfigError, match="sink_tokens=-1"):
        cache_maker("K4/V2", model, sink_tokens=-1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("all8", {}),
        ("kv+hidden8", {}),
        ("kv-only", {"compress_ffn": True}),
        ("K4/V2", {"compress_hidden": True}),
    ],
)
def test_rounded_activations_are_no_cache_s(model, name, options):
    """A cache alone does not round them: it would be measured as a plain one under their name."""
    with pytest.raises(ConfigError, match=f"cache='{name}' rounds activations".replace("+", r"\+")):
        cache_maker(name, model, **options)


def test_a_missing_package_is_said(model, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("hqq")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("tqai.evaluation.caches.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="needs the package hqq"):
        cache_maker("hqq-4", model)


def test_a_kernel_that_cannot_be_built_is_said(model, monkeypatch):
    pytest.importorskip("optimum.quanto")
    from optimum.quanto.library.extensions.cpp import ext

    class Broken:
        @staticmethod
        def unpack(packed, bits):
            raise RuntimeError("no compiler")

    monkeypatch.setattr(ext, "_lib", Broken)
    with pytest.raises(UnsupportedError, match=r"quanto.*no compiler"):
        cache_maker("quanto-4", model)


def test_fp8_has_a_byte_for_every_number_and_is_read(model, text):
    from tqai.evaluation import evaluate_quality

    makers = [cache_maker("fp8", model)]
    assert (makers[0].family, makers[0].settings) == ("fp8", {})
    report = evaluate_quality(model, [text], makers, 64)["fp8"]
    assert report.bits_per_value == pytest.approx(8.0, abs=0.01)
    assert 1e-5 < report.summary.kl_mean.value < 0.1
    with pytest.raises(ConfigError, match="takes no options"):
        cache_maker("fp8", model, nbits=4)


@pytest.mark.parametrize("name", ["dynamic", "quanto-4", "quanto-2", "fp8"])
def test_one_pass_fills_a_cache_as_a_pass_of_its_own_would(model, text, quanto, name):
    maker = cache_maker(name, model)
    prompt, rest = text[None, :150], text[None, 150:]
    shared = prefill_caches(model, prompt, [cache_maker("dynamic", model), maker])[1]
    own = maker()
    with torch.inference_mode():
        model(prompt, past_key_values=own, use_cache=True)
        expected = model(rest, past_key_values=own, use_cache=True).logits
        got = model(rest, past_key_values=shared, use_cache=True).logits
    assert shared.get_seq_length() == own.get_seq_length() == 193
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_filled_caches_do_not_share_their_storage(model, text):
    maker = cache_maker("dynamic", model)
    first, second = prefill_caches(model, text[None], [maker, maker])
    with torch.inference_mode():
        first.layers[0].keys.zero_()
    assert second.layers[0].keys.abs().sum() > 0


def test_no_tokens_leave_caches_empty(model, text):
    cache = prefill_caches(model, text[None, :0], [cache_maker("dynamic", model)])[0]
    assert cache.get_seq_length() == 0


def test_sliding_layers_get_passes_of_their_own(text):
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=97,
        sliding_window=16,
    )
    sliding = MistralForCausalLM(config).eval()
    cache = prefill_caches(sliding, text[None, :100], [cache_maker("dynamic", sliding)])[0]
    with torch.inference_mode():
        got = sliding(text[None, 100:], past_key_values=cache, use_cache=True).logits
        expected = sliding(text[None]).logits[:, 100:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dynamic", "quanto-4", "fp8"])
def test_a_fork_goes_its_own_way(model, text, quanto, name):
    from tqai.evaluation.prefill import fork_cache

    maker = cache_maker(name, model)
    source, filled = prefill_caches(model, text[None, :100], [cache_maker("dynamic", model), maker])
    fork = fork_cache(filled, maker, source)
    with torch.inference_mode():
        first = model(text[None, 100:150], past_key_values=fork, use_cache=True).logits
        assert (filled.get_seq_length(), fork.get_seq_length()) == (100, 150)
        again = model(text[None, 100:150], past_key_values=filled, use_cache=True).logits
    torch.testing.assert_close(first, again, rtol=0, atol=1e-6)
    assert source.get_seq_length() == 100
