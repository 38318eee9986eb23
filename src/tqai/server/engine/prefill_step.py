"""`PrefillStep`: prompt tokens of one sequence, in the staging slot."""

from __future__ import annotations

import torch
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens
from tqai.backends.torch_ops.attention import attend as attend_exact
from tqai.core.page import PAGE_TOKENS
from tqai.server.engine import prefill_flash
from tqai.server.engine.page_table import HeldPages, PageTable
from tqai.server.engine.prefill_flash import TILE_PAGES, ChunkAttention, ChunkBlocks
from tqai.server.engine.store import TokenStore

__all__ = ["PrefillStep"]


class PrefillStep:
    """Prompt tokens `start` to `start + count - 1` of one sequence, in the staging slot.

    Up to the first S + W tokens are a step of their own; later steps start at S + W + 64 k.
    """

    def __init__(self, store: TokenStore, start: int, count: int, held: list[HeldPages]) -> None:
        """`held`: the sequence's pages of each kind, those that the step completes among them."""
        self.store, self.start, self.count = store, start, count
        lead, device = store.lead, store.device
        self.is_lead = start < lead
        if self.is_lead and (start or count > lead):
            raise ValueError(f"prefill of {count} tokens from {start}: the first {lead} go by themselves")
        if not self.is_lead and (start - lead) % PAGE_TOKENS:
            raise ValueError(f"prefill from {start}: allowed are {lead} + multiples of {PAGE_TOKENS}")
        if start == 0:
            store.begin()
        self.before = 0 if self.is_lead else (start - lead) // PAGE_TOKENS
        self.blocks = 0 if self.is_lead else count // PAGE_TOKENS
        self.tail = 0 if self.is_lead else count % PAGE_TOKENS
        self.freezes = store.moves and not store.frozen[store.staging] and self.blocks > 0
        self._sights = [
            _Sight(store, number, pages, start, self.before, self.blocks, self.tail)
            for number, pages in enumerate(held)
        ]
        self._flash_blocks: dict[bool, ChunkBlocks] = {}
        self._masks: dict[tuple[int | None, bool], Tensor | None] = {}
        self._device = device
        self._tokens: dict[int, ExactTokens] = {}

    def update(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """See `RaggedStore.update`. What is done with the tokens waits for their query."""
        self._tokens[layer] = ExactTokens(keys, values)

    def finish(self) -> None:
        """The step has gone through all layers."""
        if self.freezes:
            self.store.frozen[self.store.staging] = True

    def _take(
        self, layer: int, query: Tensor, softcap: float | None
    ) -> tuple[ExactTokens, ExactTokens | None]:
        """Put the step's tokens where they belong. Returns what its queries see beside pages, without
        offsets: the window before them and themselves, and the sinks."""
        store, staging = self.store, self.store.staging
        tokens, state = self._tokens.pop(layer), store.offsets[layer]
        held = ExactTokens(*(part[staging : staging + 1] for part in store.exact[layer]))
        window = ExactTokens(*(part[:, :, store.sinks : store.lead] for part in held))
        has_window = store.window > 0 and not self.is_lead
        if state is not None:
            store.soft_capped[layer] = softcap is not None
            if store.frozen[staging]:
                tokens = state.rows(staging, staging + 1).taken_off(tokens)
            else:
                state.see_query(staging, query)
        if has_window:
            tokens = ExactTokens(*(torch.cat(pair, dim=2) for pair in zip(window, tokens, strict=True)))
        if self.freezes:
            assert state is not None
            paged = ExactTokens(*(part[:, :, : self.blocks * PAGE_TOKENS] for part in tokens))
            state.freeze_layer(staging, paged, softcap is not None)
            offsets = state.rows(staging, staging + 1)
            tokens = offsets.taken_off(tokens)
            sinks = ExactTokens(*(part[:, :, : store.sinks] for part in held))
            for part, new in zip(sinks, offsets.taken_off(sinks), strict=True):
                part.copy_(new)
        if self.blocks:
            keys, values = (
                part[0, :, : self.blocks * PAGE_TOKENS].unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1)
                for part in tokens
            )
            store.store_pages(layer, keys, values, self._sights[store.kind_of[layer]].fresh_ids)
        at = 0 if self.is_lead else store.sinks
        for part, new in zip(held, tokens, strict=True):
            kept = new[:, :, self.blocks * PAGE_TOKENS :]
            part[:, :, at : at + kept.shape[2]] = kept
        if not store.sinks or self.is_lead:
            return tokens, None
        return tokens, ExactTokens(*(part[:, :, : store.sinks] for part in held))

    def attend_layer(self, layer: int, query: Tensor, scaling: float, softcap: float | None) -> Attended:
        """See `RaggedStore.attend_layer`."""
        store = self.store
        tokens, sinks = self._take(layer, query, softcap)
        state = store.offsets[layer]
        # before they are frozen they are 0 and 1, and cost something
        if state is None or not (self.freezes or store.frozen[store.staging]):
            return self._attend(layer, query, tokens, sinks, scaling, softcap)
        offsets = state.rows(store.staging, store.staging + 1)
        done = self._attend(layer, offsets.for_query(query), tokens, sinks, scaling, softcap)
        return offsets.corrected(done, query, scaling if store.shape.sink_logits else None, masked=False)

    def _attend(
        self,
        layer: int,
        query: Tensor,
        tokens: ExactTokens,
        sinks: ExactTokens | None,
        scaling: float,
        softcap: float | None,
    ) -> Attended:
        """Attention without offsets."""
        store = self.store
        window, sight = store.shape.layers[layer].sliding_window, self._sights[store.kind_of[layer]]
        if self.is_lead:
            mask = self._mask(window, None)
            return attend_exact(query, None, None, tokens, mask, scaling, softcap)
        if window is None and prefill_flash.serves(query, tokens.values, softcap):
            return self._attend_parts(layer, query, tokens, sinks, scaling)
        codes, slab = store.codes[layer], store.slabs[layer]
        span = store.window + PAGE_TOKENS
        parts = []
        if sight.block_table is not None:
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
            mask = self._mask(window, sight, sight.block_table)
            done = codes.attend(rows, slab, sight.block_table, every, recent, mask, scaling, softcap)
            parts.append(Attended(*(part.transpose(0, 1).flatten(1, 2)[None] for part in done)))
        if sight.tail_table is not None:
            at = self.blocks * PAGE_TOKENS
            recent = ExactTokens(*(part[:, :, at:] for part in tokens))
            mask = self._mask(window, sight, sight.tail_table)
            rest = query[:, :, at:].contiguous()
            parts.append(codes.attend(rest, slab, sight.tail_table, sinks, recent, mask, scaling, softcap))
        if len(parts) == 1:
            return parts[0]
        return Attended(*(torch.cat(pair, dim=2) for pair in zip(*parts, strict=True)))

    def _attend_parts(
        self, layer: int, query: Tensor, own: ExactTokens, sinks: ExactTokens | None, scaling: float
    ) -> Attended:
        """As `_attend`, in parts that flash attention knows (`prefill_flash`)."""
        codes, slab = self.store.codes[layer], self.store.slabs[layer]
        sight = self._sights[self.store.kind_of[layer]]
        by_blocks = codes.is_lossy
        if by_blocks not in self._flash_blocks:
            window = self.store.window
            self._flash_blocks[by_blocks] = ChunkBlocks(self.count, window, by_blocks, query.device)
        chunk = ChunkAttention(query, own.keys.shape[1], scaling, self._flash_blocks[by_blocks])
        chunk.add_own(own)
        apart = max(len(sight.before_ids) - TILE_PAGES, 0) if by_blocks else len(sight.before_ids)
        for ids in sight.before_ids[:apart].split(TILE_PAGES):
            if len(ids):
                chunk.add(codes.unpacked(slab, ids, query.dtype))
        if by_blocks:
            near = sight.before_ids[apart:]
            first = self.store.sinks + len(near) * PAGE_TOKENS
            ids = torch.cat([near, sight.fresh_ids])
            coded = [] if sinks is None else [sinks]
            if len(ids):
                coded.append(codes.unpacked(slab, ids, query.dtype))
            if coded:
                whole = coded[0] if len(coded) == 1 else ExactTokens(*map(_joined, *coded))
                chunk.add_coded(whole, first)
        return chunk.result()

    def _mask(
        self, sliding_window: int | None, sight: _Sight | None, table: PageTable | None = None
    ) -> Tensor | None:
        """bool `[blocks, 1, new, sinks + coded + exact]` of a sliding layer; None where all is seen."""
        if sliding_window is None:
            return None
        is_tail = sight is not None and table is sight.tail_table
        key = sliding_window, is_tail
        if key not in self._masks:
            store, device = self.store, self._device
            starts, gone, new = [self.start], [0], self.count
            before, sinks, pages = 0, 0, 0
            if sight is not None:
                assert table is not None
                before, sinks, pages = store.window, store.sinks, table.pages
                starts = [self.start + block * PAGE_TOKENS for block in range(self.blocks)]
                gone, new = sight.block_gone, PAGE_TOKENS
                if is_tail:
                    starts = [self.start + self.blocks * PAGE_TOKENS]
                    gone, new = [sight.tail_gone], self.tail
            first = torch.tensor(starts, device=device)[:, None]
            exact = torch.arange(-before, new, device=device) + first
            coded = torch.arange(pages * PAGE_TOKENS, device=device) + store.sinks
            coded = coded + torch.tensor(gone, device=device)[:, None] * PAGE_TOKENS
            lead = torch.arange(sinks, device=device).expand(len(starts), -1)
            column = torch.cat([lead, coded, exact], dim=1)[:, None, None]
            row = (first + torch.arange(new, device=device))[:, None, :, None]
            self._masks[key] = (column <= row) & (column > row - sliding_window)
        return self._masks[key]


def _joined(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], dim=2)


class _Sight:
    """The pages of one kind of layer that a step sees and completes.

    Attributes:
        fresh_ids, before_ids: pages that the step completes, and those before it, int64 on the device.
        block_table, tail_table: what each block of 64 tokens and the rest see; None where there is none.
        block_gone, tail_gone: numbers of the first pages in those tables.
    """

    def __init__(
        self, store: TokenStore, number: int, held: HeldPages, start: int, before: int, blocks: int, tail: int
    ) -> None:
        kind, device, ids = store.kinds[number], store.device, held.ids

        def listed(pages: list[int]) -> Tensor:
            return torch.tensor(pages, dtype=torch.long).to(device)

        self.fresh_ids = listed(ids[before : before + blocks])
        self.before_ids = listed(ids[kind.gone(start) : before])
        self.block_gone = [kind.gone(start + block * PAGE_TOKENS) for block in range(blocks)]
        self.tail_gone = kind.gone(start + blocks * PAGE_TOKENS)
        rows = [ids[gone : before + block] for block, gone in enumerate(self.block_gone)]
        self.block_table = PageTable(rows, device) if blocks else None
        self.tail_table = PageTable([ids[self.tail_gone : before + blocks]], device) if tail else None
