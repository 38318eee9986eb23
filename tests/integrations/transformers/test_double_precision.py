"""Models in float64, which the torch backend alone serves, with codes and sums of float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from steps import CHUNKS, generate
from tiny_models import prompt

import tqai

Tiny = Callable[[str], Any]


@pytest.mark.parametrize(
    "settings",
    [
        {"config": "K4/V2"},
        {"config": "K4/V2", "cache_strategy": "incremental"},
        {"config": "K3/V3", "use_qjl": True},
        {"config": "balanced"},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_same_logits_as_in_single_precision(tiny: Tiny, settings: dict[str, Any]) -> None:
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(tiny("llama")).to(dtype)
        cache = tqai.TurboQuantCache(model, **settings)
        parts = prompt(sum(CHUNKS)).split(CHUNKS, dim=1)
        logits = torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
        assert logits.dtype == dtype
        found[dtype] = logits.double()
    error = (found[torch.float64] - found[torch.float32]).norm() / found[torch.float64].norm()
    assert error < 1e-3, f"{error:.1e}"


def test_generates_and_decompresses(tiny: Tiny) -> None:
    """Attention of the model's own reads vectors in its dtype."""
    model = copy.deepcopy(tiny("llama")).double()
    cache = tqai.TurboQuantCache(config="K4/V4")
    found = generate(model, past_key_values=cache, max_new_tokens=70, output_logits=True)
    exact = model(found.sequences).logits[:, 69:-1]
    error = (torch.stack(found.logits, 1) - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.2, f"{error:.3f}"
    assert cache.layers[0].keys.dtype == torch.float64
