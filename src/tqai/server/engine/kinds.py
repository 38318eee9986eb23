"""Kinds of layers, by how far they see. Each kind has page ids of its own, so that layers with a sliding
window give pages back that no future token can see, while the others keep theirs.

Page k of a sequence holds tokens S + 64 k to S + 64 k + 63 in every kind; what differs is for how long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tqai.core.page import PAGE_TOKENS
from tqai.errors import ConfigError
from tqai.server.engine.model import LayerShape

__all__ = ["PageKind", "kinds_of", "pool_sizes"]


@dataclass(frozen=True)
class PageKind:
    """Layers whose pages come and go together.

    Attributes:
        sliding_window: tokens in sight, or None for all.
        layers: their numbers, ascending.
        page_bytes: of one page in all of them.
        exact_tokens: sinks and window, which are not in pages: `(sinks, window)`.
    """

    sliding_window: int | None
    layers: tuple[int, ...]
    page_bytes: int
    exact_tokens: tuple[int, int]

    def gone(self, position: int) -> int:
        """How many pages the token at `position`, and every later one, cannot see."""
        if self.sliding_window is None:
            return 0
        return max(position - self.sliding_window - self.exact_tokens[0] + 1, 0) // PAGE_TOKENS

    def most_pages(self, tokens: int, chunk_tokens: int) -> int:
        """Most pages that a sequence of `tokens` tokens holds at a time, on the way there too."""
        pages = max(tokens - sum(self.exact_tokens), 0) // PAGE_TOKENS
        if self.sliding_window is None:
            return pages
        return min(pages, self.pages_in_sight + chunk_tokens // PAGE_TOKENS)

    @property
    def pages_in_sight(self) -> int:
        """Most pages, whole or in part, that a token of a sliding layer sees, and the one in the making."""
        assert self.sliding_window is not None
        return max(self.sliding_window - self.exact_tokens[1], 0) // PAGE_TOKENS + 2


def kinds_of(
    shapes: Sequence[LayerShape], page_bytes: Sequence[int], exact_tokens: tuple[int, int]
) -> list[PageKind]:
    """The kinds of these layers, those that see farthest first; `page_bytes` of one KV head of each."""
    windows = {shape.sliding_window for shape in shapes}
    found = []
    for window in sorted(windows, key=lambda wide: -(1 << 62) if wide is None else -wide):
        layers = tuple(index for index, shape in enumerate(shapes) if shape.sliding_window == window)
        size = sum(shapes[index].kv_heads * page_bytes[index] for index in layers)
        found.append(PageKind(window, layers, size, exact_tokens))
    return found


def pool_sizes(
    kinds: Sequence[PageKind], held_bytes: int, most: int | None, max_running: int, chunk_tokens: int
) -> list[int]:
    """Pages of each kind's pool, `held_bytes` together at most.

    All kinds get equally many, but a sliding kind no more than can be in use: what `max_running` requests
    see, as much again for prefixes that are kept, and two chunks. The rest goes to those that see farther.

    Args:
        most: pages beyond which no kind needs any, or None.

    Raises:
        ConfigError: not one page of each fits.
    """
    left, open_kinds = held_bytes, list(range(len(kinds)))
    sizes = [0] * len(kinds)
    for index in sorted(open_kinds, key=lambda one: kinds[one].sliding_window or 1 << 62):
        share = left // sum(kinds[other].page_bytes for other in open_kinds)
        kind = kinds[index]
        if kind.sliding_window is not None:
            share = min(share, 2 * (max_running * kind.pages_in_sight + chunk_tokens // PAGE_TOKENS))
        sizes[index] = share if most is None else min(share, most)
        left -= sizes[index] * kind.page_bytes
        open_kinds.remove(index)
    if min(sizes) < 1:
        needed = sum(kind.page_bytes for kind in kinds)
        raise ConfigError(f"max_kv_bytes={held_bytes}: one page of 64 tokens takes {needed} bytes")
    return sizes
