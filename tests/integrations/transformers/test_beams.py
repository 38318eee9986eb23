"""Several sequences per prompt, and operations on the batch of a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import OracleCache, assert_agrees, distance, note_pages
from steps import generate, run
from tiny_models import prompt

import tqai
from tqai import CacheConfig

Tiny = Callable[[str], Any]
FAMILIES = ("llama", "qwen2", "mistral", "gemma3", "qwen3_next", "falcon_h1", "gptj")
SETTINGS = {"bits_k": 4, "bits_v": 2}


def first_logits_and_tokens(model: Any, cache: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = generate(
        model, prompt(122, 2), past_key_values=cache, max_new_tokens=14, output_logits=True, **options
    )
    return torch.stack(out.logits, 1), out.sequences


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beam_search(tiny: Tiny, name: str, options: dict[str, Any]) -> None:
    """Beams reorder the rows at every step, also of pages that they share."""
    model = tiny(name)
    oracle = OracleCache(model, CacheConfig(**SETTINGS))
    expected, tokens = first_logits_and_tokens(model, oracle, **options)
    cache = tqai.TurboQuantCache(model, **SETTINGS)
    got, got_tokens = first_logits_and_tokens(model, cache, **options)
    assert torch.equal(got_tokens, tokens)
    assert_agrees(got, expected, cache, oracle)


def test_num_return_sequences(tiny: Tiny) -> None:
    model, options = tiny("llama"), {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(1)
    expected, tokens = first_logits_and_tokens(model, OracleCache(model, CacheConfig(**SETTINGS)), **options)
    torch.manual_seed(1)
    got, got_tokens = first_logits_and_tokens(model, tqai.TurboQuantCache(model, **SETTINGS), **options)
    assert torch.equal(got_tokens, tokens) and len(set(map(tuple, tokens.tolist()))) == 6
    assert distance(got, expected) < 1e-3


BATCH_OPERATIONS: dict[str, Callable[[Any], None]] = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "select by mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    "repeat, then choose one of each": lambda cache: (
        cache.batch_repeat_interleave(2),
        cache.batch_select_indices(torch.tensor([1, 3, 4])),
    ),
    "reorder twice": lambda cache: (
        cache.reorder_cache(torch.tensor([1, 1, 2])),
        cache.reorder_cache(torch.tensor([2, 1, 0])),
    ),
}


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("settings", [{}, {"sink_tokens": 3}, {"cache_strategy": "incremental"}], ids=str)
@pytest.mark.parametrize("operation", BATCH_OPERATIONS.values(), ids=BATCH_OPERATIONS)
@torch.no_grad()
def test_batch_operations(
    tiny: Tiny, name: str, settings: dict[str, Any], operation: Callable[[Any], None]
) -> None:
    """Three different rows, an operation in the middle of a page, then on across the next boundary."""
    model = tiny(name)

    def outputs(cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        before = run(model, prompt(150, 3), cache, (140, 10))
        operation(cache)
        rows = cache.layers[-1].keys.shape[0]
        after = run(model, prompt(45, rows, seed=2), cache, (1, 40, 1, 3))
        return before, after

    oracle = OracleCache(model, CacheConfig(**settings))
    expected = outputs(oracle)
    cache = tqai.TurboQuantCache(model, **settings)
    got = outputs(cache)
    assert got[1].shape == expected[1].shape
    assert distance(got[0], expected[0]) < 1e-3
    cache.__dict__.pop("pages_noted")
    assert_agrees(got[1], expected[1], cache, oracle)


@torch.no_grad()
def test_rows_that_share_pages_part_ways(tiny: Tiny) -> None:
    """After a repeat the rows share pages; what one row appends never shows in another."""
    model = tiny("llama")
    cache = tqai.TurboQuantCache(model)
    model(prompt(130), past_key_values=cache)
    pages = cache.layers[0].store.pool.used
    cache.batch_repeat_interleave(3)
    assert cache.layers[0].store.pool.used == pages
    tokens = prompt(70, 3, seed=4)
    together = run(model, tokens, cache, (70,))
    note_pages(cache)
    for row in range(3):
        alone = tqai.TurboQuantCache(model)
        model(prompt(130), past_key_values=alone)
        assert distance(together[row], run(model, tokens[row : row + 1], alone, (70,))[0]) < 1e-5


def test_operations_on_an_empty_cache_do_nothing(tiny: Tiny) -> None:
    for name in ("llama", "mistral"):
        cache = tqai.TurboQuantCache(tiny(name))
        cache.reorder_cache(torch.tensor([0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0]))
        cache.crop(0)
        cache.reset()
        assert cache.get_seq_length() == 0
