"""The attention function and the mask function that tqai registers with transformers as "tqai".

Given handles, attention is computed on the codes. Given plain tensors (another cache, training, a
vision tower), it is transformers' own SDPA, so a patched model still does everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from tqai.activations.rounding import LOGIT_BITS, rounded_logit_attention
from tqai.backends.base import Attended, ExactTokens
from tqai.backends.torch_ops.attention import attend as attend_exact
from tqai.integrations.transformers.handles import KeyHandle, KeyValuePair, ValueHandle, plain

__all__ = ["NAME", "register"]

NAME = "tqai"
SEES_ALL = "_tqai_sees_all"
"""Attribute of a mask tensor of a one-token step: whether it is True everywhere."""


def register() -> None:
    """Make "tqai" known to transformers as an attention implementation. Harmless when repeated."""
    AttentionInterface.register(NAME, tqai_attention)
    AttentionMaskInterface.register(NAME, tqai_mask)


@torch.compiler.disable
def tqai_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` `[batch, query_heads, new_tokens, head_dim]` as transformers calls it.

    Returns `[batch, new_tokens, query_heads, value_head_dim]` and None for the weights, which are
    never formed.
    """
    pair = _pair_of(key, value)
    if pair is not None and getattr(pair.store, "wants_query", False):
        pair.store.see_query(query)
    plan = None if pair is None else getattr(pair.store, "plan", None)
    if pair is not None and plan is not None:
        plan.show_query(pair.store, query, query.shape[-1] ** -0.5 if scaling is None else scaling)
    unusual = kwargs.get("position_bias") is not None or (
        attention_mask is not None and attention_mask.dtype != torch.bool
    )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, sink_logits = kwargs.get("softcap"), kwargs.get("s_aux")
    logit_bits = getattr(module, LOGIT_BITS, None)
    if logit_bits is not None and not unusual:
        key, value = plain(key), plain(value)
        mask = _explicit_mask(module, query, key.shape[2], attention_mask, kwargs)
        out = rounded_logit_attention(query, key, value, mask, scaling, softcap, sink_logits, logit_bits)
        return out.transpose(1, 2).contiguous(), None
    if pair is None or unusual or (pair.step.is_exact and softcap is None and sink_logits is None):
        key, value = plain(key), plain(value)
        if (softcap is None and sink_logits is None) or unusual:
            return _sdpa(module, query, key, value, attention_mask, scaling, dropout, kwargs)
        mask = _explicit_mask(module, query, key.shape[2], attention_mask, kwargs)
        attended = attend_exact(query, None, None, ExactTokens(key, value), mask, scaling, softcap)
    else:
        mask = _explicit_mask(module, query, pair.step.tokens, attention_mask, kwargs)
        # only learned sinks read the log-sum-exp, and offsets make it cost something
        without = sink_logits is None and getattr(pair.step, "offsets", None) is not None
        options = {"with_lse": False} if without else {}
        attended = pair.store.attend(pair.step, query, mask, scaling, softcap, **options)
    return _with_sink_logits(attended, sink_logits).transpose(1, 2).contiguous(), None


def tqai_mask(
    *args: Any,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a step: None where it is plainly causal, else bool `[batch, 1, new_tokens, tokens]`.

    transformers leaves the mask out for one-token steps and whole prompts; here also for a chunk
    that continues a cache, whose mask would have chunk times history elements. A local mask (sliding
    or chunked, which cannot be told apart here) is written out as soon as a token is out of sight;
    for one-token steps it is marked where it hides nothing, so that attention on codes can ignore it.
    """
    rest = {"mask_function": mask_function, "attention_mask": attention_mask, "local_size": local_size}
    skips = {
        "allow_is_causal_skip": allow_is_causal_skip,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
    }
    query_length: Any = kwargs.get("q_length")
    kv_length: Any = kwargs.get("kv_length")
    query_offset, kv_offset = kwargs.get("q_offset", 0), kwargs.get("kv_offset", 0)
    plain_numbers = all(isinstance(n, int) for n in (query_length, kv_length, query_offset, kv_offset))
    if (
        not args
        and plain_numbers
        and allow_is_causal_skip
        and not allow_is_bidirectional_skip
        and not torch.compiler.is_compiling()
        and query_offset + query_length == kv_offset + kv_length
        and (local_size is None or (kv_offset == 0 and kv_length < local_size))
        and _hides_nothing(attention_mask, kv_offset + kv_length)
    ):
        return None
    mask: Tensor | None = sdpa_mask(*args, **rest, **skips, **kwargs)
    compiling = torch.compiler.is_compiling()
    if mask is None and query_length != kv_length and query_length != 1:
        # the prompt of a static cache, whose room is larger than it: written out, because no mask means
        # here that the queries are the newest tokens
        mask = sdpa_mask(*args, **rest, **{**skips, "allow_is_causal_skip": False}, **kwargs)
    elif mask is not None and query_length == 1 and local_size is not None and not compiling:
        setattr(mask, SEES_ALL, bool(mask.all()))
    return mask


def _hides_nothing(padding: Tensor | None, tokens: int) -> bool:
    """Whether a padding mask `[batch, tokens]` hides no token; what it is too short for is hidden."""
    return padding is None or (padding.shape[-1] >= tokens and bool(padding.all()))


def _pair_of(key: Any, value: Any) -> KeyValuePair | None:
    if isinstance(key, KeyHandle) and isinstance(value, ValueHandle) and key.pair is value.pair:
        return key.pair
    return None


def _explicit_mask(
    module: nn.Module, query: Tensor, tokens: int, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """The mask for `Backend.attend`: None means causal there, so "no mask" must be written out for
    modules that are not causal."""
    new_tokens = query.shape[2]
    if mask is not None:
        return None if getattr(mask, SEES_ALL, False) else mask[..., :tokens]
    if new_tokens > 1 and not _is_causal(module, kwargs):
        return torch.ones((1, 1, new_tokens, tokens), dtype=torch.bool, device=query.device)
    return None


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    new_tokens, tokens = query.shape[2], key.shape[2]
    if mask is None and 1 < new_tokens < tokens and _is_causal(module, kwargs):
        # SDPA's own causal mask starts at the upper left corner; a chunk ends at the lower right
        mask = torch.ones((new_tokens, tokens), dtype=torch.bool, device=query.device)
        mask = mask.tril(tokens - new_tokens)[None, None]
    out, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out, None


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _with_sink_logits(attended: Attended, sink_logits: Tensor | None) -> Tensor:
    """Attention when every head has one more logit without a value (learned sinks, as in GPT-OSS)."""
    if sink_logits is None:
        return attended.out
    share = torch.sigmoid(attended.lse - sink_logits.float().reshape(1, -1, 1))
    return (attended.out.float() * share.unsqueeze(-1)).to(attended.out.dtype)
