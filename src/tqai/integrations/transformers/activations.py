"""`ActivationStudy`: hidden states, feed-forward inputs and attention logits rounded as they flow.

What is rounded is used at once and never stored, so this saves no memory at inference: it shows how
sensitive a model is to so many bits at that place. To save memory in training: `tqai.compress_activations`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tqai.activations.blocks import attention_modules, decoder_layers, feed_forward_blocks
from tqai.activations.rounding import LOGIT_BITS
from tqai.activations.vectors import rounded
from tqai.config import CacheConfig
from tqai.errors import UnsupportedError

__all__ = ["ActivationStudy"]


class ActivationStudy:
    """Rounding of a model's activations, as the fields `compress_hidden`, `compress_ffn`,
    `compress_attn_logits` of a `CacheConfig` and their bits say. Also a context manager.

    hidden: the residual stream that enters each decoder layer
    ffn:    what enters each feed-forward block
    logits: each query's attention logits, on 2**bits levels evenly between its least and greatest

    The logits need tqai's attention function, which `tqai.patch` sets; attaching to a model that is not
    patched sets it, and detaching takes it away again.
    """

    def __init__(self, model: Any, config: CacheConfig) -> None:
        self.model = model
        self.config = config
        self._handles: list[Any] = []
        self._switched = False

    def attach(self) -> ActivationStudy:
        """Round from the next forward pass on. Harmless when repeated.

        Raises:
            UnsupportedError: the model has no such parts, or its attention cannot be replaced.
        """
        if self._handles:
            return self
        attentions = attention_modules(self.model)
        if not attentions:
            raise UnsupportedError(f"{type(self.model).__name__} has no attention modules that tqai knows")
        blocks = []
        if self.config.compress_hidden:
            blocks += [(layer, self.config.bits_hidden) for layer in decoder_layers(self.model)]
        if self.config.compress_ffn:
            blocks += [(block, self.config.bits_ffn) for block in feed_forward_blocks(self.model)]
        if self.config.compress_attn_logits:
            self._take_over_attention()
            self._handles += [_Mark(module, self.config.bits_attn) for module in attentions]
        for block, bits in blocks:
            self._handles.append(block.register_forward_pre_hook(_Rounding(bits), with_kwargs=True))
        return self

    def detach(self) -> None:
        """Leave the activations alone again. Harmless when repeated."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._switched:
            from tqai.integrations.transformers.patching import release_attention

            self._switched = False
            release_attention(self.model)

    def __enter__(self) -> ActivationStudy:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _take_over_attention(self) -> None:
        from tqai.integrations.transformers.patching import attend_on_codes, is_taken_over

        self._switched = not is_taken_over(self.model)
        if not attend_on_codes(self.model):
            raise UnsupportedError(
                f"{type(self.model).__name__} does not let its attention function be chosen, so its logits "
                "cannot be rounded"
            )


class _Rounding:
    """Forward pre-hook that rounds the hidden states, the first tensor that a module is given."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            return (rounded(args[0], self.bits), *args[1:]), kwargs
        name = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
        if name is None:
            raise UnsupportedError(f"{type(module).__name__} is given no tensor to round")
        return args, {**kwargs, name: rounded(kwargs[name], self.bits)}


class _Mark:
    """Number of bits on an attention module, read by the attention function."""

    def __init__(self, module: Any, bits: int) -> None:
        self.module = module
        setattr(module, LOGIT_BITS, bits)

    def remove(self) -> None:
        if hasattr(self.module, LOGIT_BITS):
            delattr(self.module, LOGIT_BITS)
