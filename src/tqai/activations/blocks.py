"""The parts of a transformers model that activations flow through, found by what they are called."""

from __future__ import annotations

from torch import nn

from tqai.errors import UnsupportedError

__all__ = ["attention_modules", "decoder_layers", "feed_forward_blocks"]

FEED_FORWARD_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc1")


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that attend with a cache: their class is called "...Attention..." and they know their layer."""
    return [
        module
        for module in model.modules()
        if "Attention" in type(module).__name__ and hasattr(module, "layer_idx")
    ]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that hold an attention module each, in order; empty where there are none."""
    attentions = {id(module) for module in attention_modules(model)}
    return [module for module in model.modules() if any(id(part) in attentions for part in module.children())]


def feed_forward_blocks(model: nn.Module) -> list[nn.Module]:
    """The feed-forward block of every decoder layer, in order (its first linear map, where it has no module).

    Raises:
        UnsupportedError: a decoder layer without one.
    """
    found = []
    for layer in decoder_layers(model):
        parts = dict(layer.named_children())
        name = next((name for name in FEED_FORWARD_NAMES if name in parts), None)
        if name is None:
            raise UnsupportedError(
                f"{type(layer).__name__} has no feed-forward block that tqai knows; looked for "
                f"{', '.join(FEED_FORWARD_NAMES)} among {', '.join(parts)}"
            )
        found.append(parts[name])
    return found
