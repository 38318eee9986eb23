"""Which pages the sequences of a step see: known to the host, or on the device only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqai.core.page import PAGE_TOKENS

__all__ = ["DeviceRows", "HeldPages", "PageTable", "within_rows"]


@dataclass
class HeldPages:
    """The pages of one sequence in the layers of one kind.

    Attributes:
        ids: of all of its pages so far, in order.
        gone: the first so many were given back, as no token sees them any more.
    """

    ids: list[int] = field(default_factory=list)
    gone: int = 0

    @property
    def live(self) -> list[int]:
        """Those that are held."""
        return self.ids[self.gone :]


class PageTable:
    """The pages that the sequences of one step see, alike for every layer.

    Attributes:
        ids: host int32 `[batch, pages]`, 0 beyond a sequence's count.
        on_device: the same as int64 on the device.
        counts: int32 on the device `[batch]`.
        dense: every sequence has all pages.
    """

    def __init__(self, rows: list[list[int]], device: torch.device, at_least: int = 0) -> None:
        pages = max((len(row) for row in rows), default=0)
        pages = max(pages, at_least)
        self.ids = np.zeros((len(rows), pages), dtype=np.int32)
        for index, row in enumerate(rows):
            self.ids[index, : len(row)] = row
        lengths = [len(row) for row in rows]
        self.on_device = torch.from_numpy(self.ids.astype(np.int64)).to(device)
        self.counts = torch.tensor(lengths, dtype=torch.int32).to(device)
        self.dense = all(length == pages for length in lengths)

    @property
    def pages(self) -> int:
        """Pages of the longest sequence."""
        return int(self.ids.shape[1])


@dataclass(frozen=True)
class DeviceRows:
    """Sequences whose pages and lengths are known on the device only when a step runs (`attend_rows`).

    Attributes:
        table: int64 `[rows, room]`, page numbers; anything beyond a row's count.
        page_counts: int32 `[rows]`.
        exact_counts: int32 `[rows]`, exact tokens of each row, the first of its slot; at least 1.
        host_table: `table` on the host, for backends that read it there.
    """

    table: Tensor
    page_counts: Tensor
    exact_counts: Tensor
    host_table: NDArray[np.int64]


def within_rows(rows: DeviceRows, exact: int) -> Tensor:
    """bool `[rows, 1, 1, pages * 64 + exact]`: what is within the lengths."""
    device = rows.page_counts.device
    parts = []
    for most, counts in (
        (rows.table.shape[1] * PAGE_TOKENS, rows.page_counts * PAGE_TOKENS),
        (exact, rows.exact_counts),
    ):
        parts.append(torch.arange(most, device=device) < counts[:, None])
    return torch.cat(parts, dim=1)[:, None, None]
