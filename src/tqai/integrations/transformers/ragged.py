"""`RaggedCache`: a transformers cache whose tokens live elsewhere, for batches of ragged sequences.

A server keeps pages and exact tokens of many requests in tensors of its own. It passes this object as
`past_key_values`; each layer's `update` goes to a `RaggedStore`, which returns the step to attend to,
and the attention function "tqai" hands the query back to the same store. Masks belong to the step:
sequences differ in length, so the one that transformers would make says nothing.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from tqai.backends.base import Attended, ExactTokens
from tqai.errors import UnsupportedError
from tqai.integrations.transformers.handles import KeyValuePair

__all__ = ["RaggedCache", "RaggedStep", "RaggedStore"]


class RaggedStore(Protocol):
    """Where the tokens of a ragged batch live."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Take the new tokens `[batch, kv_heads, new_tokens, head_dim]` of one layer in."""

    def attend_layer(self, layer: int, query: Tensor, scaling: float, softcap: float | None) -> Attended:
        """Attention of `query` `[batch, query_heads, new_tokens, head_dim]` of that layer over what each
        sequence sees, the tokens of the last `update` included."""


class RaggedStep:
    """What stands behind the handles of one layer: the form that the attention function expects of a
    store and its step, over a `RaggedStore`."""

    is_exact = False

    def __init__(self, source: RaggedStore, layer: int, keys: Tensor, values: Tensor) -> None:
        self.source = source
        self.layer = layer
        self.recent = ExactTokens(keys, values)
        self.tokens = int(keys.shape[2])

    def attend(
        self, step: Any, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
    ) -> Attended:
        """Attention over the step; `mask` is transformers' and says nothing here."""
        return self.source.attend_layer(self.layer, query, scaling, softcap)

    def materialize(self, step: Any) -> ExactTokens:
        """Raises UnsupportedError: a ragged history has no form as one tensor."""
        raise UnsupportedError(
            f"the model works on the keys or values of layer {self.layer} between cache and attention: "
            "it cannot be served by continuous batching"
        )


class _RaggedLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, store: RaggedStore, index: int) -> None:
        super().__init__()
        self.store, self.index = store, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is made here."""

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.store.update(self.index, key_states, value_states)
        step: Any = RaggedStep(self.store, self.index, key_states, value_states)
        return KeyValuePair(step, step).handles()

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1


class RaggedCache(Cache):
    """See the module's text; holds nothing itself."""

    def __init__(self, store: RaggedStore, layers: int) -> None:
        super().__init__(layers=[_RaggedLayer(store, index) for index in range(layers)])
