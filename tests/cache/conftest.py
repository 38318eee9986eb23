"""An oracle for a compressed layer: plain lists of tokens, pages re-made from core's codec."""

from __future__ import annotations

import pytest
import torch

from tqai.cache.layer import CompressedLayer, page_format_for
from tqai.config import CacheConfig


class LayerOracle:
    """Every token as it came; `expected` says what the layer must hold of them now.

    A token is either exact or was encoded once by core; which, follows from how many pages there are.
    """

    def __init__(self, config: CacheConfig, dim: int) -> None:
        self.config = config
        self.format = page_format_for(config, dim, dim)
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.coded = 0

    def append(self, keys, values):
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 2)
        self.values = values if self.values is None else torch.cat([self.values, values], 2)
        sinks = min(self.config.sink_tokens, self.keys.shape[2])
        full = max(self.keys.shape[2] - sinks - self.config.window_tokens, 0) // 64
        for page in range(self.coded, full):
            span = slice(sinks + 64 * page, sinks + 64 * page + 64)
            for tokens, codec in ((self.keys, self.format.key), (self.values, self.format.value)):
                encoded = codec.encode(tokens[:, :, span].double().numpy())
                tokens[:, :, span] = torch.from_numpy(codec.decode(encoded)).to(tokens.dtype)
        self.coded = max(self.coded, full)

    def crop(self, count):
        self.keys = self.keys[:, :, : self.keys.shape[2] - count].clone()
        self.values = self.values[:, :, : self.values.shape[2] - count].clone()
        kept = max(self.keys.shape[2] - self.config.sink_tokens, 0) // 64
        self.coded = min(self.coded, kept)

    def select(self, rows):
        self.keys, self.values = self.keys[rows].clone(), self.values[rows].clone()


@pytest.fixture(scope="session")
def make_oracle():
    return LayerOracle


@pytest.fixture
def random_tokens():
    """Seeded keys and values `[batch, heads, tokens, dim]` of well spread norms."""

    def make(seed, batch, heads, tokens, dim, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        scale = torch.exp(torch.randn(batch, heads, tokens, 1, generator=generator))
        return tuple(
            (torch.randn(batch, heads, tokens, dim, generator=generator) * scale).to(dtype) for _ in "kv"
        )

    return make


@pytest.fixture
def filled_layer(random_tokens):
    """A layer that has taken `tokens` tokens in, in chunks of `chunk`."""

    def make(
        tokens, chunk=None, batch=1, heads=2, dim=64, sliding_window=None, dtype=torch.float32, **settings
    ):
        layer = CompressedLayer(CacheConfig(**settings), 0, sliding_window)
        keys, values = random_tokens(0, batch, heads, tokens, dim, dtype)
        chunk = chunk or tokens
        if not tokens:
            layer.prepare(keys, values)
        for start in range(0, tokens, chunk or 1):
            layer.append(keys[:, :, start : start + chunk], values[:, :, start : start + chunk])
        return layer

    return make
