"""A chunk's attention put together from parts: against one softmax over what each token sees."""

import pytest

pytest.importorskip("torch")
import torch

from tqai.backends.base import ExactTokens
from tqai.server.engine.prefill_flash import ChunkAttention, ChunkBlocks

HEADS, KV_HEADS, DIM, SCALING = 6, 2, 16, 0.3


def drawn(tokens):
    return ExactTokens(*(torch.randn(1, KV_HEADS, tokens, DIM) for _ in "kv"))


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("by_blocks", [True, False])
@pytest.mark.parametrize("first", [0, 5, 150])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 191, 192, 300])
def test_parts_of_a_chunk_are_one_softmax(tokens, first, by_blocks, window):
    """Coded tokens are other tokens than the exact ones here, so that what sees which shows. `first` of
    them come before the chunk, and 90 more that every token sees where there are any."""
    torch.manual_seed(tokens)
    query = torch.randn(1, HEADS, tokens, DIM)
    own, far = drawn(window + tokens), drawn(90)
    coded = drawn(first + 64 * ((tokens - 1) // 64))
    chunk = ChunkAttention(query, KV_HEADS, SCALING, ChunkBlocks(tokens, window, by_blocks, query.device))
    chunk.add_own(own)
    if first:
        chunk.add(far)
    if by_blocks:
        chunk.add_coded(coded, first)
    found = chunk.result()

    row, column = torch.arange(tokens)[:, None], torch.arange(window + tokens) - window
    within = column <= row
    if by_blocks:
        within &= column >= row // 64 * 64 - window
    earlier = torch.arange(coded.keys.shape[2]) < first + row // 64 * 64
    earlier &= torch.tensor(by_blocks)
    seen = torch.cat([within, torch.full((tokens, 90), first > 0), earlier], dim=1)
    keys, values = (
        torch.cat(parts, dim=2).repeat_interleave(HEADS // KV_HEADS, dim=1).double()
        for parts in zip(own, far, coded, strict=True)
    )
    logits = SCALING * (query.double() @ keys.transpose(-1, -2))
    logits = logits.masked_fill(~seen, -torch.inf)
    expected = logits.softmax(-1) @ values
    assert found.out.shape == query.shape
    assert (found.out - expected).norm() < 2e-6 * expected.norm()
    assert torch.allclose(found.lse.double(), logits.logsumexp(-1), atol=2e-6)
