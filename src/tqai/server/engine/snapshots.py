"""What a sequence's state after a chunk is beside its pages, kept for those that begin alike.

A request that finds a prefix goes on from exactly the state that it would have computed. That is more than
pages where there are sinks, a window, offsets or sliding layers:

    exact tokens and offsets   copied into pages of their own, one layer's into its row of the slab:
                               | keys S + W | values S + W | key offset | value offset | factors | spare |
    sliding layers             the pages in sight, held once more, not copied
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tqai.server.engine.page_table import HeldPages
from tqai.server.engine.store import TokenStore

__all__ = ["Snapshot", "Snapshots"]


@dataclass(frozen=True)
class Snapshot:
    """The state after a chunk.

    Attributes:
        stored: of each kind of layer, the pages that hold a copy of its exact tokens and offsets.
        sight: of each kind, its pages at that place; None where a layer sees all, whose pages belong to
            the chunks.
    """

    stored: list[list[int]]
    sight: list[HeldPages | None]

    def pages(self, kind: int) -> list[int]:
        """All pages of one kind that this holds, each once."""
        held = self.sight[kind]
        return self.stored[kind] + ([] if held is None else held.live)


class Snapshots:
    """Makes them of the staging slot and brings them back there."""

    def __init__(self, store: TokenStore) -> None:
        self.store = store
        self.stored_pages = [
            max(
                -(-sum(part.nbytes for part in self._parts(layer)) // self._page_bytes(layer))
                for layer in kind.layers
            )
            for kind in store.kinds
        ]

    @property
    def are_needed(self) -> bool:
        """Whether pages alone are not the state."""
        return any(self.stored_pages) or any(kind.sliding_window is not None for kind in self.store.kinds)

    @torch.inference_mode()
    def take(self, held: list[HeldPages]) -> Snapshot | None:
        """The state of the staging slot, whose sequence has the pages `held` and has just computed a whole
        chunk; None where there are no pages for it."""
        store = self.store
        if any(pool.free < count for pool, count in zip(store.pools, self.stored_pages, strict=True)):
            return None
        stored = [pool.take(count) for pool, count in zip(store.pools, self.stored_pages, strict=True)]
        sight: list[HeldPages | None] = []
        for kind, pool, pages in zip(store.kinds, store.pools, held, strict=True):
            if kind.sliding_window is None:
                sight.append(None)
                continue
            pool.hold(pages.live)
            sight.append(HeldPages([0] * pages.gone + pages.live, pages.gone))
        for kind, ids in zip(store.kinds, stored, strict=True):
            rows = torch.tensor(ids, dtype=torch.long).to(store.device)
            for layer in kind.layers if ids else ():
                slab = store.slabs[layer]
                raw = torch.cat(
                    [part.contiguous().view(torch.uint8).flatten() for part in self._parts(layer)]
                )
                whole = raw.new_zeros(len(ids) * self._page_bytes(layer))
                whole[: len(raw)] = raw
                slab.index_copy_(0, rows, whole.view(len(ids), *slab.shape[1:]))
        return Snapshot(stored, sight)

    @torch.inference_mode()
    def restore(self, snapshot: Snapshot) -> None:
        """Make the staging slot what it was."""
        store = self.store
        for kind, ids in zip(store.kinds, snapshot.stored, strict=True):
            rows = torch.tensor(ids, dtype=torch.long).to(store.device)
            for layer in kind.layers if ids else ():
                raw, at = store.slabs[layer].index_select(0, rows).flatten(), 0
                for part in self._parts(layer):
                    part.copy_(raw[at : at + part.nbytes].view(part.dtype).view(part.shape))
                    at += part.nbytes
        store.frozen[store.staging] = True

    def release(self, snapshot: Snapshot) -> None:
        """Hold its pages no more."""
        for number, pool in enumerate(self.store.pools):
            pool.release(snapshot.pages(number))

    def _page_bytes(self, layer: int) -> int:
        return int(self.store.slabs[layer].stride(0))

    def _parts(self, layer: int) -> list[Tensor]:
        """What is kept of a layer, views of the staging slot."""
        store = self.store
        parts = [part[store.staging, :, : store.lead] for part in store.exact[layer]] if store.lead else []
        state = store.offsets[layer]
        if state is not None:
            parts += [
                part for part in state.rows(store.staging, store.staging + 1).parts() if part is not None
            ]
        return parts
