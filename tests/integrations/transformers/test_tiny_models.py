"""The tiny models are worth testing with: greedy tokens vary and logits depend on tokens long ago."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import distance
from tiny_models import BUILDERS, prompt


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_tokens_vary_and_logits_depend_on_history(tiny: Callable[[str], Any], name: str) -> None:
    model = tiny(name)
    ids = prompt(90)
    changed = ids.clone()
    changed[:, 10:40] = prompt(30, seed=1)
    generated = model.generate(ids, max_new_tokens=24, do_sample=False)[0, 90:]
    assert len(set(generated.tolist())) >= 6, generated.tolist()
    assert distance(model(changed).logits[:, -1], model(ids).logits[:, -1]) > 0.02
