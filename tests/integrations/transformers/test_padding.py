"""Batches with left padding: what lies under the padding never counts, and rows stand alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import OracleCache, assert_agrees, distance
from steps import generate
from tiny_models import VOCABULARY, prompt
from transformers.cache_utils import DynamicCache

import tqai
from tqai import CacheConfig

Tiny = Callable[[str], Any]
LENGTHS = (120, 63, 5)
"""One prompt without padding, one that begins inside the first page, one in the last page only."""
FAMILIES = ("llama", "qwen2", "mistral", "gemma2", "gemma3", "deepseek", "gpt_oss", "llama4")


def padded(fill: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `[3, 120]`; the padding holds `fill`, or random tokens for None."""
    ids, mask = torch.full((3, 120), 0 if fill is None else fill), torch.zeros(3, 120, dtype=torch.long)
    if fill is None:
        ids = prompt(120, 3, seed=99)
    for row, length in enumerate(LENGTHS):
        ids[row, 120 - length :] = prompt(length, seed=row)[0]
        mask[row, 120 - length :] = 1
    return ids, mask


def run_padded(model: Any, fill: int | None, cache: Any, **options: Any) -> Any:
    ids, mask = padded(fill)
    return generate(
        model,
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=20,
        output_logits=True,
        **options,
    )


def logits(out: Any) -> torch.Tensor:
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_never_counts(tiny: Tiny, name: str, poisoned_allocations: None) -> None:
    """Whatever token ids lie under the padding: the same logits to the last bit, and those of the oracle."""
    model = tiny(name)
    oracle = OracleCache(model, CacheConfig())
    expected = run_padded(model, 0, oracle)
    runs = [run_padded(model, fill, tqai.TurboQuantCache(model)) for fill in (0, VOCABULARY - 1, None)]
    for out in runs[1:]:
        assert torch.equal(logits(out), logits(runs[0]))
        assert torch.equal(out.sequences[:, 120:], runs[0].sequences[:, 120:])
    assert torch.equal(runs[0].sequences, expected.sequences)
    # what pages hold of padded tokens is nobody's business: eager attention averages where SDPA gives 0
    assert distance(logits(runs[0]), logits(expected)) < 1e-3
    if name in ("llama", "qwen2", "mistral", "gemma3", "deepseek"):
        assert_agrees(logits(runs[0]), logits(expected), runs[0].past_key_values, oracle)


@pytest.mark.parametrize("strategy", ["full", "incremental"])
def test_padding_never_counts_when_decompressing(tiny: Tiny, strategy: str) -> None:
    model = tiny("llama")
    runs = [
        run_padded(model, fill, tqai.TurboQuantCache(model, cache_strategy=strategy)) for fill in (0, None)
    ]
    assert torch.equal(logits(runs[0]), logits(runs[1]))


def forced(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of 40 given tokens after the prompts `ids`, ten at a time, the last three one by one."""
    tokens = prompt(40, seed=7).expand(len(ids), -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    parts = []
    for chunk in tokens.split([10, 10, 10, 7, 1, 1, 1], 1):
        mask = torch.cat([mask, torch.ones_like(chunk)], 1)
        position_ids = mask.cumsum(1)[:, -chunk.shape[1] :] - 1
        parts.append(
            model(chunk, attention_mask=mask, position_ids=position_ids, past_key_values=cache).logits
        )
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    ("settings", "limit"), [({"bits": 8}, 0.02), ({"residual_window": 300}, 1e-5)], ids=str
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma3"])
@torch.no_grad()
def test_each_row_equals_its_prompt_alone(
    tiny: Tiny, name: str, settings: dict[str, Any], limit: float
) -> None:
    """Padding shifts where pages begin, so that other tokens are still exact at a given step. At 8 bits
    that moves logits by at most 2 % and no clear token; without compression by rounding alone. A row that
    lost its mask is off by tens of per cent."""
    model = tiny(name)
    ids, mask = padded(None)
    together = forced(model, tqai.TurboQuantCache(model, **settings), ids, mask)
    for row, length in enumerate(LENGTHS):
        own = ids[row : row + 1, 120 - length :]
        alone = forced(model, tqai.TurboQuantCache(model, **settings), own, torch.ones_like(own))[0]
        assert distance(together[row], alone) < limit
        best = alone.topk(2).values
        clear = (best[:, 0] - best[:, 1]) > 0.1 * alone.std()
        assert clear.float().mean() > 0.5
        assert torch.equal(together[row].argmax(-1)[clear], alone.argmax(-1)[clear])


@torch.no_grad()
def test_nan_in_a_padded_token_of_the_history_stays_there(tiny: Tiny) -> None:
    """The third row's first page is all padding; NaN for the scales of its values changes nothing."""
    model = tiny("llama")
    ids, mask = padded(None)
    outputs = []
    for poison in (False, True):
        cache = tqai.TurboQuantCache(model)
        model(ids, attention_mask=mask, past_key_values=cache)
        for layer in cache.layers:
            pool = layer.store.pool
            scales = pool.slabs[0][int(pool.table[2, 0])][:, pool.page_format.value_scales_at :][:, :128]
            if poison:
                scales.view(torch.bfloat16).fill_(torch.nan)
        more = torch.cat([mask, torch.ones(3, 2, dtype=torch.long)], 1)
        outputs.append(model(prompt(2, 3), attention_mask=more, past_key_values=cache).logits)
    assert torch.equal(*outputs) and outputs[0].isfinite().all()


@torch.no_grad()
def test_what_a_mask_is_too_short_for_is_hidden(tiny: Tiny) -> None:
    """As transformers has it with its own attention, whether or not the mask hides anything else."""
    model = tiny("llama")
    ids, mask = prompt(200), torch.ones(1, 160, dtype=torch.long)
    found = {}
    for name, cache in (("plain", DynamicCache(config=model.config)), ("coded", None)):
        cache = tqai.TurboQuantCache(model, bits=8) if cache is None else cache
        model(ids[:, :150], past_key_values=cache)
        found[name] = model(ids[:, 150:], past_key_values=cache, attention_mask=mask).logits
    assert distance(found["coded"], found["plain"]) < 0.05
