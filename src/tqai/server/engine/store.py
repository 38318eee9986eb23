"""`TokenStore`: keys and values of every request, and the decode step that reads and extends them.

Exact tokens of slot s lie in one tensor per layer, `[slots + 1, kv_heads, sinks + ring, head_dim]`; the
last row belongs to the request that is being prefilled:

    | sink 0 .. S-1 | ring: token p at (p - S) mod ring |

A window holds W to W + 63 tokens between steps, so a ring of W + 64, rounded up to whole pages, never
overwrites what is still needed, nothing is ever moved, and page k lies in one piece at 64 k mod ring.
Slots 0 to n-1 are those of the n running requests: a decode step reads a slice.

What a token sees depends on its position alone, however it was computed: tokens S + W + 64 k to
S + W + 64 k + 63 see k compressed pages, the W tokens before them, and each other. Decoding does so by
itself; a prefill step (`prefill_step`) treats the 64-token blocks of its chunk as a ragged batch, in which
each block sees the page of the block before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens
from tqai.core.page import PAGE_TOKENS
from tqai.errors import BackendError
from tqai.server.engine.model import ModelShape
from tqai.server.engine.page_codes import PageCodes, PageTable, page_codes_for
from tqai.server.engine.pages import PagePool
from tqai.server.engine.settings import EngineSettings

__all__ = ["DecodeRow", "DecodeStep", "TokenStore", "page_bytes_of"]


def page_bytes_of(settings: EngineSettings, shape: ModelShape) -> int:
    """Bytes of 64 tokens in all layers."""
    codes = _codes_of(settings, shape)
    return sum(layer.kv_heads * code.page_bytes for layer, code in zip(shape.layers, codes, strict=True))


def _codes_of(settings: EngineSettings, shape: ModelShape) -> list[PageCodes]:
    return [
        page_codes_for(settings.cache_of(index), layer, shape.dtype, shape.device, shape.sink_logits)
        for index, layer in enumerate(shape.layers)
    ]


class TokenStore:
    """See the module's text."""

    def __init__(self, settings: EngineSettings, shape: ModelShape, pages: int) -> None:
        self.settings, self.shape, self.device = settings, shape, shape.device
        self.sinks, self.window = settings.sink_tokens, settings.window_tokens
        self.ring = -(-(self.window + PAGE_TOKENS) // PAGE_TOKENS) * PAGE_TOKENS
        self.codes = _codes_of(settings, shape)
        self.pool = PagePool(self.codes, shape.layers, pages, shape.device)
        # layers of one shape share a tensor, so that what concerns all of them is done at once
        self._groups: list[tuple[list[int], ExactTokens]] = []
        exact: dict[int, ExactTokens] = {}
        rows, room = settings.max_running + 1, self.sinks + self.ring
        for kind in dict.fromkeys(shape.layers):
            members = [index for index, layer in enumerate(shape.layers) if layer == kind]
            whole = ExactTokens(
                *(
                    torch.zeros(
                        (len(members), rows, kind.kv_heads, room, dim), dtype=shape.dtype, device=shape.device
                    )
                    for dim in (kind.key_dim, kind.value_dim)
                )
            )
            self._groups.append((members, whole))
            exact |= {
                index: ExactTokens(*parts)
                for index, *parts in zip(members, *(part.unbind(0) for part in whole), strict=True)
            }
        self.exact = [exact[index] for index in range(len(shape.layers))]
        formats = {getattr(code, "page_format", None) for code in self.codes}
        self._alike = self.pool.whole is not None and len(self._groups) == len(formats) == 1

    @property
    def staging(self) -> int:
        """The slot of the request that is being prefilled."""
        return self.settings.max_running

    @property
    def exact_bytes(self) -> int:
        """Bytes of the exact tokens' tensors, in use or not."""
        return sum(part.nbytes for layer in self.exact for part in layer)

    def pages_after(self, tokens: int) -> int:
        """Pages of a sequence that has seen `tokens` tokens."""
        return max(tokens - self.sinks - self.window, 0) // PAGE_TOKENS

    def place_of(self, position: int) -> int:
        """Where the token at `position` lies among a slot's exact tokens."""
        return position if position < self.sinks else self.sinks + (position - self.sinks) % self.ring

    def move_slot(self, source: int, target: int) -> None:
        """Copy the exact tokens of one slot to another."""
        for _, whole in self._groups:
            for part in whole:
                part[:, target].copy_(part[:, source])

    def swap_slots(self, one: int, other: int) -> None:
        """Exchange the exact tokens of two slots."""
        for _, whole in self._groups:
            for part in whole:
                part[:, [one, other]] = part[:, [other, one]]

    def store_pages(self, layer: int, keys: Tensor, values: Tensor, ids: Tensor) -> None:
        """Encode `[pages, kv_heads, 64, head_dim]` into the pages `ids`."""
        self.codes[layer].store(keys, values, self.pool.slabs[layer], ids)

    def complete_pages(self, rows: list[DecodeRow]) -> None:
        """Encode the pages that a decode step of `rows` completes; their tokens are in the slots."""
        due = [(index, row) for index, row in enumerate(rows) if row.new_page is not None]
        if not due:
            return
        ring_pages = self.ring // PAGE_TOKENS
        places = torch.tensor(
            [[index, len(row.pages) % ring_pages, row.new_page or 0] for index, row in due]
        ).to(self.device, non_blocking=True)
        slots, parts, ids = places.unbind(1)
        if self._alike:
            (_, whole), pool = self._groups[0], self.pool
            assert pool.whole is not None
            # [pages, layers, kv_heads, 64, head_dim]
            taken = [
                part[:, :, :, self.sinks :].unflatten(3, (-1, PAGE_TOKENS))[:, slots, :, parts]
                for part in whole
            ]
            try:
                raw = self.codes[0].encoded(*(part.flatten(0, 1) for part in taken))
            except BackendError:
                pass  # layer by layer, each of which goes on with another backend
            else:
                pool.whole.index_copy_(1, ids, raw.unflatten(0, taken[0].shape[:2]).transpose(0, 1))
                return
        for layer, held in enumerate(self.exact):
            keys, values = (
                part[:, :, self.sinks :].unflatten(2, (-1, PAGE_TOKENS))[slots, :, parts] for part in held
            )
            self.store_pages(layer, keys, values, ids)


@dataclass(frozen=True)
class DecodeRow:
    """One running request in a decode step, which lies in the slot of the row's number.

    Attributes:
        position: of the token that is fed.
        pages: its complete pages before the step.
        new_page: id of the page that the step completes, or None.
    """

    position: int
    pages: list[int]
    new_page: int | None


class DecodeStep:
    """One token of each of `given`; the tensors of the model may have more rows, which are padding."""

    def __init__(self, store: TokenStore, given: list[DecodeRow]) -> None:
        self.store, self.given, self.rows = store, given, len(given)

    def prepare(self) -> None:
        """What a step needs that is not a graph (`decode_graphs`)."""
        store, rows = self.store, self.given
        device, sinks, ring = store.device, store.sinks, store.ring
        self.table = PageTable([row.pages for row in rows], device, at_least=1)
        positions = torch.tensor([row.position for row in rows])
        self.places = torch.tensor([store.place_of(row.position) for row in rows]).to(device)
        self.row_index = torch.arange(len(rows), device=device)
        due = [(index, row) for index, row in enumerate(rows) if row.new_page is not None]
        self.due_rows = torch.tensor([index for index, _ in due], dtype=torch.long).to(device)
        ring_pages = ring // PAGE_TOKENS
        self.due_parts = torch.tensor([len(row.pages) % ring_pages for _, row in due], dtype=torch.long).to(
            device
        )
        self.due_ids = torch.tensor([row.new_page for _, row in due], dtype=torch.long).to(device)
        # position of the token that each column stands for; -1 where there is none
        counts = torch.tensor([len(row.pages) for row in rows])
        coded = sinks + torch.arange(self.table.pages * PAGE_TOKENS)
        coded = torch.where(coded < sinks + counts[:, None] * PAGE_TOKENS, coded, -1)
        first = torch.arange(sinks).expand(len(rows), -1)
        first = torch.where(first <= positions[:, None], first, -1)
        newest = (positions - sinks)[:, None]
        held = newest - (newest - torch.arange(ring)) % ring
        held = torch.where((held >= counts[:, None] * PAGE_TOKENS) & (newest >= 0), sinks + held, -1)
        self._column_positions = torch.cat([coded, first, held], dim=1)
        self._positions = positions
        self._masks: dict[int | None, Tensor] = {}

    def update(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See `RaggedStore.update`."""
        store = self.store
        for held, new in zip(store.exact[layer], (keys, values), strict=True):
            held[self.row_index, :, self.places] = new[: self.rows, :, 0]
        if self.due_rows.numel():
            keys, values = (
                part[:, :, store.sinks :].unflatten(2, (-1, PAGE_TOKENS))[self.due_rows, :, self.due_parts]
                for part in store.exact[layer]
            )
            store.store_pages(layer, keys, values, self.due_ids)

    def attend_layer(self, layer: int, query: Tensor, scaling: float, softcap: float | None) -> Attended:
        """See `RaggedStore.attend_layer`; rows of padding get zeros."""
        store, rows = self.store, self.rows
        recent = ExactTokens(*(part[:rows] for part in store.exact[layer]))
        mask = self._mask(store.shape.layers[layer].sliding_window)
        slab = store.pool.slabs[layer]
        done = store.codes[layer].attend(query[:rows], slab, self.table, None, recent, mask, scaling, softcap)
        if rows == query.shape[0]:
            return done
        out = done.out.new_zeros((query.shape[0], *done.out.shape[1:]))
        lse = done.lse.new_zeros((query.shape[0], *done.lse.shape[1:]))
        out[:rows], lse[:rows] = done.out, done.lse
        return Attended(out, lse)

    def _mask(self, sliding_window: int | None) -> Tensor:
        """bool `[rows, 1, 1, columns]`, made once per step and kind of layer."""
        if sliding_window not in self._masks:
            seen = self._column_positions >= 0
            if sliding_window is not None:
                seen &= self._column_positions > self._positions[:, None] - sliding_window
            self._masks[sliding_window] = seen[:, None, None].to(self.store.device)
        return self._masks[sliding_window]
