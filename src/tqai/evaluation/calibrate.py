"""Calibration: what each width of each layer's keys and values costs a model, measured in the loop.

For every layer, side and width a text is read in chunks through a cache in which everything else has
`REFERENCE_BITS`; the cost is the mean KL against the uncompressed model, less that of the cache with
`REFERENCE_BITS` everywhere. Costs of several layers add up about (the KL is quadratic in small errors, and
errors of different layers are independent); `Calibration.layer_bits` spends a budget by them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tqai.cache.bit_plan import WIDTHS, LayerShape, SideErrors
from tqai.cache.calibration import Calibration
from tqai.config import CacheConfig
from tqai.errors import InputError
from tqai.evaluation.chunked import CHUNK_TOKENS, as_batch, chunked_logits
from tqai.evaluation.scores import score_logits

__all__ = ["REFERENCE_BITS", "calibrate", "calibration_runs"]

REFERENCE_BITS = {"scalar": 8, "qjl": 8}
"""Bits of all that is not being measured, by codec; 4 for codecs that have no 8."""
LEAST_PREFILL_TOKENS = 64


@dataclass(frozen=True)
class _Reader:
    """A text, read through caches of one configuration but for the bits."""

    model: Any
    input_ids: Tensor
    config: CacheConfig
    prefill_tokens: int
    chunk_tokens: int

    def logits(self, make_cache: Callable[[], Any]) -> Tensor:
        return chunked_logits(self.model, self.input_ids, make_cache, self.prefill_tokens, self.chunk_tokens)

    def kl(self, reference: Tensor, layer_bits: list[tuple[int, int]], seen: list[Any]) -> float:
        from tqai.integrations.transformers import TurboQuantCache

        config = self.config.with_changes(
            layer_bits=tuple(layer_bits), last_layer_bits=None, bits_budget=None
        )

        def make_cache() -> Any:
            seen[:] = [TurboQuantCache(self.model, config=config)]
            return seen[0]

        logits = self.logits(make_cache)
        targets = self.input_ids[0, self.prefill_tokens + 1 :]
        return float(score_logits(reference[0], logits[0], targets).kl.mean())


def calibration_runs(layers: int) -> int:
    """How often the text is read for a model with so many compressed layers."""
    return 2 + 2 * layers * len(WIDTHS)


def calibrate(
    model: Any,
    input_ids: Tensor,
    config: CacheConfig | None = None,
    prefill_tokens: int = 512,
    chunk_tokens: int = CHUNK_TOKENS,
    on_run: Callable[[int], None] | None = None,
) -> Calibration:
    """Measure `model` on one text.

    Args:
        model: a transformers causal language model in evaluation mode.
        input_ids: int64 `[tokens]` or `[1, tokens]`, longer than `prefill_tokens` by a few hundred.
        config: codec, rotation, window and so on of the caches; its bits do not matter.
        prefill_tokens, chunk_tokens: see `chunked_logits`.
        on_run: called with the number of readings done, of `calibration_runs`.

    Raises:
        InputError: lengths that do not fit, or a prefill too short to fill a page.
    """
    from transformers import DynamicCache

    from tqai.integrations.transformers import TurboQuantCache
    from tqai.integrations.transformers.saving import fingerprint

    config = CacheConfig() if config is None else config
    batch = as_batch(input_ids, model)
    least = LEAST_PREFILL_TOKENS + config.window_tokens + config.sink_tokens
    if prefill_tokens < least:
        raise InputError(
            f"prefill_tokens={prefill_tokens}: allowed are {least} or more, so that a page is compressed"
        )
    reader = _Reader(model, batch, config, prefill_tokens, chunk_tokens)
    reference = reader.logits(lambda: DynamicCache(config=model.config))
    high = REFERENCE_BITS.get(config.codec, max(WIDTHS))
    layers = TurboQuantCache(model, config=config.with_changes(bits_budget=None, layer_bits=None)).layers
    compressed = [index for index, layer in enumerate(layers) if hasattr(layer, "store")]
    bits = [(high, high)] * len(layers)
    seen: list[Any] = []
    floor, done = reader.kl(reference, bits, seen), 2
    shapes = {index: _shape(seen[0].layers[index].store) for index in compressed}
    found: list[tuple[LayerShape, SideErrors] | None] = [None] * len(layers)
    for index in compressed:
        sides = []
        for side in (0, 1):
            errors: dict[int, float] = {}
            for width in WIDTHS:
                pair = (width, high) if side == 0 else (high, width)
                changed = [*bits[:index], pair, *bits[index + 1 :]]
                errors[width] = max(reader.kl(reference, changed, seen) - floor, 0.0)
                done += 1
                if on_run is not None:
                    on_run(done)
            sides.append(_falling(errors))
        found[index] = (shapes[index], SideErrors(*sides))
    about = {
        "tokens": batch.shape[1],
        "prefill_tokens": prefill_tokens,
        "chunk_tokens": chunk_tokens,
        "reference_bits": high,
        "reference_kl": floor,
        "settings": config.to_dict(),
    }
    return Calibration(tuple(found), "kl", fingerprint(model), about)


def _falling(errors: dict[int, float]) -> dict[int, float]:
    """Errors that do not rise with the width: what noise does to small ones is taken out."""
    least = float("inf")
    for width in sorted(errors):
        least = errors[width] = min(errors[width], least)
    return errors


def _shape(store: Any) -> LayerShape:
    keys, values = store.window.keys, store.window.values
    return LayerShape(
        keys.shape[1], keys.shape[3], values.shape[3], keys.element_size(), store.sliding_window
    )
