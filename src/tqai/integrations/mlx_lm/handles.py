"""Handles: what a cache's `update_and_fetch` returns instead of arrays.

The attention function that `patch` puts into the model's module reads the step behind a handle and
computes on the codes. Other code that touches a handle with an operator or an attribute gets the
decompressed array instead, one layer's at a time. Functions of MLX do not take handles; a model that
calls them on keys or values between update and attention is found by `patch`, and gets arrays.
"""

from __future__ import annotations

from typing import Any

from tqai.backends.base import ExactTokens
from tqai.integrations.mlx_lm.step import Step

__all__ = ["Handle", "StepTokens", "handles_of"]

Array = Any


class StepTokens:
    """The keys and values of one step, decompressed at most once."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self._tokens: ExactTokens | None = None

    def tokens(self) -> ExactTokens:
        """The decompressed arrays `[batch, kv_heads, tokens, head_dim]`."""
        if self._tokens is None:
            self._tokens = self.step.materialize()
        return self._tokens


class Handle:
    """Stands for the keys (`side` 0) or the values (1) of a step; see the module's text."""

    def __init__(self, pair: StepTokens, side: int) -> None:
        self.pair = pair
        self.side = side

    def array(self) -> Array:
        """The decompressed array."""
        return self.pair.tokens()[self.side]

    @property
    def shape(self) -> tuple[int, ...]:
        batch, heads, _, dim = self.pair.step.recent[self.side].shape
        return batch, heads, self.pair.step.tokens, dim

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> Any:
        return self.pair.step.recent[self.side].dtype

    def __mlx_array__(self) -> Array:
        return self.array()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.array(), name)


def handles_of(step: Step) -> tuple[Handle, Handle]:
    """Keys and values of a step, as `update_and_fetch` returns them."""
    pair = StepTokens(step)
    return Handle(pair, 0), Handle(pair, 1)


def _forward_operator(name: str) -> None:
    def operator(self: Handle, *args: Any) -> Any:
        plain = (x.array() if isinstance(x, Handle) else x for x in args)
        return getattr(self.array(), name)(*plain)

    operator.__name__ = name
    setattr(Handle, name, operator)


for _name in ("getitem", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "rmatmul", "neg"):
    _forward_operator(f"__{_name}__")
