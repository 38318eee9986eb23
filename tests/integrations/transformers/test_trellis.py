"""Trellis pages through a model: against the oracle, and by `tqai.patch`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle import assert_agrees
from steps import both, generate
from tiny_models import prompt

import tqai


@torch.no_grad()
def test_attention_on_trellis_codes(tiny: Callable[[str], Any], poisoned_allocations: None) -> None:
    chunks = (70, 1, 63, 1)
    settings = {"codec": "trellis", "bits_k": 3, "bits_v": 2, "sink_tokens": 2}
    got, expected, cache, oracle = both(tiny("llama"), prompt(sum(chunks)), chunks, **settings)
    assert_agrees(got, expected, cache, oracle)
    assert cache.memory().codes_bytes > 0


@torch.no_grad()
def test_patched_generation_holds_trellis_pages(tiny: Callable[[str], Any]) -> None:
    model = tiny("qwen2")
    tqai.patch(model, codec="trellis256", bits_k=2, bits_v=2)
    cache = generate(model).past_key_values
    layer = cache.layers[0]
    assert layer.store.pool.page_format.key.spec.name == "trellis256"
    assert layer.store.pool.pages > 0
