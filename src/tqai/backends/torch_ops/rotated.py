"""What the torch forms of all codecs have in common: `core.rotated` on a torch device, in float32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tqai.core.rotated import SMALLEST_NORMAL

__all__ = ["BFLOAT16_MAX", "Rotated", "rotated", "scales_of", "unrotated"]

BFLOAT16_MAX = torch.finfo(torch.bfloat16).max


class Rotated(NamedTuple):
    """Vectors over their largest absolute coordinate, rotated.

    Attributes:
        y: float32 `[..., head_dim]`; 0 where a vector is not usable.
        norm: float32 `[..., 1]`, of y; 1 where a vector is not usable, so that it can be divided by.
        largest: float32 `[..., 1]`, that coordinate.
        usable: bool `[..., 1]`: finite, and neither zero nor subnormal.
        finite: bool `[..., 1]`.
    """

    y: Tensor
    norm: Tensor
    largest: Tensor
    usable: Tensor
    finite: Tensor


def rotated(vectors: Tensor, rotation: Tensor) -> Rotated:
    """`vectors` `[..., head_dim]` as rows x @ rotation.T."""
    x = vectors.float()
    largest = x.abs().amax(-1, keepdim=True)
    finite = torch.isfinite(largest)
    usable = finite & (largest >= SMALLEST_NORMAL)
    y = torch.where(usable, x / torch.where(usable, largest, 1.0), 0.0) @ rotation.T
    norm = torch.where(usable, torch.linalg.vector_norm(y, dim=-1, keepdim=True), 1.0)
    return Rotated(y, norm, largest, usable, finite)


def scales_of(vectors: Rotated, chosen: Tensor, rule: str) -> Tensor:
    """Scales bfloat16 `[...]` where codes stand for `chosen` `[..., head_dim]`; `core.rotated.scales_of`."""
    if rule == "norm":
        scale = vectors.norm
    else:
        scale = (vectors.y * chosen).sum(-1, keepdim=True) / chosen.square().sum(-1, keepdim=True)
    # in float64 because float32 overflows for vectors near its largest number
    scale = (scale.double() * vectors.largest.double()).clamp(max=BFLOAT16_MAX).float().to(torch.bfloat16)
    scale = torch.where(vectors.usable, scale, torch.zeros_like(scale))
    return torch.where(vectors.finite, scale, torch.full_like(scale, torch.nan)).squeeze(-1)


def unrotated(directions: Tensor, scales: Tensor, rotation: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors `[..., head_dim]` in the original space as `dtype`, clamped to its range."""
    # scale last, in float64 where the product could pass the range of float32
    vectors = (directions @ rotation).double() * scales.double().unsqueeze(-1)
    limit = torch.finfo(dtype).max
    return vectors.clamp(-limit, limit).to(dtype)
