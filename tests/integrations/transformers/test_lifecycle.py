"""A cache's life apart from generation: reset, copies, pickles, an early start, and what it tells."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import OracleCache, assert_agrees, distance
from steps import CHUNKS, generate, run
from tiny_models import prompt
from transformers.cache_utils import DynamicLayer

import tqai
from tqai import CacheConfig

Tiny = Callable[[str], Any]
TOKENS = sum(CHUNKS)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3_next", "falcon_h1"])
@pytest.mark.parametrize("settings", [{}, {"cache_strategy": "incremental", "sink_tokens": 3}], ids=str)
@torch.no_grad()
def test_reset_leaves_a_fresh_cache(tiny: Tiny, name: str, settings: dict[str, Any]) -> None:
    model = tiny(name)
    cache = tqai.TurboQuantCache(model, **settings)
    first = run(model, prompt(TOKENS), cache, CHUNKS)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.memory().total_bytes == 0
    # another batch size is fine after a reset of layers without a recurrent state of fixed size
    if name in ("llama", "mistral"):
        run(model, prompt(10, 2), cache, (10,))
        cache.reset()
    assert torch.equal(run(model, prompt(TOKENS), cache, CHUNKS), first)


def by_deepcopy(cache: Any) -> Any:
    return copy.deepcopy(cache)


def by_pickle(cache: Any) -> Any:
    return pickle.loads(pickle.dumps(cache))


def by_torch_save(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize(
    ("name", "form"), [("llama", "model"), ("llama", "nothing"), ("mistral", "model"), ("falcon_h1", "model")]
)
@torch.no_grad()
def test_copies_go_on_alike_and_apart(tiny: Tiny, name: str, form: str, copied: Callable[[Any], Any]) -> None:
    model = tiny(name)
    cache = tqai.TurboQuantCache(*[model] if form == "model" else [], sink_tokens=3)
    run(model, prompt(TOKENS), cache, CHUNKS)
    twin = copied(cache)
    twin.__dict__.pop("pages_noted")
    # the table of addresses is made when a step reads it, and is not copied
    held = [replace(each.memory(), table_bytes=0) for each in (twin, cache)]
    assert held[0] == held[1] and twin.settings == cache.settings
    # the original goes another way first: nothing may be shared
    cache_before = copy.deepcopy(cache)
    run(model, prompt(80, seed=5), cache, (79, 1))
    cache.crop(-150) if name == "llama" else None
    expected = run(model, prompt(80, seed=6), cache_before, (79, 1))
    assert torch.equal(run(model, prompt(80, seed=6), twin, (79, 1)), expected)


def test_copies_before_the_first_token(tiny: Tiny) -> None:
    for copied in (by_deepcopy, by_pickle):
        for model in (tiny("llama"), None):
            cache = copied(tqai.TurboQuantCache(model))
            out = generate(tiny("llama"), past_key_values=cache)
            assert out.past_key_values is cache and cache.memory().codes_bytes > 0


@torch.no_grad()
def test_a_cache_outlives_unpatch(tiny: Tiny) -> None:
    """Filled on codes, read on after `unpatch` by the model's own attention: the same logits."""
    for name in ("llama", "gemma2", "mistral"):
        model = tiny(name)
        oracle = OracleCache(model, CacheConfig())
        expected = run(model, prompt(TOKENS), oracle, CHUNKS)
        cache = tqai.patch(model)
        run(model, prompt(TOKENS)[:, :136], cache, CHUNKS[:5])
        tqai.unpatch(model)
        got = run(model, prompt(TOKENS)[:, 136:], cache, CHUNKS[5:])
        assert_agrees(got, expected[:, 136:], cache, oracle)


@torch.no_grad()
def test_what_the_cache_tells(tiny: Tiny) -> None:
    """Lengths, mask sizes and kinds of layers are those of transformers' own cache."""
    for name in ("llama", "mistral", "gemma3", "qwen3_next", "falcon_h1", "gemma3n"):
        model = tiny(name)
        oracle = OracleCache(model, CacheConfig())
        cache = tqai.TurboQuantCache(model)
        assert len(cache) == len(oracle) and "TurboQuantCache" in repr(cache)
        for chunk in prompt(TOKENS).split(list(CHUNKS), 1):
            for own in (cache, oracle):
                model(chunk, past_key_values=own)
            assert cache.get_seq_length() == oracle.get_seq_length()
            assert cache.get_max_length() == oracle.get_max_length()
            assert cache.is_sliding == oracle.is_sliding and cache.is_linear == oracle.is_linear
            assert cache.is_compileable == oracle.is_compileable is False
            for index, layer in enumerate(oracle.layers):
                if hasattr(layer, "get_mask_sizes"):
                    for count in (1, 70):
                        assert cache.get_mask_sizes(count, index) == oracle.get_mask_sizes(count, index)
        for layer, own in zip(cache.layers, oracle.layers, strict=True):
            if isinstance(own, DynamicLayer):
                # a sliding layer holds what is still in sight, and the rest of its first page
                assert distance(layer.keys[:, :, -90:], own.keys[:, :, -90:]) < 1e-3
                assert distance(layer.values[:, :, -90:], own.values[:, :, -90:]) < 1e-3


@torch.no_grad()
def test_early_initialization(tiny: Tiny) -> None:
    """transformers' export recipes shape a cache before its first token."""
    model = tiny("llama")
    cache = tqai.TurboQuantCache(model)
    cache.early_initialization(1, 2, 64, torch.float32, torch.device("cpu"))
    assert cache.is_initialized and cache.get_seq_length() == 0
    expected = run(model, prompt(TOKENS), tqai.TurboQuantCache(model), CHUNKS)
    assert torch.equal(run(model, prompt(TOKENS), cache, CHUNKS), expected)


@torch.no_grad()
def test_no_decompressed_tensor_stays(tiny: Tiny) -> None:
    """Neither attention on codes nor decompressing leaves a tensor of the history's size behind."""
    import gc

    model = tiny("llama")
    for settings in ({}, {"cache_strategy": "full"}):
        cache = tqai.TurboQuantCache(model, **settings)
        run(model, prompt(300), cache, (299, 1))
        gc.collect()
        sizes = [
            tensor.shape
            for tensor in gc.get_objects()
            if type(tensor) is torch.Tensor and tensor.ndim == 4 and tensor.shape[1:] == (2, 256, 64)
        ]
        assert not sizes


@pytest.mark.parametrize(
    ("strategy", "on_codes"), [("auto", True), ("residual", True), ("full", False), ("incremental", False)]
)
def test_strategies_that_decompress_give_attention_tensors(tiny: Tiny, strategy: str, on_codes: bool) -> None:
    cache = tqai.TurboQuantCache(tiny("llama"), config="K4/V2", cache_strategy=strategy)
    for part in cache.update(torch.ones(1, 2, 3, 64), torch.ones(1, 2, 3, 64), 0):
        assert isinstance(part, torch.Tensor) != on_codes


@torch.no_grad()
def test_repeated_and_chosen_sequences(tiny: Tiny) -> None:
    model = tiny("llama")
    cache = tqai.TurboQuantCache(model, config="K4/V4")
    model(prompt(130, 2), past_key_values=cache)
    before = cache.layers[1].keys.clone()
    cache.batch_repeat_interleave(3)
    assert torch.equal(cache.layers[1].keys, before[[0, 0, 0, 1, 1, 1]])
    cache.batch_select_indices(torch.tensor([4, 0]))
    assert torch.equal(cache.layers[1].keys, before[[1, 0]])
