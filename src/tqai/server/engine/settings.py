"""`EngineSettings`: what an engine is made with, validated once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tqai.config import FALLBACK_PRESET, CacheConfig
from tqai.core.page import PAGE_TOKENS
from tqai.errors import ConfigError

__all__ = ["SERVER_PRESET", "EngineSettings", "refuses"]

SERVER_PRESET = FALLBACK_PRESET
"""What is served where nobody says how to compress: scalar codes, which are encoded in microseconds. A page
of trellis codes takes half a millisecond per layer on a GPU, and in a full batch some sequence completes one
at nearly every step. `--config balanced` asks for them."""
NOT_SERVED = ("bits_budget", "compress_hidden", "compress_ffn", "compress_attn_logits")
"""Fields of `CacheConfig` that make the size of a page depend on the first prompt, or change the model."""


def refuses(cache: CacheConfig) -> str | None:
    """Why continuous batching does not serve a configuration, or None."""
    plain = CacheConfig()
    for name in NOT_SERVED:
        if getattr(cache, name, None) != getattr(plain, name, None):
            return (
                f"{name}={getattr(cache, name)!r}: not served by continuous batching; "
                f"allowed is {getattr(plain, name)!r}"
            )
    return None


@dataclass(frozen=True)
class EngineSettings:
    """How requests are batched and what they may take.

    Attributes:
        cache: how pages are compressed; None keeps them in the model's dtype.
        max_running: requests that decode at the same time.
        max_waiting: requests that may wait; one more is refused (HTTP 429).
        chunk_tokens: prompt tokens per prefill step, a multiple of 64. The gap between two tokens of a
            running request is at most one such step and one decode step.
        max_kv_bytes: size of the page pool; None takes it from the free memory.
        max_model_len: most tokens of prompt and output together; None: what the model's positions reach.
        prefix_caching: share complete chunks of pages between requests.
        seed: seed of requests that bring none, combined with the request's number.

    Raises:
        ConfigError: a field is out of range.
    """

    cache: CacheConfig | None = field(default_factory=lambda: CacheConfig.preset(SERVER_PRESET))
    max_running: int = 32
    max_waiting: int = 256
    chunk_tokens: int = 256
    max_kv_bytes: int | None = None
    max_model_len: int | None = None
    prefix_caching: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "max_running": (1, 4096),
            "max_waiting": (0, 1 << 20),
            "chunk_tokens": (PAGE_TOKENS, 1 << 16),
            "max_kv_bytes": (1, 1 << 50),
            "max_model_len": (2, 1 << 30),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is None and name.endswith(("_bytes", "_len")):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{name}={value!r}: allowed are whole numbers from {low} to {high}")
        if self.chunk_tokens % PAGE_TOKENS:
            raise ConfigError(f"chunk_tokens={self.chunk_tokens}: allowed are multiples of {PAGE_TOKENS}")
        if self.cache is not None and self.cache.cache_strategy not in ("auto", "residual"):
            raise ConfigError(
                f"cache_strategy={self.cache.cache_strategy!r}: the server attends on the codes; "
                "allowed are auto and residual"
            )
        if self.cache is not None:
            reason = refuses(self.cache)
            if reason is not None:
                raise ConfigError(reason)

    def for_layers(self, layers: int) -> EngineSettings:
        """The same for a model of so many layers: `last_layer_bits` written out."""
        return self if self.cache is None else replace(self, cache=self.cache.by_layer(layers))

    @property
    def sink_tokens(self) -> int:
        """First tokens of every sequence that stay exact."""
        return 0 if self.cache is None else self.cache.sink_tokens

    @property
    def window_tokens(self) -> int:
        """Least number of newest tokens that stay exact."""
        return 0 if self.cache is None else self.cache.window_tokens

    def cache_of(self, layer: int) -> CacheConfig | None:
        """The cache configuration of one layer; None where pages are uncompressed."""
        cache = self.cache
        if cache is None or cache.layer_bits is None:
            return cache
        if layer >= len(cache.layer_bits):
            raise ConfigError(f"layer_bits has {len(cache.layer_bits)} layers, the model more")
        return cache.for_layer(layer)

    @property
    def label(self) -> str:
        """Short name of the page format."""
        return "uncompressed" if self.cache is None else self.cache.label
