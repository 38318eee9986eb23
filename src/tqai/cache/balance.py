"""Keys balanced against queries: one factor per coordinate and KV head, exact for any factors.

    <q, k> = <q / s, k * s>

A rotation spreads the error of a code evenly over all coordinates, so the error of a logit grows with
sum_j k_j^2 s_j^2  *  sum_j q_j^2 / s_j^2, which is least at s_j^2 = |q_j| / |k_j|. Models that were trained
plainly have little to win (their keys are large where their queries are: 10 to 20 % of that product, of which
nothing arrives, docs/quality.md); models with keys scaled up against the queries have much.

The factors are frozen with the offsets, at the layer's first compression, from the keys that go into pages
and the queries of that forward pass. A head takes part where they leave at most `MOST_LEFT` of the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MOST_LEFT", "factors", "query_energy"]

MOST_LEFT = 0.7
MOST_QUERIES = 256
FLOOR = 1e-3
LARGEST = 32.0


def query_energy(query: Tensor, kv_heads: int) -> Tensor:
    """Mean squares float32 `[batch, kv_heads, head_dim]` of the newest queries of each KV head's group, of
    `query` `[batch, query_heads, new_tokens, head_dim]`."""
    newest = query.detach()[:, :, -MOST_QUERIES:].float()
    squares = torch.nan_to_num(newest, nan=0.0, posinf=0.0, neginf=0.0).square()
    return squares.unflatten(1, (kv_heads, -1)).mean((2, 3))


def factors(keys: Tensor, energy: Tensor) -> Tensor | None:
    """Factors `[batch, kv_heads, 1, head_dim]` for `keys` `[batch, kv_heads, tokens, head_dim]`, in their
    dtype, of geometric mean 1 and within 1/32 to 32; 1 for heads that do without, None if all do.

    `energy` is `query_energy`.
    """
    finite = torch.nan_to_num(keys.detach().float(), nan=0.0, posinf=0.0, neginf=0.0)
    largest = finite.abs().amax((2, 3), keepdim=True)
    of_keys = (finite / torch.where(largest > 0, largest, 1.0)).square().mean(2)
    ratio = _floored(energy) / _floored(of_keys)
    wanted = ratio.log().div(4)
    wanted = (wanted - wanted.mean(-1, keepdim=True)).exp().clamp(1 / LARGEST, LARGEST)
    left = (of_keys * wanted.square()).sum(-1) * (energy / wanted.square()).sum(-1)
    before = of_keys.sum(-1) * energy.sum(-1)
    # what is multiplied must stay within the dtype's range
    in_range = largest.flatten(1) <= torch.finfo(keys.dtype).max / (2 * LARGEST)
    used = (before > 0) & (left <= MOST_LEFT * before) & in_range
    if not bool(used.any()):
        return None
    return torch.where(used.unsqueeze(-1), wanted, 1.0).unsqueeze(2).to(keys.dtype)


def _floored(energy: Tensor) -> Tensor:
    """`energy` with small coordinates raised to a thousandth of the mean; 1 where all is 0."""
    mean = energy.mean(-1, keepdim=True)
    return torch.where(mean > 0, energy.maximum(FLOOR * mean), 1.0)
