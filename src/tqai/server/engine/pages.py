"""`PagePool`: a fixed number of pages, each one row in the slab of every layer.

One number therefore counts the memory of all layers: a page id stands for 64 tokens of a sequence
throughout the model. Ids are handed out and counted by reference: a request holds its own pages, the
prefix cache holds those that it may hand on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tqai.errors import ConfigError
from tqai.server.engine.model import LayerShape
from tqai.server.engine.page_codes import PageCodes

__all__ = ["PagePool"]


class PagePool:
    """See the module's text.

    Attributes:
        slabs: per layer, uint8 `[pages, kv_heads, page_bytes]`.
        whole: all of them, `[layers, pages, kv_heads, page_bytes]`, where they are of one size; else None.
        references: holders of each page; 0 is free.
    """

    def __init__(
        self, codes: list[PageCodes], shapes: tuple[LayerShape, ...], pages: int, device: torch.device
    ) -> None:
        if pages < 1:
            raise ConfigError(f"a pool of {pages} pages: at least 1 is needed, give the cache more memory")
        self.pages = pages
        sizes = [(pages, shape.kv_heads, code.page_bytes) for code, shape in zip(codes, shapes, strict=True)]
        self.whole: Tensor | None = None
        if len(set(sizes)) == 1:
            self.whole = torch.empty((len(sizes), *sizes[0]), dtype=torch.uint8, device=device)
        self.slabs: list[Tensor] = (
            [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
            if self.whole is None
            else list(self.whole.unbind(0))
        )
        self.references = [0] * pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.pages - len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return sum(slab[0].numel() for slab in self.slabs)

    def take(self, count: int) -> list[int]:
        """`count` free pages, held once each. The caller has made sure that there are so many."""
        if count > len(self._free):
            raise RuntimeError(f"{count} pages wanted, {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self.references[page] = 1
        return taken

    def hold(self, pages: list[int]) -> None:
        """One more holder of each page."""
        for page in pages:
            if self.references[page] < 1:
                raise RuntimeError(f"page {page} is free and cannot be shared")
            self.references[page] += 1

    def release(self, pages: list[int]) -> None:
        """One holder less of each page; without holders it is free."""
        for page in pages:
            if self.references[page] < 1:
                raise RuntimeError(f"page {page} is released more often than it was held")
            self.references[page] -= 1
            if self.references[page] == 0:
                self._free.append(page)
