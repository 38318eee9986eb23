"""`DecodeStep`: one token of every running request, in a step that is launched, not replayed
(`decode_graphs`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens
from tqai.core.page import PAGE_TOKENS
from tqai.server.engine.page_table import HeldPages, PageTable

if TYPE_CHECKING:
    from tqai.server.engine.store import TokenStore

__all__ = ["DecodeRow", "DecodeStep"]


@dataclass(frozen=True)
class DecodeRow:
    """One running request in a decode step, which lies in the slot of the row's number.

    Attributes:
        position: of the token that is fed.
        held: its complete pages before the step, of each kind.
        new_pages: id of the page that the step completes, of each kind, or None.
    """

    position: int
    held: list[HeldPages]
    new_pages: list[int] | None

    @property
    def pages(self) -> list[int]:
        """Those of the layers that see farthest."""
        return self.held[0].ids


class DecodeStep:
    """One token of each of `given`; the tensors of the model may have more rows, which are padding."""

    def __init__(self, store: TokenStore, given: list[DecodeRow]) -> None:
        self.store, self.given, self.rows = store, given, len(given)

    def prepare(self) -> None:
        """What a step needs that is not a graph (`decode_graphs`)."""
        store, rows = self.store, self.given
        device = store.device
        self.places = torch.tensor([store.place_of(row.position) for row in rows]).to(device)
        self.row_index = torch.arange(len(rows), device=device)
        self._positions = torch.tensor([row.position for row in rows])
        # position of the token that each exact place stands for; -1 where there is none
        place = torch.arange(store.exact[0].keys.shape[2])
        pages = torch.tensor([len(row.pages) for row in rows])[:, None]
        held = torch.where(place < store.sinks, place, place + pages * PAGE_TOKENS)
        self._exact_positions = torch.where(held <= self._positions[:, None], held, -1)
        self._seen: list[tuple[PageTable, Tensor]] = []
        for number, kind in enumerate(store.kinds):
            live = [row.held[number].live for row in rows]
            table = PageTable(live, device, at_least=1)
            gone = torch.tensor([row.held[number].gone for row in rows])[:, None]
            counts = torch.tensor([len(ids) for ids in live])[:, None]
            column = torch.arange(table.pages * PAGE_TOKENS)
            coded = store.sinks + gone * PAGE_TOKENS + column
            coded = torch.where(column < counts * PAGE_TOKENS, coded, -1)
            columns = torch.cat([coded, self._exact_positions], dim=1)
            seen = columns >= 0
            if kind.sliding_window is not None:
                seen &= columns > self._positions[:, None] - kind.sliding_window
            self._seen.append((table, seen[:, None, None].to(device)))

    def update(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See `RaggedStore.update`."""
        store, rows = self.store, self.rows
        new = ExactTokens(keys[:rows], values[:rows])
        offsets = store.offsets[layer]
        if offsets is not None:
            new = offsets.rows(0, rows).taken_off(new)
        for held, part in zip(store.exact[layer], new, strict=True):
            held[self.row_index, :, self.places] = part[:, :, 0]

    def attend_layer(self, layer: int, query: Tensor, scaling: float, softcap: float | None) -> Attended:
        """See `RaggedStore.attend_layer`; rows of padding get zeros."""
        store, rows = self.store, self.rows
        recent = ExactTokens(*(part[:rows] for part in store.exact[layer]))
        table, mask = self._seen[store.kind_of[layer]]
        slab, state, given = store.slabs[layer], store.offsets[layer], query[:rows]
        offsets = None if state is None else state.rows(0, rows)
        asked = given if offsets is None else offsets.for_query(given)
        done = store.codes[layer].attend(asked, slab, table, None, recent, mask, scaling, softcap)
        if offsets is not None:
            with_lse = scaling if store.shape.sink_logits else None
            done = offsets.corrected(done, given, with_lse, masked=False)
        if rows == query.shape[0]:
            return done
        out = done.out.new_zeros((query.shape[0], *done.out.shape[1:]))
        lse = done.lse.new_zeros((query.shape[0], *done.lse.shape[1:]))
        out[:rows], lse[:rows] = done.out, done.lse
        return Attended(out, lse)
