"""Scales of one byte (`core.log_scale`) in torch operations, bit for bit those of core."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tqai.core.log_scale import LEVELS, NAN_BYTE, THRESHOLDS

__all__ = ["from_steps", "to_steps"]


def to_steps(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes uint8 `[..., n]` and bases `[..., 2]` (bfloat16 as bytes) of bfloat16 `scales` `[..., n]`."""
    numbers = scales.float()
    finite = numbers.isfinite()
    numbers = torch.where(finite, numbers, 0.0)
    base = numbers.amax(-1, keepdim=True).clamp_min(0.0)
    ratios = numbers / torch.where(base > 0, base, 1.0)
    steps = torch.bucketize(-ratios, _tables(scales.device)[0]).to(torch.uint8)
    return torch.where(finite, steps, NAN_BYTE), base.to(torch.bfloat16).view(torch.uint8)


def from_steps(steps: Tensor, bases: Tensor) -> Tensor:
    """Scales float32 `[..., n]` of bytes `[..., n]` and bases `[..., 2]`."""
    base = bases.contiguous().view(torch.bfloat16).float()
    return _tables(steps.device)[1][steps.int()] * base


@lru_cache(maxsize=16)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Negated thresholds, ascending `[254]`, and levels with those of zero and NaN `[256]`, float32."""
    levels = np.concatenate([LEVELS, np.array([0.0, np.nan], dtype=np.float32)])
    return torch.from_numpy(-THRESHOLDS).to(device), torch.from_numpy(levels).to(device)
