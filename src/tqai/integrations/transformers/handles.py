"""Handles: what a layer's `update` returns in place of key and value tensors.

The attention function registered by tqai reads the step behind a handle and computes on the codes.
Any other code that touches a handle (an attribute, an operator, a torch function) gets the
decompressed tensor instead: models that work on keys or values between `update` and attention keep
working, one layer's tensors at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tqai.backends.base import ExactTokens
from tqai.cache.layer import CompressedLayer
from tqai.cache.step import Step

__all__ = ["KeyHandle", "KeyValuePair", "ValueHandle", "plain"]


class KeyValuePair:
    """The keys and values of one step of one layer, decompressed at most once."""

    def __init__(self, store: CompressedLayer, step: Step) -> None:
        self.store = store
        self.step = step
        self._tokens: ExactTokens | None = None

    def tokens(self) -> ExactTokens:
        """The decompressed tensors `[batch, kv_heads, tokens, head_dim]`."""
        if self._tokens is None:
            self._tokens = self.store.materialize(self.step)
        return self._tokens

    def handles(self) -> tuple[KeyHandle, ValueHandle]:
        """The pair that `update` returns."""
        return KeyHandle(self), ValueHandle(self)


class _Handle:
    """Stands for a tensor; see the module's text."""

    def __init__(self, pair: KeyValuePair) -> None:
        self.pair = pair

    def tensor(self) -> Tensor:
        """The decompressed tensor."""
        raise NotImplementedError

    def _like(self) -> Tensor:
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        batch, heads, _, dim = self._like().shape
        return torch.Size((batch, heads, self.pair.step.tokens, dim))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> torch.dtype:
        return self._like().dtype

    @property
    def device(self) -> torch.device:
        return self._like().device

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = tuple(_deep_plain(argument) for argument in args)
        return func(*args, **{name: _deep_plain(value) for name, value in (kwargs or {}).items()})


class KeyHandle(_Handle):
    """Stands for the keys."""

    def tensor(self) -> Tensor:
        return self.pair.tokens().keys

    def _like(self) -> Tensor:
        return self.pair.step.recent.keys


class ValueHandle(_Handle):
    """Stands for the values."""

    def tensor(self) -> Tensor:
        return self.pair.tokens().values

    def _like(self) -> Tensor:
        return self.pair.step.recent.values


def plain(value: Any) -> Any:
    """The tensor behind a handle; anything else as it is."""
    return value.tensor() if isinstance(value, _Handle) else value


def _deep_plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and any(isinstance(item, _Handle) for item in value):
        return type(value)(plain(item) for item in value)
    return plain(value)


def _forward_operator(name: str) -> None:
    def operator(self: _Handle, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*(plain(argument) for argument in args))

    operator.__name__ = name
    setattr(_Handle, name, operator)


for _name in ("getitem", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "rmatmul", "neg"):
    _forward_operator(f"__{_name}__")
