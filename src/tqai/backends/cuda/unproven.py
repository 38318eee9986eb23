"""Which kernels are used only on request: those that have passed their tests on the CPU and no GPU has run.

Each compares itself with a proven path at first use, but no comparison survives an illegal memory access,
so they stay off until `make test-gpu` has passed with them.
"""

from __future__ import annotations

import os

__all__ = ["VARIABLE", "unproven_kernels"]

VARIABLE = "TQAI_CUDA_UNPROVEN"


def unproven_kernels() -> bool:
    """Whether `encode_mma.cu` may be used: the environment's TQAI_CUDA_UNPROVEN is neither empty nor "0".
    Without it codes are made by the general kernel."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")
