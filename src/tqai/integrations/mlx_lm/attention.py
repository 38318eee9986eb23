"""Attention on handles, and its place in the modules of mlx-lm's models.

Model modules import `scaled_dot_product_attention` by name, so it is replaced in each module of a patched
model, and given back when the last model of that module is unpatched. Given plain arrays (another cache,
no cache) the replacement is mlx-lm's own function.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

from tqai.backends.base import Attended
from tqai.backends.mlx.attention import attend
from tqai.backends.mlx.metal.launch import history_reader
from tqai.integrations.mlx_lm.handles import Handle
from tqai.integrations.mlx_lm.step import Step

__all__ = ["NAME", "attend_step", "is_replaced", "modules_of", "put_back", "replace", "standard_mask"]

Array = Any

NAME = "scaled_dot_product_attention"
_LOCK = threading.Lock()
_USERS: dict[str, int] = {}
_ORIGINALS: dict[str, Any] = {}
_STANDARD: deque[Any] = deque(maxlen=16)


def standard_mask(mask: Array) -> Array:
    """Remember that `mask`, of a step with one new token, hides nothing but what the columns of the step
    hide anyway; kernels may then go by the columns."""
    _STANDARD.append(mask)
    return mask


def modules_of(model: Any) -> tuple[str, ...]:
    """Names of the modules of the model's classes that call mlx-lm's attention by name."""
    names = {type(part).__module__ for part in model.modules()}
    found = (name for name in sorted(names) if hasattr(sys.modules.get(name), NAME))
    return tuple(name for name in found if not name.startswith("tqai."))


def replace(modules: Iterable[str]) -> None:
    """Put our attention into these modules; it stays until `put_back` was called as often."""
    with _LOCK:
        for name in modules:
            module = sys.modules[name]
            if not _USERS.get(name):
                original = getattr(module, NAME)
                _ORIGINALS[name] = original
                setattr(module, NAME, _replacement(original))
            _USERS[name] = _USERS.get(name, 0) + 1


def put_back(modules: Iterable[str]) -> None:
    """Undo one `replace` of these modules."""
    with _LOCK:
        for name in modules:
            _USERS[name] -= 1
            if not _USERS[name]:
                setattr(sys.modules[name], NAME, _ORIGINALS.pop(name))


def is_replaced(modules: Iterable[str]) -> bool:
    """Whether these modules take handles; False without any."""
    modules = tuple(modules)
    return bool(modules) and all(_USERS.get(name) for name in modules)


def _replacement(original: Any) -> Any:
    def tqai_attention(
        queries: Array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: Any,
        sinks: Array | None = None,
        **others: Any,
    ) -> Array:
        pair = keys.pair if isinstance(keys, Handle) and isinstance(values, Handle) else None
        if pair is None or pair is not values.pair or others:
            keys, values = (x.array() if isinstance(x, Handle) else x for x in (keys, values))
            return original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks, **others)
        step = pair.step
        if step.is_exact and step.columns.uniform:
            # nothing was ever compressed: mlx-lm's own attention, on the raw keys and values
            return original(queries, *step.recent, cache=None, scale=scale, mask=mask, sinks=sinks)
        return _with_sink_logits(attend_step(step, queries, mask, scale), sinks)

    tqai_attention.__wrapped__ = original  # type: ignore[attr-defined]
    return tqai_attention


def attend_step(
    step: Step, queries: Array, mask: Any, scale: float, softcap: float | None = None
) -> Attended:
    """Attention of `queries` `[batch, query_heads, new, head_dim]` over a step.

    `mask` is what mlx-lm's models pass: None, "causal", bool or additive over the tokens in sight.
    """
    columns = step.columns
    new = queries.shape[2]
    natural = mask is None or isinstance(mask, str) or any(mask is known for known in _STANDARD)
    history = None
    if natural and new == 1 and step.slabs and softcap is None:
        history = history_reader(step.slabs, step.page_format, *columns.page_range())
    if mask is None or isinstance(mask, str):
        if columns.new != new:
            # a view of everything held: the queries are its newest tokens
            mask = _lower_right(new, columns.count - columns.hidden)
        else:
            mask = None if columns.is_causal(columns.sliding_window) else columns.mask(None)
            if mask is None and columns.hidden:
                mask = columns.mask(None)
    if columns.hidden:
        while mask.ndim < 4:
            mask = mask[None]
        if mask.dtype == mx.bool_:
            hidden = mx.zeros((*mask.shape[:3], columns.hidden), mx.bool_)
        else:
            hidden = mx.full((*mask.shape[:3], columns.hidden), -mx.inf, mask.dtype)
        mask = mx.concatenate([hidden, mask], axis=-1)
    return attend(
        queries, step.slabs, step.page_format, step.sinks, step.recent, mask, scale, softcap, history
    )


def _lower_right(new: int, count: int) -> Array:
    return (mx.arange(count) <= mx.arange(count - new, count)[:, None])[None, None]


def _with_sink_logits(attended: Attended, sinks: Array | None) -> Array:
    """Attention when every head has one more logit without a value (learned sinks, as in GPT-OSS)."""
    if sinks is None:
        return attended.out
    share = mx.sigmoid(attended.lse - sinks.astype(mx.float32).reshape(1, -1, 1))
    return (attended.out.astype(mx.float32) * share[..., None]).astype(attended.out.dtype)


assert hasattr(base, NAME), "mlx_lm.models.base has no scaled_dot_product_attention"
