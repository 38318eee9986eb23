"""`TokenStore`: keys and values of every request, and the two kinds of step that read and extend them.

Exact tokens of slot s lie in one tensor per layer, `[slots + 1, kv_heads, sinks + ring, head_dim]`; the
last row belongs to the request that is being prefilled:

    | sink 0 .. S-1 | ring: token p at (p - S) mod ring |

A window holds W to W + 63 tokens between steps, so a ring of W + 64, rounded up to whole pages, never
overwrites what is still needed, nothing is ever moved, and page k lies in one piece at 64 k mod ring.
Slots 0 to n-1 are those of the n running requests: a decode step reads a slice.

What a token sees depends on its position alone, however it was computed: tokens S + W + 64 k to
S + W + 64 k + 63 see k compressed pages, the W tokens before them, and each other. Decoding does so by
itself; a prefill step treats the 64-token blocks of its chunk as a ragged batch, in which each block
sees the page of the block before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens
from tqai.backends.torch_ops.attention import attend as attend_exact
from tqai.core.page import PAGE_TOKENS
from tqai.server.engine.model import ModelShape
from tqai.server.engine.page_codes import PageCodes, PageTable, page_codes_for
from tqai.server.engine.pages import PagePool
from tqai.server.engine.settings import EngineSettings

__all__ = ["DecodeRow", "DecodeStep", "PrefillStep", "TokenStore", "page_bytes_of"]


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
        self.exact: list[ExactTokens] = []
        rows, room = settings.max_running + 1, self.sinks + self.ring
        for layer in shape.layers:
            dims = (layer.key_dim, layer.value_dim)
            self.exact.append(
                ExactTokens(
                    *(
                        torch.zeros((rows, layer.kv_heads, room, dim), dtype=shape.dtype, device=shape.device)
                        for dim in dims
                    )
                )
            )

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
        for layer in self.exact:
            for part in layer:
                part[target].copy_(part[source])

    def swap_slots(self, one: int, other: int) -> None:
        """Exchange the exact tokens of two slots."""
        for layer in self.exact:
            for part in layer:
                part[[one, other]] = part[[other, one]]

    def store_pages(self, layer: int, keys: Tensor, values: Tensor, ids: Tensor) -> None:
        """Encode `[pages, kv_heads, 64, head_dim]` into the pages `ids`."""
        self.codes[layer].store(keys, values, self.pool.slabs[layer], ids)


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
    """One token of each of `rows`; the tensors of the model may have more rows, which are padding."""

    def __init__(self, store: TokenStore, rows: list[DecodeRow]) -> None:
        self.store, self.rows = store, len(rows)
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


class PrefillStep:
    """Prompt tokens `start` to `start + count - 1` of one sequence, in the staging slot.

    Up to the first S + W tokens are a step of their own; later steps start at S + W + 64 k.
    """

    def __init__(self, store: TokenStore, start: int, count: int, pages: list[int]) -> None:
        """`pages`: those of the sequence after the step."""
        self.store, self.start, self.count = store, start, count
        lead = store.sinks + store.window
        device = store.device
        self.is_lead = start < lead
        if self.is_lead and (start or count > lead):
            raise ValueError(f"prefill of {count} tokens from {start}: the first {lead} go by themselves")
        if not self.is_lead and (start - lead) % PAGE_TOKENS:
            raise ValueError(f"prefill from {start}: allowed are {lead} + multiples of {PAGE_TOKENS}")
        self.before = 0 if self.is_lead else (start - lead) // PAGE_TOKENS
        self.blocks = 0 if self.is_lead else count // PAGE_TOKENS
        self.tail = 0 if self.is_lead else count % PAGE_TOKENS
        fresh = pages[self.before : self.before + self.blocks]
        self.fresh_ids = torch.tensor(fresh, dtype=torch.long).to(device)
        block_pages = [pages[: self.before + block] for block in range(self.blocks)]
        self.block_table = PageTable(block_pages, device) if self.blocks else None
        self.tail_table = PageTable([pages[: self.before + self.blocks]], device) if self.tail else None
        # the newest tokens go to the ring
        stop = start + count
        kept = range(max(start, stop - store.ring, 0), stop)
        if self.is_lead:
            kept = range(start, stop)
        self.kept_from = kept.start - start
        self.kept_places = torch.tensor([store.place_of(p) for p in kept], dtype=torch.long).to(device)
        window = range(start - store.window, start) if not self.is_lead else range(0)
        self.window_places = torch.tensor([store.place_of(p) for p in window], dtype=torch.long).to(device)
        self._tokens: dict[int, tuple[ExactTokens, ExactTokens | None]] = {}

    def update(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See `RaggedStore.update`."""
        store, staging = self.store, self.store.staging
        held = ExactTokens(*(part[staging : staging + 1] for part in store.exact[layer]))
        tokens = ExactTokens(keys, values)
        if store.window and not self.is_lead:
            before = (part.index_select(2, self.window_places) for part in held)
            tokens = ExactTokens(
                *(torch.cat(pair, dim=2) for pair in zip(before, (keys, values), strict=True))
            )
        for part, new in zip(held, (keys, values), strict=True):
            part.index_copy_(2, self.kept_places, new[:, :, self.kept_from :])
        if self.blocks:
            stop = self.blocks * PAGE_TOKENS
            keys, values = (
                part[0, :, :stop].unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1) for part in tokens
            )
            store.store_pages(layer, keys, values, self.fresh_ids)
        sinks = None
        if store.sinks and not self.is_lead:
            sinks = ExactTokens(*(part[:, :, : store.sinks] for part in held))
        self._tokens[layer] = (tokens, sinks)

    def attend_layer(self, layer: int, query: Tensor, scaling: float, softcap: float | None) -> Attended:
        """See `RaggedStore.attend_layer`."""
        tokens, sinks = self._tokens.pop(layer)
        window = self.store.shape.layers[layer].sliding_window
        if self.is_lead:
            mask = self._mask(window, self.count, [0], 0, None) if window is not None else None
            return attend_exact(query, None, None, tokens, mask, scaling, softcap)
        codes, slab = self.store.codes[layer], self.store.pool.slabs[layer]
        span = self.store.window + PAGE_TOKENS
        parts = []
        if self.block_table is not None:
            stop = self.blocks * PAGE_TOKENS
            rows = query[0, :, :stop].unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1).contiguous()
            recent = ExactTokens(
                *(
                    part.unfold(2, span, PAGE_TOKENS)[0, :, : self.blocks].permute(1, 0, 3, 2)
                    for part in tokens
                )
            )
            every = None
            if sinks is not None:
                every = ExactTokens(*(part.expand(self.blocks, -1, -1, -1) for part in sinks))
            starts = [self.start + block * PAGE_TOKENS for block in range(self.blocks)]
            mask = self._mask(window, PAGE_TOKENS, starts, self.store.window, self.block_table)
            done = codes.attend(rows, slab, self.block_table, every, recent, mask, scaling, softcap)
            parts.append(Attended(*(part.transpose(0, 1).flatten(1, 2)[None] for part in done)))
        if self.tail_table is not None:
            at = self.blocks * PAGE_TOKENS
            recent = ExactTokens(*(part[:, :, at:] for part in tokens))
            mask = self._mask(window, self.tail, [self.start + at], self.store.window, self.tail_table)
            rest = query[:, :, at:].contiguous()
            parts.append(codes.attend(rest, slab, self.tail_table, sinks, recent, mask, scaling, softcap))
        if len(parts) == 1:
            return parts[0]
        return Attended(*(torch.cat(pair, dim=2) for pair in zip(*parts, strict=True)))

    def _mask(
        self, sliding_window: int | None, new: int, starts: list[int], before: int, table: PageTable | None
    ) -> Tensor | None:
        """bool `[blocks, 1, new, sinks + coded + exact]` of a sliding layer; None where all is seen."""
        if sliding_window is None:
            return None
        device, sinks = self.store.device, 0 if table is None else self.store.sinks
        first = torch.tensor(starts, device=device)[:, None]
        exact = torch.arange(-before, new, device=device)[None] + first
        coded = torch.arange((0 if table is None else table.pages) * PAGE_TOKENS, device=device)
        lead = torch.arange(sinks, device=device)
        fixed = torch.cat([lead, coded + self.store.sinks])[None].expand(len(starts), -1)
        column = torch.cat([fixed, exact], dim=1)[:, None, None]
        row = (first + torch.arange(new, device=device))[:, None, :, None]
        return (column <= row) & (column > row - sliding_window)
