"""Attention logits, rounded to a few bits as they flow: to see how sensitive a model is. Saves no memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LOGIT_BITS", "rounded_logit_attention", "rounded_logits"]

LOGIT_BITS = "_tqai_logit_bits"
"""Attribute of an attention module whose logits are to be rounded: to so many bits."""


def rounded_logits(logits: Tensor, seen: Tensor | None, bits: int) -> Tensor:
    """`logits` `[..., tokens]` on 2**bits evenly spaced levels between the least and the greatest seen
    logit of each row; `seen` (bool, broadcast) None means all. What is not seen is returned as -inf."""
    low = logits if seen is None else logits.masked_fill(~seen, torch.inf)
    high = logits if seen is None else logits.masked_fill(~seen, -torch.inf)
    least, greatest = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    step = (greatest - least) / (2**bits - 1)
    usable = step.isfinite() & (step > 0)
    index = torch.round((logits - least) / torch.where(usable, step, 1.0))
    out = torch.where(usable, least + index * step, logits)
    return out if seen is None else out.masked_fill(~seen, -torch.inf)


def rounded_logit_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    bits: int,
) -> Tensor:
    """Attention of `query` `[batch, query_heads, new_tokens, head_dim]` with rounded logits, in float32.

    `mask` is bool `[batch or 1, query_heads or 1, new_tokens, tokens]`, or None: every query sees what
    came before it and itself. Returns the query's shape (with the values' head_dim) and dtype.
    """
    groups = query.shape[1] // keys.shape[1]
    keys, values = (part.float().repeat_interleave(groups, dim=1) for part in (keys, values))
    logits = scaling * query.float() @ keys.transpose(-1, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    new_tokens, tokens = logits.shape[-2:]
    if mask is None:
        mask = torch.ones(new_tokens, tokens, dtype=torch.bool, device=query.device).tril(tokens - new_tokens)
    logits = rounded_logits(logits, mask, bits)
    if sink_logits is not None:
        one_more = sink_logits.float().reshape(1, -1, 1, 1).expand(*logits.shape[:2], new_tokens, 1)
        logits = torch.cat([logits, one_more], -1)
    weights = torch.softmax(logits, -1)[..., :tokens].nan_to_num(nan=0.0)
    return (weights @ values).to(query.dtype)
