"""The attention function by itself: what no mask means."""

from __future__ import annotations

import pytest
import torch

from tqai import CacheConfig
from tqai.integrations.transformers.attention import tqai_attention
from tqai.integrations.transformers.layers import TurboQuantLayer


@pytest.mark.parametrize("by_call", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_no_mask_is_causal_where_the_module_is(causal: bool, by_call: bool) -> None:
    """A module says whether it is, and a call may say otherwise."""
    generator = torch.Generator().manual_seed(0)

    def tokens(heads: int, count: int) -> torch.Tensor:
        return torch.randn(2, heads, count, 64, generator=generator)

    layer = TurboQuantLayer(CacheConfig(bits_k=4, bits_v=4), 0, on_codes=True)
    layer.update(tokens(2, 130), tokens(2, 130))
    keys, values = layer.update(tokens(2, 5), tokens(2, 5))
    module = torch.nn.Module().eval()
    module.is_causal = causal != by_call
    query, said = tokens(4, 5), {"is_causal": causal} if by_call else {}
    found, weights = tqai_attention(module, query, keys, values, None, **said)
    held = [part.tensor().double().repeat_interleave(2, 1) for part in (keys, values)]
    logits = query.double() @ held[0].transpose(-1, -2) / 8
    if causal:
        logits = logits.masked_fill(~torch.ones(5, 135, dtype=torch.bool).tril(130), -torch.inf)
    wanted = (torch.softmax(logits, -1) @ held[1]).transpose(1, 2)
    assert weights is None
    assert (found - wanted).norm() / wanted.norm() < 1e-5
