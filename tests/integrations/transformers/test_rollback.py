"""Taking tokens back: `crop`, prompt-lookup and assisted decoding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import OracleCache, assert_agrees
from steps import generate, run
from tiny_models import prompt
from transformers.cache_utils import DynamicCache

import tqai
from tqai import CacheConfig
from tqai.errors import InputError

Tiny = Callable[[str], Any]


@pytest.mark.parametrize(
    "settings", [{}, {"sink_tokens": 7, "residual_window": 20}, {"cache_strategy": "incremental"}], ids=str
)
@pytest.mark.parametrize("removed", [0, 1, 5, 6, 69, 70, 71, 133], ids=lambda count: f"remove {count}")
@torch.no_grad()
def test_crop_then_go_on(tiny: Tiny, removed: int, settings: dict[str, Any]) -> None:
    """From 134 tokens, that is two pages and 6: within the window, to a page boundary, into a page."""
    model = tiny("llama")

    def outputs(cache: Any) -> torch.Tensor:
        run(model, prompt(134), cache, (100, 34))
        cache.crop(-removed)
        assert cache.get_seq_length() == 134 - removed
        return run(model, prompt(75, seed=1), cache, (1, 60, 1, 13))

    oracle = OracleCache(model, CacheConfig(**settings))
    expected = outputs(oracle)
    cache = tqai.TurboQuantCache(model, **settings)
    got = outputs(cache)
    cache.__dict__.pop("pages_noted")
    assert_agrees(got, expected, cache, oracle)


@torch.no_grad()
def test_crop_by_length_and_more_than_there_is(tiny: Tiny) -> None:
    model = tiny("llama")
    cache = tqai.TurboQuantCache(model)
    run(model, prompt(134), cache, (134,))
    cache.crop(150)
    assert cache.get_seq_length() == 134
    cache.crop(90)
    assert cache.get_seq_length() == 90
    with pytest.raises(InputError, match="91 tokens"):
        cache.crop(-91)
    assert cache.get_seq_length() == 90
    cache.crop(-90)
    assert cache.get_seq_length() == 0
    fresh = run(model, prompt(80), tqai.TurboQuantCache(model), (80,))
    assert torch.equal(run(model, prompt(80), cache, (80,)), fresh)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@torch.no_grad()
def test_crop_of_sliding_layers(tiny: Tiny, name: str) -> None:
    """Recording the past keeps what a crop brings back into sight; a crop ends the need for it."""
    model = tiny(name)

    def outputs(cache: Any) -> torch.Tensor:
        run(model, prompt(150), cache, (150,))
        cache.activate_past_recording()
        parts = []
        for turn, removed in enumerate((3, 70, 0, 40)):
            parts.append(run(model, prompt(75, seed=turn), cache, (70, 5)))
            cache.crop(-removed)
        parts.append(run(model, prompt(20, seed=9), cache, (1, 19)))
        return torch.cat(parts, 1)

    oracle = OracleCache(model, CacheConfig())
    expected = outputs(oracle)
    cache = tqai.TurboQuantCache(model)
    got = outputs(cache)
    cache.__dict__.pop("pages_noted")
    assert_agrees(got, expected, cache, oracle)


@torch.no_grad()
def test_crop_of_sliding_layers_without_recording(tiny: Tiny) -> None:
    """What has been dropped cannot come back: an error that says so, and the cache as it was."""
    model = tiny("mistral")
    cache = tqai.TurboQuantCache(model)
    run(model, prompt(300), cache, (200, 100))
    with pytest.raises(InputError, match="activate_past_recording"):
        cache.crop(-150)
    assert cache.get_seq_length() == 300
    expected = copy.deepcopy(cache)
    assert torch.equal(*(run(model, prompt(2), c, (1, 1)) for c in (cache, expected)))


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma2", "gemma3"])
def test_prompt_lookup(tiny: Tiny, name: str) -> None:
    """Same tokens as the oracle under the same acceptances, and the rejected ones are gone."""
    model, ids = tiny(name), prompt(30).repeat(1, 4)
    options = {"prompt_lookup_num_tokens": 5, "max_new_tokens": 30}
    expected = generate(model, ids, past_key_values=OracleCache(model, CacheConfig()), **options)
    tqai.patch(model)
    out = generate(model, ids, **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


@pytest.mark.parametrize("patched", ["both", "model", "assistant"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_assisted_decoding(tiny: Tiny, name: str, patched: str) -> None:
    """The assistant is the model itself with other weights in the last place, so that it is often right.
    From 159 tokens on a window of 96 needs the first page no more: rejected tokens bring it back."""
    model, ids = tiny(name), prompt(157)
    assistant = copy.deepcopy(model)
    torch.nn.init.normal_(assistant.lm_head.weight, std=0.02)
    assistant.lm_head.weight.data += model.lm_head.weight.data
    assistant.generation_config.num_assistant_tokens = 4
    options = {"assistant_model": assistant, "max_new_tokens": 24}
    oracle = (
        OracleCache(model, CacheConfig()) if patched != "assistant" else DynamicCache(config=model.config)
    )
    # what the assistant proposes decides how the model's tokens come in chunks, and so what they read
    # exactly: the oracle has to hear the same proposals
    if patched == "both":
        tqai.patch(assistant)
    expected = generate(model, ids, past_key_values=oracle, **options)
    tqai.patch(assistant if patched == "assistant" else model)
    out = generate(model, ids, **options)
    assert type(out.past_key_values) is (DynamicCache if patched == "assistant" else tqai.TurboQuantCache)
    assert torch.equal(out.sequences, expected.sequences)
