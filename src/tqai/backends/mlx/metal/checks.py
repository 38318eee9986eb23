"""The check at first use: on the machine at hand, a kernel must agree with the MLX operations.

The kernels were never run on Metal by those who wrote them (docs/mlx.md), so nobody should have to trust
them. A kernel that differs, or that Metal does not compile, is turned off for this process and said so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from tqai.backends.mlx import pages
from tqai.backends.mlx.attention import empty_partial, history_partial
from tqai.backends.mlx.metal import launch
from tqai.core.page import PAGE_TOKENS, PageFormat

__all__ = ["attend_is_right", "encode_is_right"]

Array = Any

logger = logging.getLogger("tqai")

HEADS, PAGES = 2, 3
FIRST, LAST = 5, 150
MAX_ATTENTION_ERROR = 1e-4
MAX_DIFFERENT_BYTES = 1e-3
"""Share of bytes: a coordinate within rounding of a boundary may fall to either side."""


@lru_cache(maxsize=64)
def encode_is_right(page_format: PageFormat) -> bool:
    """Whether the encoding kernel makes the records that MLX operations make, of a random case."""

    def differs() -> str | None:
        keys, values = _drawn(page_format)
        found = launch.encode_with_kernel(keys, values, page_format)
        wanted = pages.encode_pages(keys, values, page_format)
        share = float((found != wanted).astype(mx.float32).mean())
        return None if share <= MAX_DIFFERENT_BYTES else f"{share:.1%} of the bytes differ"

    return _agrees("encoding", differs)


@lru_cache(maxsize=64)
def attend_is_right(page_format: PageFormat, rows: int) -> bool:
    """Whether the attention kernel finds what MLX operations find, of a random case."""

    def differs() -> str | None:
        slab = pages.encode_pages(*_drawn(page_format), page_format)[None]
        head_dim, value_dim = page_format.key.spec.head_dim, page_format.value.spec.head_dim
        query = mx.random.normal((1, HEADS, rows, 1, head_dim), key=mx.random.key(3)) * head_dim**-0.5
        state = empty_partial(query, value_dim)
        ranges = mx.array([[FIRST, LAST]], dtype=mx.int32)
        found = launch.add_slab(state, query, slab, page_format, ranges)
        columns = mx.arange(PAGES * PAGE_TOKENS)
        seen = ((columns >= FIRST) & (columns < LAST))[None, None, None, None]
        wanted, _ = history_partial(state, query, [slab], page_format, seen, 0, None)
        error = max(
            float(mx.linalg.norm(a - b) / mx.linalg.norm(b))
            for a, b in (
                (found.coded / found.total[..., None], wanted.coded / wanted.total[..., None]),
                (found.top + mx.log(found.total), wanted.top + mx.log(wanted.total)),
            )
        )
        return None if error <= MAX_ATTENTION_ERROR else f"relative error {error:.1e}"

    return _agrees("attention", differs)


def _drawn(page_format: PageFormat) -> tuple[Array, Array]:
    sides = []
    for side, codec in enumerate((page_format.key, page_format.value)):
        shape = (HEADS, PAGES, PAGE_TOKENS, codec.spec.head_dim)
        sides.append(mx.random.normal(shape, key=mx.random.key(side)))
    return sides[0], sides[1]


def _agrees(name: str, differs: Callable[[], str | None]) -> bool:
    try:
        problem = differs()
    except Exception as error:  # whatever Metal's compiler raises
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        logger.warning(
            "the Metal kernel for %s is turned off: it does not agree with MLX operations on this machine "
            "(%s); tqai goes on without it, please report this",
            name,
            problem,
        )
    return problem is None
