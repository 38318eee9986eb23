"""The model's forward pass for decode and prefill steps."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tqai.integrations.transformers.ragged import RaggedCache
from tqai.server.engine.decode_graphs import DecodeGraphs
from tqai.server.engine.decode_step import DecodeStep
from tqai.server.engine.model import ModelShape
from tqai.server.engine.prefill_step import PrefillStep
from tqai.server.engine.store import TokenStore

__all__ = ["ModelRunner", "invariant_rows"]


class ModelRunner:
    """Runs steps. Decode batches are padded to a multiple of `row_multiple` rows, see `invariant_rows`."""

    def __init__(self, model: Any, shape: ModelShape, max_rows: int) -> None:
        self.model, self.shape = model, shape
        self.row_multiple = invariant_rows(model, max_rows)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.graphs: DecodeGraphs | None = None

    def capture(self, store: TokenStore, room_pages: int) -> None:
        """Have decode steps replayed as CUDA graphs from now on, where that can be done."""
        if DecodeGraphs.serve(store):
            self.graphs = DecodeGraphs(self.model, store, room_pages, self._extra(1))
            self.graphs.capture_all()

    @torch.inference_mode()
    def decode(self, step: DecodeStep, tokens: list[int], positions: list[int]) -> Tensor:
        """Logits `[rows, vocab]` of one token per row."""
        rows = len(tokens)
        if self.graphs is not None:
            logits = self.graphs.run(step.given, tokens)
            if logits is not None:
                return logits
        step.prepare()
        padding = [0] * (-rows % self.row_multiple)
        logits = self._forward(
            step, [[token] for token in tokens + padding], [[p] for p in positions + padding], 1
        )
        step.store.complete_pages(step.given)
        return logits[:rows, -1]

    @torch.inference_mode()
    def prefill(self, step: PrefillStep, tokens: list[int], all_logits: bool) -> Tensor:
        """Logits `[1, vocab]` after the last token, or `[tokens, vocab]` after every one."""
        positions = list(range(step.start, step.start + step.count))
        logits = self._forward(step, [tokens], [positions], 0 if all_logits else 1)[0]
        step.finish()
        return logits

    def _extra(self, keep: int) -> dict[str, int]:
        return {"logits_to_keep": keep} if self._keeps_logits else {}

    def _forward(
        self, step: DecodeStep | PrefillStep, tokens: list[list[int]], positions: list[list[int]], keep: int
    ) -> Tensor:
        device = self.shape.device
        logits: Tensor = self.model(
            input_ids=torch.tensor(tokens, device=device),
            position_ids=torch.tensor(positions, device=device),
            past_key_values=RaggedCache(step, len(self.shape.layers)),
            use_cache=True,
            **self._extra(keep),
        ).logits
        return logits[:, -keep:] if keep else logits


@torch.inference_mode()
def invariant_rows(model: Any, max_rows: int) -> int:
    """The least number of rows in whose multiples, up to `max_rows`, each row of the model's linear layers
    comes out the same to the bit; `max_rows` where there is none.

    Matrix products sum in an order that depends on their shape, so a request could get other numbers in
    a batch than alone. Which shapes agree is a property of the machine's library: it is tried out.
    """
    shapes: dict[tuple[Any, ...], nn.Linear] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shapes.setdefault((module.in_features, module.out_features, module.weight.dtype), module)
    for multiple in (1, 4, 8, 16, 32, 64):
        if multiple >= max_rows:
            break
        counts = {multiple * factor for factor in (1, 2, 3, 4, 5, 8, 16)} | {
            -(-max_rows // multiple) * multiple
        }
        if all(
            _agree(layer, sorted(count for count in counts if count <= max_rows + multiple))
            for layer in shapes.values()
        ):
            return multiple
    return max_rows


def _agree(layer: nn.Linear, counts: list[int]) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((counts[-1], 1, layer.in_features), generator=generator)
    rows = rows.to(layer.weight.device, layer.weight.dtype)
    whole = F.linear(rows, layer.weight, layer.bias)
    return all(
        torch.equal(F.linear(rows[:count], layer.weight, layer.bias), whole[:count]) for count in counts
    )
