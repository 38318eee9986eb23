"""What a layer refuses before it changes anything: tokens that do not fit, NaN and inf."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tqai.backends.base import ExactTokens
from tqai.errors import InputError, NonFiniteError

__all__ = ["check_tokens"]


def check_tokens(
    keys: Tensor, values: Tensor, held: ExactTokens | None, finite: bool | None, layer: int, length: int
) -> None:
    """Look at new tokens of `layer`, which has seen `length` and holds tokens like `held`.

    `finite` is `CacheConfig.check_finite`.

    Raises:
        InputError: shapes or dtypes differ from each other or from the tokens held.
        NonFiniteError: NaN or inf, where `finite` says to look.
    """
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise InputError(
            f"keys {list(keys.shape)} and values {list(values.shape)}: expected "
            "[batch, kv_heads, tokens, head_dim], alike but for head_dim"
        )
    if not keys.is_floating_point() or keys.dtype != values.dtype:
        raise InputError(f"keys {keys.dtype} and values {values.dtype}: expected one floating dtype")
    if held is not None:
        for name, new, old in zip(("keys", "values"), (keys, values), held, strict=True):
            same_shape = new.shape[:2] == old.shape[:2] and new.shape[3] == old.shape[3]
            if not same_shape or new.dtype != old.dtype:
                raise InputError(
                    f"{name} {list(new.shape)} {new.dtype} do not continue layer {layer}, "
                    f"which holds [{old.shape[0]}, {old.shape[1]}, tokens, {old.shape[3]}] {old.dtype}"
                )
    if finite or (finite is None and keys.device.type == "cpu"):
        for name, new in (("keys", keys), ("values", values)):
            # one reduction instead of two passes; a sum that merely overflows is looked at closely
            if math.isfinite(new.detach().sum()):
                continue
            good = torch.isfinite(new)
            if not good.all():
                bad = int((~good).any(-1).any(1).any(0).nonzero()[0])
                raise NonFiniteError(
                    f"{name} of layer {layer} hold NaN or inf at token {length + bad}; "
                    "check_finite=False lets them pass and keeps them in their own token"
                )
