"""Greedy decoding equals `generate`; the first difference is found where it is."""

import pytest
import torch
from transformers import DynamicCache

from tqai.evaluation import cache_maker, first_divergence, greedy_decode, greedy_divergence


@pytest.mark.parametrize("held", [0, 1, 60])
def test_equals_generate(model, text, held):
    prompt = text[None, :80]
    expected = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[0, 80:].tolist()
    cache = DynamicCache(config=model.config)
    if held:
        with torch.inference_mode():
            model(text[None, :held], past_key_values=cache, use_cache=True)
    assert greedy_decode(model, text[None, held:80], cache, 12) == expected
    assert cache.get_seq_length() == 80 + 11


def test_stops_when_told(model, text):
    every = greedy_decode(model, text[None, :80], DynamicCache(config=model.config), 12)
    got = greedy_decode(
        model, text[None, :80], DynamicCache(config=model.config), 12, lambda ids: len(ids) == 5
    )
    assert got == every[:5]


@pytest.mark.parametrize(
    ("left", "right", "index"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 5, 3], 1),
        ([4, 2], [1, 2], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1], 1),
        ([], [], None),
        ([], [1], 0),
    ],
)
def test_first_divergence(left, right, index):
    assert first_divergence(left, right) == index


def test_divergence_of_caches(model, text, forgetful):
    makers = [cache_maker("dynamic", model), forgetful]
    found = greedy_divergence(model, [text[:60], text[60:150]], makers, 10)
    assert found["dynamic"] == [None, None]
    assert all(index is not None and index < 5 for index in found["forgetful"])
