"""Keys and values that lie around a constant, as those of some models do."""

from __future__ import annotations

import torch

DIM = 32


def biased(seed, batch, heads, tokens, dim=DIM, dtype=torch.float32, bias=8.0):
    """Tokens around a constant of each head and sequence, `bias` times as large as their spread."""
    generator = torch.Generator().manual_seed(seed)
    constant = torch.Generator().manual_seed(99)
    parts = []
    for _ in "kv":
        centre = bias * torch.randn(batch, heads, 1, dim, generator=constant)
        parts.append((centre + torch.randn(batch, heads, tokens, dim, generator=generator)).to(dtype))
    return tuple(parts)


def mean_of(tokens):
    return tokens.mean(2, keepdim=True)
