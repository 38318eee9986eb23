"""How far each layer's attention output is from what it would be with an uncompressed cache.

    local        the layer gets the hidden states of the uncompressed model, so its error is its own cache's
    accumulated  the layer gets what the layers before it made of theirs, as when the cache is used

Errors are |got - expected| / |expected|, root mean square over tokens, of the attention module's output
(after the output projection).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tqai.errors import UnsupportedError
from tqai.evaluation.caches import CacheMaker, cache_maker
from tqai.evaluation.chunked import CHUNK_TOKENS, as_batch, chunk_bounds, run_tokens, warn_if_never_read
from tqai.evaluation.prefill import prefill_caches

__all__ = ["AttentionErrors", "attention_errors"]


@dataclass(frozen=True)
class AttentionErrors:
    """Relative errors of one cache, one number per layer."""

    name: str
    local: tuple[float, ...]
    accumulated: tuple[float, ...]

    def to_dict(self) -> dict[str, list[float]]:
        """Plain numbers, fit for JSON."""
        return {"local": list(self.local), "accumulated": list(self.accumulated)}


def attention_errors(
    model: Any,
    input_ids: Tensor,
    makers: Sequence[CacheMaker],
    prefill_tokens: int,
    chunk_tokens: int = CHUNK_TOKENS,
) -> dict[str, AttentionErrors]:
    """Errors of each cache over the tokens of one text after the prefill.

    Args:
        model: a transformers causal language model whose decoder layers hold a `self_attn`.
        input_ids: int64 `[tokens]`.
        makers: the caches, with different names.
        prefill_tokens, chunk_tokens: see `chunked_logits`.

    Returns:
        name -> errors, in the order of `makers`.

    Raises:
        InputError: lengths that do not fit.
        UnsupportedError: the decoder layers of this model are not found.
    """
    batch = as_batch(input_ids, model)
    layers = _decoder_layers(model)
    warn_if_never_read(batch.shape[1], prefill_tokens, chunk_tokens)
    everyone = [cache_maker("dynamic", model, label="reference"), *makers]
    caches = prefill_caches(model, batch[:, :prefill_tokens], everyone)
    fed = prefill_caches(model, batch[:, :prefill_tokens], makers)
    power = torch.zeros(len(layers), dtype=torch.float64)
    square = {maker.name: torch.zeros(2, len(layers), dtype=torch.float64) for maker in makers}
    for start, stop in chunk_bounds(batch.shape[1], prefill_tokens, chunk_tokens):
        chunk = batch[:, start:stop]
        inputs: list[Tensor] = []
        expected = _outputs(model, layers, chunk, caches[0], inputs.append)
        power += _energy(expected)
        for maker, cache, fed_cache in zip(makers, caches[1:], fed, strict=True):
            with _fed_with(layers, inputs):
                local = _outputs(model, layers, chunk, fed_cache)
            used = _outputs(model, layers, chunk, cache)
            for row, got in enumerate((local, used)):
                square[maker.name][row] += _energy(
                    [mine - theirs for mine, theirs in zip(got, expected, strict=True)]
                )
    return {
        name: AttentionErrors(name, *(tuple((row / power).sqrt().tolist()) for row in found))
        for name, found in square.items()
    }


def _decoder_layers(model: Any) -> list[Any]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = list(getattr(decoder, "layers", ()))
    if not layers or not all(hasattr(layer, "self_attn") for layer in layers):
        raise UnsupportedError(
            f"{type(model).__name__}: attention errors want decoder layers that hold a self_attn"
        )
    return layers


def _outputs(
    model: Any, layers: list[Any], chunk: Tensor, cache: Any, on_input: Callable[[Tensor], None] | None = None
) -> list[Tensor]:
    """The attention outputs of all layers in one pass; `on_input` is told what enters each layer."""
    found: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in layers
    ]
    if on_input is not None:
        hooks += [layer.register_forward_pre_hook(lambda module, args: on_input(args[0])) for layer in layers]
    try:
        run_tokens(model, chunk, cache, last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _fed_with(layers: list[Any], inputs: list[Tensor]) -> Iterator[None]:
    """Every layer gets the given hidden states instead of those of the layer before it."""

    def feeding(hidden: Tensor) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda module, args: (hidden, *args[1:])

    hooks = [
        layer.register_forward_pre_hook(feeding(hidden)) for layer, hidden in zip(layers, inputs, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _energy(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.double().square().sum().cpu() for tensor in tensors])
