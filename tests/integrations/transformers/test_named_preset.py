"""What `generate` does to a cache with everything on that the best preset has: trellis codes, sinks, window,
offsets, balance and more bits in the last layer.

The reference of a step is the same step over a `DynamicCache` of what the compressed cache decodes to just
before it, with the model's own attention: all of it but the codes themselves, which have their own tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import distance
from steps import generate
from tiny_models import prompt
from transformers.cache_utils import DynamicCache

import tqai
from tqai import CacheConfig

Tiny = Callable[[str], Any]
PRESET = CacheConfig.preset("balanced", residual_window=10, offsets="on")
"""With a window that a short test leaves, and offsets even where a random model has no use for them."""
TOLERANCE = 2e-5


def decoded(model: Any, cache: Any) -> DynamicCache:
    """A plain cache of the tokens that `cache` holds now."""
    plain = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        if layer.is_initialized:
            plain.update(layer.keys.clone(), layer.values.clone(), index)
    return plain


def agrees(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Feed `ids` to the cache, and hold the logits against those over what it decoded to before."""
    plain = decoded(model, cache)
    got = model(ids, past_key_values=cache, attention_mask=mask).logits
    # attention on codes serves other caches as the model's own attention does
    expected = model(ids, past_key_values=plain, attention_mask=mask).logits
    seen = slice(None) if mask is None else mask[:, -ids.shape[1] :].bool()
    assert distance(got[seen], expected[seen]) < TOLERANCE


@pytest.fixture
def filled(tiny: Tiny) -> Callable[..., tuple[Any, Any]]:
    """Three rows of 150 tokens, read in two chunks, in a cache of the preset."""

    def fill(name: str, rows: int = 3) -> tuple[Any, Any]:
        model = tiny(name)
        cache = tqai.TurboQuantCache(model, config=PRESET)
        for chunk in prompt(150, rows).split([130, 20], 1):
            model(chunk, past_key_values=cache)
        store = cache.layers[0].store
        assert store.offsets is not None and len(store.window) < 74 and cache.memory().codes_bytes > 0
        return model, cache

    return fill


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@torch.no_grad()
def test_chunks_and_single_tokens(filled: Any, name: str) -> None:
    model, cache = filled(name)
    for start, count in enumerate((1, 70, 1)):
        agrees(model, cache, prompt(count, 3, seed=start + 5))


OPERATIONS: dict[str, tuple[Callable[[Any], None], list[int], int]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0], 150),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2], 150),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0], 150),
    "crop within the window": (lambda cache: cache.crop(-5), [0, 1, 2], 145),
    "crop into a page": (lambda cache: cache.crop(-100), [0, 1, 2], 50),
    "crop to the sinks": (lambda cache: cache.crop(-147), [0, 1, 2], 3),
}
"""What is done, and which rows and how many tokens it leaves."""


@pytest.mark.parametrize(("operation", "rows", "tokens"), OPERATIONS.values(), ids=OPERATIONS)
@torch.no_grad()
def test_operations_and_on(
    filled: Any, operation: Callable[[Any], None], rows: list[int], tokens: int
) -> None:
    """In the middle of a page, then on across the next boundary; rows that were copied part ways."""
    model, cache = filled("qwen2")
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    operation(cache)
    for layer, held in zip(cache.layers, before, strict=True):
        for now, then in zip((layer.keys, layer.values), held, strict=True):
            assert now.shape == then[rows, :, :tokens].shape
            assert distance(now, then[rows, :, :tokens]) < TOLERANCE
    for start, count in enumerate((1, 65, 1)):
        agrees(model, cache, prompt(count, len(rows), seed=start + 5))


@torch.no_grad()
def test_left_padding(tiny: Tiny) -> None:
    model = tiny("qwen2")
    cache = tqai.TurboQuantCache(model, config=PRESET)
    mask = torch.ones(3, 150, dtype=torch.int64)
    mask[1, :70] = 0
    mask[2, :3] = 0
    model(prompt(150, 3), past_key_values=cache, attention_mask=mask)
    for start, count in enumerate((1, 30, 1)):
        mask = torch.cat([mask, mask.new_ones(3, count)], 1)
        agrees(model, cache, prompt(count, 3, seed=start + 5), mask)


@torch.no_grad()
def test_generate_is_step_by_step(tiny: Tiny) -> None:
    """`generate` of a patched model, several turns on one cache, says what single steps say."""
    model = tiny("qwen2")
    cache = tqai.patch(model, config=PRESET)
    first = generate(model, prompt(120), past_key_values=cache, max_new_tokens=20).sequences
    ids = torch.cat([first, prompt(33, seed=9)], 1)
    got = generate(model, ids, past_key_values=cache, max_new_tokens=12).sequences

    by_hand = tqai.TurboQuantCache(model, config=PRESET)
    expected = prompt(120)
    new = expected
    for turn, count in enumerate((20, 12)):
        if turn:
            # the last token that was generated is not in the cache yet
            new = torch.cat([new, prompt(33, seed=9)], 1)
            expected = torch.cat([expected, prompt(33, seed=9)], 1)
        for _ in range(count):
            new = model(new, past_key_values=by_hand).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, new], 1)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_beams_end_where_their_pages_say(tiny: Tiny) -> None:
    """The logits of a beam search's last step are those of the cache that it leaves, reordered as it was."""
    model = tiny("llama")
    one = tqai.TurboQuantCache(model, config=PRESET)
    beams = generate(
        model, prompt(120), past_key_values=one, max_new_tokens=20, num_beams=3, output_scores=True
    )
    alone = tqai.TurboQuantCache(model, config=PRESET)
    logits = model(beams.sequences[:, :120], past_key_values=alone).logits[:, -1:]
    total = 0.0
    for token in beams.sequences[0, 120:]:
        total += float(logits.log_softmax(-1)[0, -1, token])
        logits = model(token.view(1, 1), past_key_values=alone).logits
    assert float(beams.sequences_scores[0]) == pytest.approx(total / 20, rel=1e-4)
