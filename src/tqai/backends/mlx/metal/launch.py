"""Which of the Metal kernels and the MLX operations serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tqai.backends.mlx.pages import encode_pages
from tqai.core.page import PageFormat

__all__ = ["encode_pages", "history_reader"]

Array = Any


def history_reader(
    slabs: Sequence[Array], page_format: PageFormat, starts: Sequence[int], stops: Sequence[int]
) -> Callable[..., Any] | None:
    """None: attention in MLX operations."""
    return None
