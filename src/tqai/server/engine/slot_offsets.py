"""Offsets and factors of every slot (`cache.offsets`, `cache.balance`): what is taken off all keys and values
of a sequence before anything is kept, and put right by attention, exactly.

They are frozen with the first pages of a sequence, from the tokens of those pages and the queries of the
newest prefill step, and are its own: part of what a shared prefix shares. Before that, and for heads that do
without, they are 0 and 1, which changes no number.

    one tensor per kind of layer shape    [layers, slots + 1, kv_heads, 1, head_dim]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tqai.backends.base import ExactTokens
from tqai.cache.balance import factors, query_energy
from tqai.cache.offsets import Offsets, estimate
from tqai.config import CacheConfig
from tqai.server.engine.model import LayerShape

__all__ = ["SlotOffsets"]


@dataclass
class SlotOffsets:
    """The state of layers of one shape; a view of one of them has no first axis.

    Attributes:
        config: says which of the two are wanted.
        keys, values, factors: `[layers, slots, kv_heads, 1, head_dim]` in the model's dtype.
        energy: float32 `[layers, slots, kv_heads, head_dim]`, mean squares of the queries shown last.
    """

    config: CacheConfig
    keys: Tensor
    values: Tensor
    factors: Tensor
    energy: Tensor

    @classmethod
    def make(
        cls,
        config: CacheConfig | None,
        shape: LayerShape,
        layers: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> SlotOffsets | None:
        """None where the configuration asks for neither."""
        if config is None or (config.offsets == "off" and config.balance == "off"):
            return None
        lead = (layers, slots, shape.kv_heads)
        keys, values = (
            torch.zeros((*lead, 1, dim), dtype=dtype, device=device)
            for dim in (shape.key_dim, shape.value_dim)
        )
        energy = torch.zeros((*lead, shape.key_dim), dtype=torch.float32, device=device)
        return cls(config, keys, values, torch.ones_like(keys), energy)

    def of_layer(self, index: int) -> SlotOffsets:
        """The layer `index` of them, a view."""
        return SlotOffsets(self.config, *(part[index] for part in self.parts()))

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors, in the order of the fields."""
        return self.keys, self.values, self.factors, self.energy

    def rows(self, start: int, stop: int) -> Offsets:
        """What slots `start` to `stop - 1` of one layer have, as attention over them wants it."""
        return self._wanted(*(part[start:stop] for part in self.parts()[:3]))

    def slot(self, slot: int) -> Offsets:
        """What `slot` has in all layers, which stand where else the sequences of a batch do."""
        return self._wanted(*(part[:, slot] for part in self.parts()[:3]))

    def _wanted(self, keys: Tensor, values: Tensor, by: Tensor) -> Offsets:
        offsets, balance = self.config.offsets != "off", self.config.balance != "off"
        return Offsets(keys if offsets else None, values if offsets else None, by if balance else None)

    def forget(self, slot: int) -> None:
        """A new sequence begins in `slot` of all layers."""
        for part in (self.keys, self.values, self.energy):
            part[:, slot].zero_()
        self.factors[:, slot].fill_(1)

    def see_query(self, slot: int, query: Tensor) -> None:
        """`query` `[1, query_heads, new_tokens, head_dim]` of one layer and the sequence in `slot`."""
        if self.config.balance != "off":
            self.energy[slot] = query_energy(query, self.keys.shape[1])[0]

    def freeze_layer(self, slot: int, paged: ExactTokens, soft_capped: bool) -> None:
        """Freeze those of one layer and the sequence in `slot`, from its tokens `[1, kv_heads, tokens,
        head_dim]` that become its first pages."""
        self._freeze([part[slot : slot + 1] for part in self.parts()], paged, soft_capped)

    def freeze_slot(self, slot: int, paged: ExactTokens, soft_capped: bool) -> None:
        """The same for all layers at a time: `[layers, kv_heads, tokens, head_dim]`."""
        self._freeze([part[:, slot] for part in self.parts()], paged, soft_capped)

    def _freeze(self, held: list[Tensor], paged: ExactTokens, soft_capped: bool) -> None:
        keys, values, by, energy = held
        if self.config.offsets != "off":
            found = estimate(paged, self.config.offsets, of_keys=not soft_capped)
            if found is not None and found.keys is not None:
                keys.copy_(found.keys)
            if found is not None and found.values is not None:
                values.copy_(found.values)
        if self.config.balance != "off":
            plain = Offsets(keys, None).taken_off(paged)
            found_factors = factors(plain.keys, energy)
            if found_factors is not None:
                by.copy_(found_factors)
