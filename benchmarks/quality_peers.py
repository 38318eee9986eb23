"""The peer of the study that `tqai.evaluation` does not make: the cache of the package turboquant."""

from __future__ import annotations

from typing import Any

import numpy as np

from tqai.errors import UnsupportedError
from tqai.evaluation import CacheMaker

__all__ = ["PEER_KINDS", "turboquant_maker"]

PEER_KINDS = ("fp8", "quanto", "hqq", "turboquant")


def turboquant_maker(name: str) -> CacheMaker:
    """Maker of "turboquant-4" and so on: `TurboQuantCache` of turboquant 0.2.0, newest 128 tokens exact.

    Raises:
        UnsupportedError: the package is not installed.
    """
    bits = int(name.partition("-")[2])
    try:
        from turboquant import TurboQuantCache
    except ImportError as error:
        raise UnsupportedError(f"{name} needs turboquant 0.2.0: {error}") from error

    if not hasattr(np, "trapz"):  # which it calls, and numpy 2.4 has no more
        np.trapz = np.trapezoid  # type: ignore[attr-defined]  # noqa: NPY201

    def make() -> Any:
        return TurboQuantCache(bits=bits)

    return CacheMaker(name, "turboquant", make, {"bits": bits})
