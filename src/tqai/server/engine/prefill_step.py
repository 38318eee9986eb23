"""`PrefillStep`: prompt tokens of one sequence, in the staging slot."""

from __future__ import annotations

import torch
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens
from tqai.backends.torch_ops.attention import attend as attend_exact
from tqai.core.page import PAGE_TOKENS
from tqai.server.engine import prefill_flash
from tqai.server.engine.page_table import PageTable
from tqai.server.engine.store import TokenStore

__all__ = ["PrefillStep"]


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
        self.before_ids = torch.tensor(pages[: self.before], dtype=torch.long).to(device)
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
        if window is None and not self.store.window and prefill_flash.serves(query, tokens.values, softcap):
            return self._attend_parts(layer, query, tokens, sinks, scaling)
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

    def _attend_parts(
        self, layer: int, query: Tensor, own: ExactTokens, sinks: ExactTokens | None, scaling: float
    ) -> Attended:
        """As `attend_layer`, in parts that flash attention knows (`prefill_flash`)."""
        codes, slab = self.store.codes[layer], self.store.pool.slabs[layer]
        chunk = prefill_flash.ChunkAttention(query, own, scaling, codes.is_lossy)
        if sinks is not None:
            chunk.add(sinks)
        for ids in self.before_ids.split(prefill_flash.TILE_PAGES):
            if len(ids):
                chunk.add(codes.unpacked(slab, ids, query.dtype))
        if codes.is_lossy and self.count > PAGE_TOKENS:
            chunk.add_lower_blocks(codes.unpacked(slab, self.fresh_ids, query.dtype))
        return chunk.result()

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
