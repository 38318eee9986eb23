"""`Step`: what one attention step of one layer reads."""

from __future__ import annotations

from dataclasses import dataclass

from tqai.backends import Choice
from tqai.backends.base import Backend, ExactTokens, History
from tqai.backends.torch_ops.attention import gather_pages
from tqai.cache.offsets import Offsets
from tqai.cache.window import joined

__all__ = ["Serving", "Step"]


@dataclass
class Serving:
    """The backend that a layer's pages are written for. When it fails and its pages are rewritten for
    another, steps that are under way read them by that one, too."""

    choice: Choice


@dataclass(frozen=True)
class Step:
    """The tokens in sight of a step, in order: sinks, compressed history, recent exact tokens.

    It describes the layer as it was when the step's own tokens arrived: `recent` ends with them,
    uncompressed, even if the layer has put them into pages since. All three are without `offsets`.
    """

    serving: Serving
    sinks: ExactTokens | None
    history: History | None
    recent: ExactTokens
    new_tokens: int
    offsets: Offsets | None = None

    @property
    def backend(self) -> Backend:
        """The backend in use."""
        return self.serving.choice.backend

    @property
    def tokens(self) -> int:
        """Tokens in sight per sequence."""
        exact = self.recent.keys.shape[2] + (self.sinks.keys.shape[2] if self.sinks is not None else 0)
        return int(exact) + (self.history.tokens if self.history is not None else 0)

    @property
    def is_exact(self) -> bool:
        """Whether the step's own tokens are all that is in sight, so that nothing was ever compressed."""
        return self.history is None and self.sinks is None

    def materialize(self, decoded: ExactTokens | None = None) -> ExactTokens:
        """All keys and values in sight, `[batch, kv_heads, tokens, head_dim]`, in the model's dtype.

        `decoded` may bring the history already decompressed. The result is transient: the cache
        keeps none of it.
        """
        tokens = self.recent
        if self.history is not None:
            if decoded is None:
                decoded = self.decode_history(self.history)
            tokens = joined(decoded, tokens)
        tokens = tokens if self.sinks is None else joined(self.sinks, tokens)
        return tokens if self.offsets is None else self.offsets.put_back(tokens)

    def decode_history(self, history: History) -> ExactTokens:
        """The compressed tokens of `history`, decompressed, in the dtype of the recent ones; no offsets."""
        raw = gather_pages(history, 0, history.pages)
        parts = self.backend.decode(raw, history.page_format, self.recent.keys.dtype)
        in_order = (part.transpose(1, 2).flatten(2, 3) for part in parts)
        return ExactTokens(*(part[:, :, history.first_token :] for part in in_order))
