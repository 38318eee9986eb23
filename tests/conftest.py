"""What every test shares: deterministic hypothesis, and memory that is poison until it is written."""

import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile(
    "tqai",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tqai")


def poison_numpy(array: np.ndarray) -> np.ndarray:
    """Every byte 0xFF: NaN as a float, -1 as a signed and the largest as an unsigned integer."""
    if array.dtype == np.bool_:
        array[...] = True
    elif array.dtype.kind in "fciu" and array.size:
        array[...] = np.frombuffer(b"\xff" * array.dtype.itemsize, dtype=array.dtype)[0]
    return array


def poison_torch(tensor: Any) -> Any:
    """As `poison_numpy`, for tensors of any device but meta."""
    import torch

    with torch.no_grad():
        if tensor.is_meta or tensor.numel() == 0:
            return tensor
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        limits = torch.iinfo(tensor.dtype)
        return tensor.fill_(limits.max if limits.min == 0 else -1)


@pytest.fixture
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from numpy.empty, torch.empty and their kin holds NaN or 0xFF instead of, by luck, zeros.

    torch is covered where a test has imported it before.
    """

    def poisoned(make: Callable[..., Any], poison: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: poison(make(*args, **kwargs))

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(np, name, poisoned(getattr(np, name), poison_numpy))
    torch = sys.modules.get("torch")
    if torch is not None:
        for name in ("empty", "empty_like", "empty_strided"):
            monkeypatch.setattr(torch, name, poisoned(getattr(torch, name), poison_torch))
        for name in ("new_empty", "new_empty_strided"):
            monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name), poison_torch))
