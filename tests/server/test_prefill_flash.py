"""A chunk's attention put together from parts: against one softmax over what each token sees."""

import pytest

pytest.importorskip("torch")
import torch

from tqai.backends.base import ExactTokens
from tqai.server.engine.prefill_flash import ChunkAttention, rectangles


@pytest.mark.parametrize("blocks", range(34))
def test_rectangles_are_the_strict_lower_triangle(blocks):
    seen = []
    for first, count, columns, rows in rectangles(blocks):
        for start in range(first, first + count * (columns + rows), columns + rows):
            corner = start + columns
            seen += [(row, c) for row in range(corner, corner + rows) for c in range(start, corner)]
    assert sorted(seen) == [(row, column) for row in range(blocks) for column in range(row)]


@pytest.mark.parametrize("by_blocks", [True, False])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 191, 192, 256, 300, 448, 449, 512])
def test_parts_of_a_chunk_are_one_softmax(tokens, by_blocks):
    """Coded tokens are other tokens than the exact ones here, so that what sees which shows."""
    torch.manual_seed(tokens)
    heads, kv_heads, dim, scaling = 4, 2, 16, 0.3
    query = torch.randn(1, heads, tokens, dim)
    own, history, sinks = (
        ExactTokens(torch.randn(1, kv_heads, count, dim), torch.randn(1, kv_heads, count, dim))
        for count in (tokens, 150, 3)
    )
    blocks = tokens // 64
    coded = ExactTokens(*(torch.randn(1, kv_heads, 64 * blocks, dim) for _ in "kv"))
    chunk = ChunkAttention(query, own, scaling, by_blocks)
    chunk.add(sinks)
    chunk.add(history)
    if by_blocks and tokens > 64:
        chunk.add_lower_blocks(coded)
    found = chunk.result()

    row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
    within = column <= row
    if by_blocks:
        within &= column // 64 == row // 64
    lower = torch.arange(64 * blocks) // 64 < row // 64 if by_blocks else row < torch.zeros(64 * blocks)
    seen = torch.cat([torch.ones(tokens, 153).bool(), within, lower], dim=1)
    keys, values = (
        torch.cat(parts, dim=2).repeat_interleave(2, dim=1).double()
        for parts in zip(sinks, history, own, coded, strict=True)
    )
    logits = scaling * (query.double() @ keys.transpose(-1, -2))
    logits = logits.masked_fill(~seen, -torch.inf)
    expected = logits.softmax(-1) @ values
    assert (found.out - expected).norm() < 2e-6 * expected.norm()
    assert torch.allclose(found.lse.double(), logits.logsumexp(-1), atol=2e-6)
