"""numpy in, numpy out; torch in, torch out: what the quantizers do around their float64 arithmetic.

torch is never imported here: a tensor can only come from a caller who has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqai.errors import InputError

__all__ = ["Array", "Frame", "as_real", "check_codes", "to_host", "to_kind_of", "torch_of"]

Array = Any
BLOCK_VALUES = 1 << 21


class Frame:
    """An input array with what its results need: kind, device (another than its own where `device` names
    one), leading axes, float dtype."""

    def __init__(self, array: Array, dim: int | None = None, device: str | None = None) -> None:
        self.torch = torch_of(array)
        self.device = device
        self.array: Array = array
        if self.torch is None:
            self.array = np.asarray(array)
        shape = tuple(int(size) for size in self.array.shape)
        if self.torch is None:
            is_float = np.issubdtype(self.array.dtype, np.floating)
        else:
            is_float = bool(array.is_floating_point())
        if not is_float:
            raise InputError(f"dtype {self.array.dtype}: a float dtype is wanted")
        if dim is not None and (not shape or shape[-1] != dim):
            raise InputError(f"shape {list(shape)}: [..., {dim}] is wanted")
        self.shape = shape
        double = np.dtype(np.float64) if self.torch is None else self.torch.float64
        self.real: type[np.floating] = np.float64 if self.array.dtype == double else np.float32

    def blocks(self) -> Iterator[NDArray[np.float64]]:
        """The vectors as float64 `[rows, dim]`, a bounded number at a time, at least one block."""
        dim = self.shape[-1]
        flat = self.array.reshape(-1, dim)
        step = max(BLOCK_VALUES // dim, 1)
        for start in range(0, max(len(flat), 1), step):
            yield to_host(flat[start : start + step]).astype(np.float64)

    def whole(self) -> NDArray[np.float64]:
        """The array as float64 on the host."""
        return to_host(self.array).astype(np.float64)

    def stack(self, parts: list[NDArray[Any]], *last: int) -> Array:
        """Results of `blocks`, joined, with the leading axes of the input."""
        return self.leave(np.concatenate(parts).reshape((*self.shape[:-1], *last)))

    def leave(self, result: NDArray[Any]) -> Array:
        """A result as the input's kind, on its device."""
        return to_kind_of(self.array, result, self.device)


def torch_of(array: Array) -> Any:
    """The torch module if `array` is its tensor, else None; never imports it."""
    torch = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", None)
    return torch if tensor is not None and isinstance(array, tensor) else None


def to_host(array: Array) -> NDArray[Any]:
    """`array` as numpy on the host; torch floats become float64, as numpy has no bfloat16."""
    torch = torch_of(array)
    if torch is None:
        return np.asarray(array)
    tensor = array.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float64)
    out: NDArray[Any] = tensor.numpy()
    return out


def to_kind_of(like: Array, result: NDArray[Any], device: str | None = None) -> Array:
    """`result` as a tensor on `device` (None: that of `like`) if `like` is a tensor, else as it is."""
    torch = torch_of(like)
    if torch is None:
        return np.asarray(result)
    return torch.from_numpy(np.asarray(result, order="C")).to(like.device if device is None else device)


def as_real(values: NDArray[np.floating], real: type[np.floating]) -> NDArray[np.floating]:
    """`values` in a float dtype, what exceeds its range becoming its largest number."""
    largest = np.finfo(real).max
    out: NDArray[np.floating] = np.asarray(np.clip(values, -largest, largest), dtype=real)
    return out


def check_codes(name: str, codes: NDArray[Any], shape: tuple[int, ...]) -> None:
    """InputError unless `codes` are whole numbers of that shape."""
    if not np.issubdtype(codes.dtype, np.integer):
        raise InputError(f"{name} have dtype {codes.dtype}: whole numbers are wanted")
    if codes.shape != shape:
        raise InputError(f"{name} have shape {list(codes.shape)}: {list(shape)} is wanted")
