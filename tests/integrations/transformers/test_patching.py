"""`patch` and `unpatch`: what a patched model does with caches of others, and that nothing stays behind."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from steps import CHUNKS, generate, run
from tiny_models import build, prompt
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, StaticCache

import tqai
from tqai.errors import ConfigError, UnsupportedError

Tiny = Callable[[str], Any]


def cache_type(out: Any) -> type:
    return type(out.past_key_values)


def test_generate_without_a_cache_makes_a_fresh_one_each_call(tiny: Tiny) -> None:
    model = tiny("llama")
    returned = tqai.patch(model, bits_k=8, bits_v=3)
    first, second = generate(model), generate(model)
    assert cache_type(first) is tqai.TurboQuantCache
    assert first.past_key_values is not second.past_key_values
    assert first.past_key_values.settings == returned.settings
    assert first.past_key_values.get_seq_length() == 70 + 7
    assert first.past_key_values.memory().codes_bytes > 0
    assert returned.get_seq_length() == 0
    assert torch.equal(first.sequences, second.sequences)
    third = generate(model, past_key_values=returned)
    assert third.past_key_values is returned
    assert torch.equal(third.sequences, first.sequences)


@pytest.mark.parametrize("how", ["argument", "configuration", "configuration by position", "model's own"])
def test_cache_implementation_by_name(tiny: Tiny, how: str) -> None:
    model = tiny("llama")
    tqai.patch(model)
    configuration = GenerationConfig(max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    configuration.cache_implementation = "turboquant"
    if how == "argument":
        out = generate(model, cache_implementation="turboquant")
    elif how == "configuration":
        out = model.generate(prompt(70), generation_config=configuration)
    elif how == "configuration by position":
        out = model.generate(prompt(70), configuration)
    else:
        held, model.generation_config = model.generation_config, configuration
        try:
            out = model.generate(prompt(70))
            assert model.generation_config is configuration
        finally:
            model.generation_config = held
    assert cache_type(out) is tqai.TurboQuantCache
    assert torch.equal(out.sequences, generate(model).sequences)
    assert configuration.cache_implementation == "turboquant"


def test_another_cache_beside_the_name_is_refused(tiny: Tiny) -> None:
    model = tiny("llama")
    tqai.patch(model)
    with pytest.raises(ConfigError, match="DynamicCache"):
        generate(model, cache_implementation="turboquant", past_key_values=DynamicCache())


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_other_cache_implementations_pass_through(tiny: Tiny, name: str, implementation: str) -> None:
    model = tiny(name)
    options = {"cache_implementation": implementation, "disable_compile": True, "output_logits": True}
    expected = generate(model, **options)
    tqai.patch(model)
    for given in (options, {"generation_config": GenerationConfig(**options)}):
        out = generate(model, **given)
        assert (
            cache_type(out)
            is cache_type(expected)
            is {"dynamic": DynamicCache, "static": StaticCache}[implementation]
        )
        assert torch.equal(out.sequences, expected.sequences)
        # a static cache's prompt is attended to with a mask instead of a flag: equal but for rounding
        limit = 0.0 if implementation == "dynamic" else 1e-5
        torch.testing.assert_close(
            torch.stack(out.logits), torch.stack(expected.logits), rtol=limit, atol=limit
        )


def test_default_named_hybrid_means_none(tiny: Tiny) -> None:
    """Checkpoints of Gemma 2 carry it; transformers treats it as unset."""
    model = copy.deepcopy(tiny("gemma2"))
    model.generation_config.cache_implementation = "hybrid"
    tqai.patch(model)
    assert cache_type(generate(model)) is tqai.TurboQuantCache


@pytest.mark.parametrize("where", ["argument", "configuration", "model's own"])
def test_no_cache_stays_no_cache(tiny: Tiny, where: str) -> None:
    model = copy.deepcopy(tiny("llama"))
    tqai.patch(model)
    given: dict[str, Any] = {"use_cache": False}
    if where == "configuration":
        given = {"generation_config": GenerationConfig(use_cache=False)}
    elif where == "model's own":
        model.generation_config.use_cache, given = False, {}
    assert generate(model, **given).past_key_values is None


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "mistral", "gemma3", "falcon_h1", "deepseek", "diffllama", "llama4"]
)
@torch.no_grad()
def test_other_uses_are_unchanged_to_the_last_bit(tiny: Tiny, name: str) -> None:
    """DynamicCache in chunks and with padding, and a forward pass without a cache."""
    model, ids = tiny(name), prompt(sum(CHUNKS))
    padding = torch.ones(2, 70, dtype=torch.long)
    padding[1, :9] = 0

    def uses() -> list[torch.Tensor]:
        padded = DynamicCache(config=model.config)
        first = model(prompt(70, 2), attention_mask=padding, past_key_values=padded).logits
        mask = torch.cat([padding, padding.new_ones(2, 1)], 1)
        second = model(prompt(1, 2), attention_mask=mask, past_key_values=padded).logits
        return [
            model(ids, use_cache=False).logits,
            run(model, ids, DynamicCache(config=model.config), CHUNKS),
            first[0],
            first[1, 9:],
            second,
        ]

    before = uses()
    tqai.patch(model)
    for use, (got, expected) in enumerate(zip(uses(), before, strict=True)):
        assert torch.equal(got, expected), use


@pytest.mark.parametrize(
    ("name", "tolerance"), [("llama", 0.0), ("mistral", 0.0), ("gemma2", 1e-5), ("gpt_oss", 1e-5)]
)
def test_training_is_unchanged(tiny: Tiny, name: str, tolerance: float) -> None:
    """Bit for bit where the model's own attention is SDPA; "eager" has other roundings."""
    model, ids = copy.deepcopy(tiny(name)).train(), prompt(130)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    before = gradients()
    tqai.patch(model)
    patched = gradients()
    tqai.unpatch(model)
    for got, restored, expected in zip(patched, gradients(), before, strict=True):
        assert (got - expected).norm() <= tolerance * expected.norm()
        assert torch.equal(restored, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_unpatch_restores_everything(attention: str) -> None:
    model = build("llama")
    model.set_attn_implementation(attention)
    own, before, outputs = dict(vars(model)), generate(model, output_logits=True), model(prompt(80)).logits
    for _ in range(2):
        tqai.patch(model)
    assert generate(model).sequences.shape == before.sequences.shape
    for _ in range(2):
        tqai.unpatch(model)
        assert vars(model) == own
        assert model.config._attn_implementation == attention
        after = generate(model, output_logits=True)
        assert cache_type(after) is DynamicCache
        assert torch.equal(torch.stack(after.logits), torch.stack(before.logits))
        assert torch.equal(model(prompt(80)).logits, outputs)
    with pytest.raises(ValueError, match="turboquant"):
        generate(model, cache_implementation="turboquant")


def test_generate_that_was_replaced_before_is_called_and_restored(tiny: Tiny) -> None:
    model, calls = copy.deepcopy(tiny("llama")), []
    own = model.generate

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(type(kwargs.get("past_key_values")))
        return own(*args, **kwargs)

    model.generate = counted
    tqai.patch(model)
    generate(model)
    assert calls == [tqai.TurboQuantCache]
    tqai.unpatch(model)
    assert model.generate is counted


def test_patching_again_changes_the_settings(tiny: Tiny) -> None:
    model = tiny("llama")
    tqai.patch(model, bits_k=2, bits_v=2)
    tqai.patch(
        model,
        config="K4/V4",
    )
    assert generate(model).past_key_values.settings.label == "K4/V4"


def test_a_preset_and_where_it_is_computed(tiny: Tiny) -> None:
    model = tiny("llama")
    cache = tqai.patch(model, config="small", backend="torch", check_finite=False)
    wanted = tqai.TurboQuantCache(model, config="small", backend="torch", check_finite=False).settings
    assert cache.settings == wanted
    assert (wanted.codec, wanted.backend, wanted.check_finite) == ("trellis", "torch", False)
    assert tqai.patch(model, config=cache.settings).settings == cache.settings


def test_constructing_with_the_model_is_undone_by_unpatch(tiny: Tiny) -> None:
    model = tiny("gemma2")
    cache = tqai.TurboQuantCache(model, bits=4)
    assert model.config._attn_implementation == "tqai" and cache.on_codes
    generate(model, past_key_values=cache)
    tqai.unpatch(model)
    assert model.config._attn_implementation == "eager"
    # the cache lives on, decompressing for attention that knows no codes
    generate(model, cache_continued(cache), past_key_values=cache)


def cache_continued(cache: Any) -> torch.Tensor:
    return prompt(cache.get_seq_length() + 3)


def test_two_models_at_once(tiny: Tiny) -> None:
    llama, mistral = tiny("llama"), tiny("mistral")
    alone = [
        generate(model, past_key_values=tqai.TurboQuantCache(model)).sequences for model in (llama, mistral)
    ]
    tqai.patch(llama, bits_k=4, bits_v=2)
    tqai.patch(mistral, bits_k=4, bits_v=2)
    assert [generate(model).sequences.tolist() for model in (llama, mistral)] == [
        ids.tolist() for ids in alone
    ]
    tqai.unpatch(llama)
    assert cache_type(generate(llama)) is DynamicCache
    assert cache_type(generate(mistral)) is tqai.TurboQuantCache


@torch.no_grad()
def test_two_models_that_share_a_config(tiny: Tiny) -> None:
    """Unpatching one takes the other's attention on codes away, never its results."""
    first = build("llama")
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    tqai.patch(first)
    cache = tqai.patch(second)
    expected = run(second, prompt(sum(CHUNKS)), tqai.TurboQuantCache(second), CHUNKS)
    tqai.unpatch(first)
    assert torch.allclose(run(second, prompt(sum(CHUNKS)), cache, CHUNKS), expected, atol=1e-4)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_patched_model_stands_alone(tiny: Tiny, how: str) -> None:
    model = tiny("llama")
    tqai.patch(model)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    torch.nn.init.zeros_(copied.lm_head.weight)
    copied.lm_head.weight.data[5] = 1
    assert not torch.equal(generate(copied).sequences, generate(model).sequences)
    tqai.unpatch(model)
    assert cache_type(generate(copied)) is tqai.TurboQuantCache
    tqai.unpatch(copied)
    assert copied.config._attn_implementation == "sdpa" and "generate" not in vars(copied)
    assert cache_type(generate(copied)) is DynamicCache


def test_models_that_take_no_attention_function_decompress(tiny: Tiny) -> None:
    model = tiny("gptj")
    cache = tqai.patch(model)
    assert not cache.on_codes and model.config._attn_implementation == "eager"
    assert cache_type(generate(model)) is tqai.TurboQuantCache
    with pytest.raises(UnsupportedError):
        tqai.TurboQuantCache(model, offloading=True)
