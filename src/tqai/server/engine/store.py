"""`TokenStore`: keys and values of every request: pages in the pools, exact tokens and offsets in slots.

Exact tokens of slot s lie in one tensor per layer, `[slots + 1, kv_heads, sinks + window + 64, head_dim]`;
the last row belongs to the request that is being prefilled:

    | sink 0 .. S-1 | the tokens after the pages, oldest first: W to W + 63 of them | room |

When there are W + 64 the oldest 64 become a page and the others move to the front. Slots 0 to n-1 are those
of the n running requests: a decode step reads a slice.

What a token sees depends on its position alone, however it was computed: tokens S + W + 64 k to
S + W + 64 k + 63 see k compressed pages, the W tokens before them, and each other. Decoding does so by
itself; a prefill step (`prefill_step`) treats the 64-token blocks of its chunk as a ragged batch, in which
each block sees the page of the block before it.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from tqai.backends.base import ExactTokens
from tqai.core.page import PAGE_TOKENS
from tqai.errors import BackendError
from tqai.server.engine.decode_step import DecodeRow
from tqai.server.engine.kinds import PageKind, kinds_of
from tqai.server.engine.model import ModelShape
from tqai.server.engine.page_codes import PageCodes, page_codes_for
from tqai.server.engine.pages import PagePool
from tqai.server.engine.settings import EngineSettings
from tqai.server.engine.slot_offsets import SlotOffsets

__all__ = ["TokenStore", "page_bytes_of", "page_kinds"]


def page_bytes_of(settings: EngineSettings, shape: ModelShape) -> int:
    """Bytes of 64 tokens in all layers."""
    return sum(kind.page_bytes for kind in page_kinds(settings, shape))


def page_kinds(settings: EngineSettings, shape: ModelShape) -> list[PageKind]:
    """The kinds of a model's layers, those that see farthest first."""
    sizes = [code.page_bytes for code in _codes_of(settings, shape)]
    return kinds_of(shape.layers, sizes, (settings.sink_tokens, settings.window_tokens))


def _codes_of(settings: EngineSettings, shape: ModelShape) -> list[PageCodes]:
    return [
        page_codes_for(settings.cache_of(index), layer, shape.dtype, shape.device, shape.sink_logits)
        for index, layer in enumerate(shape.layers)
    ]


class TokenStore:
    """See the module's text.

    Attributes:
        kinds, pools: the kinds of layers, and the pages of each.
        slabs: of every layer, uint8 `[pages, kv_heads, page_bytes]`.
        exact: of every layer, the exact tokens of all slots.
        offsets: of every layer, what is taken off them; None where nothing ever is.
        frozen: of every slot, whether the offsets of its sequence are.
        soft_capped: of every layer, whether its logits are; known after its first step.
    """

    def __init__(self, settings: EngineSettings, shape: ModelShape, pages: Many[int]) -> None:
        """`pages`: of each kind's pool."""
        self.settings, self.shape, self.device = settings, shape, shape.device
        self.sinks, self.window = settings.sink_tokens, settings.window_tokens
        self.codes = _codes_of(settings, shape)
        self.kinds = page_kinds(settings, shape)
        self.pools = [
            PagePool(
                [self.codes[index] for index in kind.layers],
                tuple(shape.layers[index] for index in kind.layers),
                count,
                shape.device,
            )
            for kind, count in zip(self.kinds, pages, strict=True)
        ]
        self.kind_of = [0] * len(shape.layers)
        slabs: dict[int, Tensor] = {}
        for number, (kind, pool) in enumerate(zip(self.kinds, self.pools, strict=True)):
            for layer, slab in zip(kind.layers, pool.slabs, strict=True):
                self.kind_of[layer], slabs[layer] = number, slab
        self.slabs = [slabs[layer] for layer in range(len(shape.layers))]
        self.frozen = [False] * (settings.max_running + 1)
        self.soft_capped = [False] * len(shape.layers)
        self._make_slots()

    def _make_slots(self) -> None:
        """Layers of one shape share tensors, so that what concerns all of them is done at once."""
        settings, shape = self.settings, self.shape
        rows, room = settings.max_running + 1, self.sinks + self.window + PAGE_TOKENS
        self._groups: list[tuple[list[int], ExactTokens, SlotOffsets | None]] = []
        exact: dict[int, ExactTokens] = {}
        offsets: dict[int, SlotOffsets | None] = {}
        for one in dict.fromkeys(shape.layers):
            members = [index for index, layer in enumerate(shape.layers) if layer == one]
            whole = ExactTokens(
                *(
                    torch.zeros(
                        (len(members), rows, one.kv_heads, room, dim), dtype=shape.dtype, device=shape.device
                    )
                    for dim in (one.key_dim, one.value_dim)
                )
            )
            taken = SlotOffsets.make(settings.cache, one, len(members), rows, shape.dtype, shape.device)
            self._groups.append((members, whole, taken))
            for number, index in enumerate(members):
                exact[index] = ExactTokens(*(part[number] for part in whole))
                offsets[index] = None if taken is None else taken.of_layer(number)
        self.exact = [exact[index] for index in range(len(shape.layers))]
        self.offsets = [offsets[index] for index in range(len(shape.layers))]

    @property
    def pool(self) -> PagePool:
        """The pages of the layers that see farthest."""
        return self.pools[0]

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.pages * pool.page_bytes for pool in self.pools)

    @property
    def lead(self) -> int:
        """First tokens of a prompt, which are a prefill step of their own: sinks and window."""
        return self.sinks + self.window

    @property
    def moves(self) -> bool:
        """Whether sequences have offsets or factors."""
        return self.offsets[0] is not None

    @property
    def staging(self) -> int:
        """The slot of the request that is being prefilled."""
        return self.settings.max_running

    @property
    def exact_bytes(self) -> int:
        """Bytes of the slots' tensors, in use or not."""
        return sum(part.nbytes for tensors in self._slot_tensors() for part in tensors)

    def _slot_tensors(self) -> list[tuple[Tensor, ...]]:
        return [(*whole, *(() if taken is None else taken.parts())) for _, whole, taken in self._groups]

    def pages_after(self, tokens: int) -> int:
        """Pages of a sequence that has seen `tokens` tokens, those included that were given back."""
        return max(tokens - self.lead, 0) // PAGE_TOKENS

    def place_of(self, position: int) -> int:
        """Where the token at `position` lies among a slot's exact tokens when it comes; all before it are
        in use."""
        return position - PAGE_TOKENS * self.pages_after(position)

    def begin(self) -> None:
        """A sequence begins in the staging slot."""
        self.frozen[self.staging] = False
        for _, _, taken in self._groups:
            if taken is not None:
                taken.forget(self.staging)

    def move_slot(self, source: int, target: int) -> None:
        """Copy what one slot holds to another."""
        self.frozen[target] = self.frozen[source]
        for tensors in self._slot_tensors():
            for part in tensors:
                part[:, target].copy_(part[:, source])

    def swap_slots(self, one: int, other: int) -> None:
        """Exchange what two slots hold."""
        self.frozen[one], self.frozen[other] = self.frozen[other], self.frozen[one]
        for tensors in self._slot_tensors():
            for part in tensors:
                part[:, [one, other]] = part[:, [other, one]]

    def store_pages(self, layer: int, keys: Tensor, values: Tensor, ids: Tensor) -> None:
        """Encode `[pages, kv_heads, 64, head_dim]` into the pages `ids`."""
        self.codes[layer].store(keys, values, self.slabs[layer], ids)

    def complete_pages(self, rows: list[DecodeRow]) -> None:
        """Encode the pages that a decode step of `rows` completes, whose tokens are in the slots, and move
        the tokens after them to the front. Can be repeated if it fails."""
        due = [(index, row) for index, row in enumerate(rows) if row.new_pages is not None]
        if not due:
            return
        for index, row in due:
            if self.moves and not self.frozen[index]:
                assert not row.pages
                self._freeze_slot(index)
        columns = [[index for index, _ in due]]
        columns += [[(row.new_pages or [])[number] for _, row in due] for number in range(len(self.kinds))]
        slots, *ids = torch.tensor(columns).to(self.device, non_blocking=True).unbind(0)
        first, last = self.sinks, self.sinks + PAGE_TOKENS
        for members, whole, _ in self._groups:
            # [layers, pages, kv_heads, 64, head_dim]
            taken = ExactTokens(*(part[:, :, :, first:last].index_select(1, slots) for part in whole))
            self._store_group(members, taken, ids[self.kind_of[members[0]]])
        if self.window:
            for _, whole, _ in self._groups:
                for part in whole:
                    part[:, slots, :, first : first + self.window] = part[:, slots, :, last:]

    def _store_group(self, members: list[int], taken: ExactTokens, ids: Tensor) -> None:
        """Encode pages of layers of one shape, in as few calls as their codes allow."""
        formats = [getattr(self.codes[index], "page_format", None) for index in members]
        for one in dict.fromkeys(formats):
            chosen = [number for number, other in enumerate(formats) if other == one]
            all_of_them = len(chosen) == len(members)
            parts = taken if all_of_them else ExactTokens(*(part[chosen] for part in taken))
            layers = [members[number] for number in chosen]
            try:
                raw = self.codes[layers[0]].encoded(*(part.flatten(0, 1) for part in parts))
            except BackendError:
                # layer by layer, each of which goes on with another backend
                for layer, keys, values in zip(layers, *parts, strict=True):
                    self.store_pages(layer, keys, values, ids)
                continue
            raw = raw.unflatten(0, (len(layers), -1))
            pool = self.pools[self.kind_of[layers[0]]]
            if pool.whole is not None and len(layers) == len(pool.slabs):
                pool.whole.index_copy_(1, ids, raw)
            else:
                for layer, pages in zip(layers, raw, strict=True):
                    self.slabs[layer].index_copy_(0, ids, pages)

    def _freeze_slot(self, slot: int) -> None:
        """Freeze the offsets of a sequence whose first page a decode step completes."""
        first, last = self.sinks, self.sinks + PAGE_TOKENS
        for members, whole, taken in self._groups:
            assert taken is not None
            held = ExactTokens(*(part[:, slot] for part in whole))
            paged = ExactTokens(*(part[:, :, first:last] for part in held))
            taken.freeze_slot(slot, paged, any(self.soft_capped[index] for index in members))
            for part, new in zip(held, taken.slot(slot).taken_off(held), strict=True):
                part.copy_(new)
        self.frozen[slot] = True
