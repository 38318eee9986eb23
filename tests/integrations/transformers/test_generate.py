"""`generate` in its single-sequence forms, against the oracle: greedy, sampling, chunks, several turns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import OracleCache, assert_agrees, distance, note_pages
from steps import CHUNKS, generate, run
from tiny_models import prompt
from transformers.cache_utils import DynamicCache

import tqai
from tqai import CacheConfig

Tiny = Callable[[str], Any]
FAMILIES = ("llama", "qwen2", "mistral", "gemma2", "gemma3", "qwen3_next", "falcon_h1", "gptj")


def logits(out: Any) -> torch.Tensor:
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy(tiny: Tiny, name: str) -> None:
    model, ids, options = tiny(name), prompt(120), {"max_new_tokens": 20, "output_logits": True}
    oracle = OracleCache(model, CacheConfig())
    expected = generate(model, ids, past_key_values=oracle, **options)
    tqai.patch(model)
    out = generate(model, ids, **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert_agrees(logits(out), logits(expected), out.past_key_values, oracle)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_sampling_with_a_seed(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    options = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "max_new_tokens": 20}
    torch.manual_seed(5)
    expected = generate(model, past_key_values=OracleCache(model, CacheConfig()), **options)
    tqai.patch(model)
    sampled = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        sampled.append(generate(model, **options).sequences)
    assert torch.equal(sampled[0], expected.sequences)
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])


@pytest.mark.parametrize("name", ["llama", "mistral", "falcon_h1"])
def test_prefill_in_chunks_by_generate(tiny: Tiny, name: str) -> None:
    """The oracle reads a chunked prompt back as the cache does: exactly."""
    model, ids = tiny(name), prompt(150)
    options = {"prefill_chunk_size": 50, "max_new_tokens": 10, "output_logits": True}
    oracle = OracleCache(model, CacheConfig())
    expected = generate(model, ids, past_key_values=oracle, **options)
    tqai.patch(model)
    out = generate(model, ids, **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert_agrees(logits(out), logits(expected), out.past_key_values, oracle)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma3", "falcon_h1"])
@torch.no_grad()
def test_chunked_prefill_differs_from_one_shot_by_the_quantization_alone(tiny: Tiny, name: str) -> None:
    """In one shot the prompt sees itself exactly; in chunks it sees compressed pages. At 8 bits the
    difference is below that of a quantized prompt measured here (0.2 to 1 %), at 4 bits above it."""
    model, ids = tiny(name), prompt(200)
    errors = []
    for bits in (8, 4):
        chunked, whole = (tqai.TurboQuantCache(model, bits=bits) for _ in range(2))
        got = run(model, ids, chunked, (70, 70, 60))
        expected = run(model, ids, whole, (200,))
        errors.append(distance(got, expected))
        # the next token reads the same pages in both, but for what layer 2 made of layer 1's
        last = prompt(1, seed=3)
        next_tokens = [model(last, past_key_values=cache).logits for cache in (chunked, whole)]
        assert distance(*next_tokens) < (0.02 if bits == 8 else 0.3)
    assert 0 < errors[0] < 0.02 and 3 * errors[0] < errors[1] < 0.3, errors


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3_next", "gptj"])
def test_several_turns_on_one_cache(tiny: Tiny, name: str) -> None:
    model = tiny(name)

    def turns(cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, heard = prompt(80), []
        for turn in range(3):
            out = generate(model, ids, past_key_values=cache, max_new_tokens=9, output_logits=True)
            assert out.past_key_values is cache and cache.get_seq_length() == out.sequences.shape[1] - 1
            note_pages(cache)
            heard.append(logits(out))
            ids = torch.cat([out.sequences, prompt(30, seed=turn)], 1)
        return ids, torch.cat(heard, 1)

    oracle = OracleCache(model, CacheConfig())
    tokens, expected = turns(oracle)
    cache = tqai.patch(model)
    got_tokens, got = turns(cache)
    assert torch.equal(got_tokens, tokens)
    assert_agrees(got, expected, cache, oracle)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@torch.no_grad()
def test_strategies_agree(tiny: Tiny, name: str) -> None:
    """Attention on codes, on everything decompressed, and on a kept decompressed copy."""
    model, outputs, copies = tiny(name), {}, {}
    for strategy in ("auto", "full", "incremental"):
        cache = tqai.TurboQuantCache(model, cache_strategy=strategy)
        assert cache.layers[0].on_codes == (strategy == "auto")
        outputs[strategy] = run(model, prompt(sum(CHUNKS)), cache, CHUNKS)
        copies[strategy] = cache.memory().copy_bytes
    assert distance(outputs["full"], outputs["auto"]) < 1e-5
    assert distance(outputs["incremental"], outputs["auto"]) < 1e-5
    assert copies["auto"] == copies["full"] == 0
    # a sliding layer's history begins inside pages that will be dropped: no copy is kept of it
    assert (copies["incremental"] > 0) == (name == "llama")


@torch.no_grad()
def test_sinks_and_window_are_exact_and_pay_off(tiny: Tiny) -> None:
    """More exact tokens, less error against no compression at all; the tokens themselves are untouched."""
    model, ids = tiny("llama"), prompt(sum(CHUNKS))
    exact = DynamicCache(config=model.config)
    expected = run(model, ids, exact, CHUNKS)
    errors = []
    for settings in ({}, {"sink_tokens": 60}, {"sink_tokens": 60, "residual_window": 80}):
        cache = tqai.TurboQuantCache(model, bits=2, **settings)
        errors.append(distance(run(model, ids, cache, CHUNKS), expected))
        sinks, window = settings.get("sink_tokens", 0), settings.get("residual_window", 0)
        held, own = cache.layers[0].keys, exact.layers[0].keys
        assert torch.equal(held[:, :, :sinks], own[:, :, :sinks])
        assert torch.equal(held[:, :, own.shape[2] - window :], own[:, :, own.shape[2] - window :])
        assert not torch.allclose(held[:, :, sinks : sinks + 10], own[:, :, sinks : sinks + 10], atol=1e-3)
    assert errors[0] > 1.1 * errors[1] > 1.1 * 1.1 * errors[2], errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_generates(tiny: Tiny, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny("qwen2")).to(dtype)
    tqai.patch(model, bits_k=8, bits_v=8)
    out = generate(model, max_new_tokens=10, output_logits=True)
    assert logits(out).isfinite().all() and out.past_key_values.layers[0].keys.dtype == dtype


@pytest.mark.slow
@torch.no_grad()
def test_compiled_model(tiny: Tiny) -> None:
    """Compiled code breaks its graph at the cache and at attention; tokens and logits stay."""
    model, ids = copy.deepcopy(tiny("mistral")), prompt(126)
    options = {"output_logits": True, "max_new_tokens": 4}
    expected = generate(model, ids, past_key_values=tqai.patch(model), **options)
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    try:
        out = generate(model, ids, **options)
    finally:
        torch._dynamo.reset()
    assert out.past_key_values.on_codes and out.past_key_values.memory().codes_bytes > 0
    assert torch.equal(out.sequences, expected.sequences)
    assert distance(logits(out), logits(expected)) < 1e-5


def test_patching_what_compile_returns(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama"))
    compiled = torch.compile(model, backend="eager")
    cache = tqai.patch(compiled)
    assert cache.on_codes
    assert type(generate(compiled).past_key_values) is tqai.TurboQuantCache
    tqai.unpatch(compiled)
    assert type(generate(compiled).past_key_values) is DynamicCache
    assert model.config._attn_implementation == "sdpa"
