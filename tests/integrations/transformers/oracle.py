"""The oracle: transformers' own dynamic layers whose completed pages pass through core's numpy codec.

It keeps plain tensors and returns plain tensors, so the model attends with torch's SDPA; all that it
shares with the cache under test is `tqai.core` and the rule for when a page is complete:

    with S sinks, a window of at least W tokens and N tokens seen before a step, that step sees the
    tokens S .. S + 64 * floor((N - S - W) / 64) - 1 as decode(encode(x)), all others as they were.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from tqai import CacheConfig
from tqai.core import packing
from tqai.core.codec import Codec, CodecSpec, Encoded, make_codec

PAGE = 64
EXACT = 1e-5
WITH_FLIPS = 1e-3
MAX_FLIPS = 6


class _CodedLayer:
    """Replaces what `update`, `crop` and the batch operations of a dynamic layer do."""

    config: CacheConfig

    def start(self, config: CacheConfig) -> None:
        self.config = config
        self.seen: list[Tensor] | None = None
        self.coded_tokens = 0
        self.codes: list[list[Encoded]] = [[], []]

    @property
    def sinks(self) -> int:
        return 0 if isinstance(self, DynamicSlidingWindowLayer) else self.config.sink_tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        new = [key_states, value_states]
        self.seen = (
            new if self.seen is None else [torch.cat(pair, 2) for pair in zip(self.seen, new, strict=True)]
        )
        self.is_initialized = True
        visible = tuple(self.seen)
        if isinstance(self, DynamicSlidingWindowLayer):
            visible = tuple(
                part[:, :, -(self.sliding_window - 1 + key_states.shape[2]) :] for part in self.seen
            )
        self.encode_complete_pages()
        self.keys, self.values = self.seen
        if isinstance(self, DynamicSlidingWindowLayer):
            self.cumulative_length = self.get_seq_length()
        return visible

    def encode_complete_pages(self) -> None:
        assert self.seen is not None
        tokens = self.seen[0].shape[2]
        pages = max(tokens - self.sinks - self.config.window_tokens, 0) // PAGE
        if pages * PAGE <= self.coded_tokens:
            return
        start, stop = self.sinks + self.coded_tokens, self.sinks + pages * PAGE
        for part, bits in enumerate((self.config.bits_k, self.config.bits_v)):
            exact = self.seen[part]
            codec = self.codec(exact.shape[3], bits)
            encoded = codec.encode(exact[:, :, start:stop].float().numpy())
            limit = torch.finfo(exact.dtype).max
            decoded = torch.from_numpy(codec.decode(encoded)).clamp(-limit, limit).to(exact.dtype)
            self.seen[part] = torch.cat([exact[:, :, :start], decoded, exact[:, :, stop:]], 2)
            self.codes[part].append(encoded)
        self.coded_tokens = pages * PAGE

    def codec(self, head_dim: int, bits: int) -> Codec:
        config = self.config
        return make_codec(CodecSpec(config.codec, head_dim, bits, config.rotation, config.scale, config.seed))

    def get_seq_length(self) -> int:
        return 0 if self.seen is None else self.seen[0].shape[2]

    def crop(self, tokens_to_remove: int) -> None:
        if isinstance(self, LinearAttentionLayer):
            LinearAttentionLayer.crop(self, tokens_to_remove)
        if self.seen is None or tokens_to_remove == 0:
            return
        kept = self.get_seq_length() + tokens_to_remove
        self.seen = [part[:, :, :kept] for part in self.seen]
        self.coded_tokens = min(self.coded_tokens, max(kept - self.sinks, 0) // PAGE * PAGE)
        for part in range(2):
            self.codes[part] = [
                Encoded(*(array[:, :, : self.coded_tokens] for array in self.all_codes(part)))
            ]
        if isinstance(self, DynamicSlidingWindowLayer):
            self.cumulative_length = kept

    def all_codes(self, part: int) -> Encoded:
        return Encoded(*(np.concatenate(arrays, axis=2) for arrays in zip(*self.codes[part], strict=True)))

    def select(self, rows: Tensor) -> None:
        if self.seen is not None:
            self.seen = self.keys, self.values = [part[rows] for part in self.seen]
            self.codes = [[Encoded(*(a[rows.numpy()] for a in e)) for e in codes] for codes in self.codes]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if isinstance(self, LinearAttentionLayer):
            LinearAttentionLayer.reorder_cache(self, beam_idx)
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen is not None:
            self.select(torch.arange(self.seen[0].shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)


class OracleLayer(_CodedLayer, DynamicLayer):
    """Sees everything before it."""


class OracleSlidingLayer(_CodedLayer, DynamicSlidingWindowLayer):
    """Sees a sliding window; keeps everything, unlike the layer under test."""


class OracleHybridLayer(_CodedLayer, LinearAttentionAndFullAttentionLayer):
    """Attention and a recurrent state."""


class OracleCache(DynamicCache):
    """A `DynamicCache` of coded layers."""

    def __init__(self, model: Any, config: CacheConfig) -> None:
        super().__init__(config=model.config)
        forms = {
            DynamicLayer: OracleLayer,
            DynamicSlidingWindowLayer: OracleSlidingLayer,
            LinearAttentionAndFullAttentionLayer: OracleHybridLayer,
        }
        for index, layer in enumerate(self.layers):
            if type(layer) not in forms:
                continue
            given = {
                name: getattr(layer, name)
                for name in ("sliding_window", "number_of_states")
                if hasattr(layer, name)
            }
            coded = forms[type(layer)](**given)
            coded.start(config)
            self.layers[index] = coded


def note_pages(cache: Any) -> dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]]:
    """Codes and scales of the pages that a compressed cache holds, added to those noted before (a
    sliding window drops pages), by layer, number of the page and part (0 keys, 1 values)."""
    noted = cache.__dict__.setdefault("pages_noted", {})
    for index, layer in enumerate(cache.layers):
        pool = getattr(getattr(layer, "store", None), "pool", None)
        if pool is None or not pool.pages:
            continue
        first = (layer.store.length - layer.store.held_tokens) // PAGE
        formats = (pool.page_format.key, pool.page_format.value)
        pages = layer.store.backend.to_canonical(pool.raw(), pool.page_format)
        for part, (held, codec) in enumerate(zip(pages, formats, strict=True)):
            codes = packing.unpack(held.codes, codec.spec.bits, codec.spec.head_dim)
            for page in range(pool.pages):
                noted[index, first + page, part] = codes[:, page], held.scales[:, page]
    return noted


def flips(cache: Any, oracle: OracleCache) -> int:
    """Codes and scales that differ between the pages of a cache and those of the oracle: coordinates
    within float32 rounding of a decision boundary, which two implementations may put on either side."""
    count = 0
    for (index, page, part), (codes, scales) in note_pages(cache).items():
        layer = oracle.layers[index]
        bits = (layer.config.bits_k, layer.config.bits_v)[part]
        expected = layer.all_codes(part)
        rows = slice(page * PAGE, (page + 1) * PAGE)
        expected_codes = packing.unpack(expected.codes[:, :, rows], bits, codes.shape[-1])
        count += int((codes != expected_codes).sum()) + int((scales != expected.scales[:, :, rows]).sum())
    return count


def distance(got: Tensor, expected: Tensor) -> float:
    """Relative L2 error of `got`, over everything at once."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm())


def assert_agrees(
    got: Tensor, expected: Tensor, cache: Any, oracle: OracleCache, tolerance: float = EXACT
) -> None:
    """`got` equals `expected` within `tolerance`; where a few codes flipped, within 1e-3 (a wrong scale,
    page or mask is far outside: see the mutations that test_oracle.py lists)."""
    error = distance(got, expected)
    flipped = flips(cache, oracle)
    assert flipped <= MAX_FLIPS, f"{flipped} codes differ from core's"
    assert error <= (max(tolerance, WITH_FLIPS) if flipped else tolerance), (
        f"relative error {error:.3g}, {flipped} flips"
    )
