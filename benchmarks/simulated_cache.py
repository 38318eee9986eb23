"""A cache that is only as good as a compressed one, not as small: what a choice costs, before it is built.

Each layer keeps its keys and values, and a copy in which tokens that would be in pages have gone through
a codec and back; attention reads the copy. So every choice of widths, windows, scales and transforms can be
compared at the price of a few kernels. Offsets, codecs and the times at which pages are made are those of
`tqai.cache`; attention is transformers' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tqai.backends.base import ExactTokens
from tqai.backends.torch_ops.codes import TorchForm, torch_codec
from tqai.cache.offsets import estimate
from tqai.core.codec import CodecSpec, make_codec

PAGE_TOKENS = 64
RIDGE = 0.02  # added to second moments, of their mean
MOST_TRELLIS_BITS = 4


@dataclass(frozen=True)
class Choice:
    """What is simulated.

    Attributes:
        name: what tables call it.
        bits_k, bits_v: of all layers, or one number per layer.
        window, sinks: exact tokens, as `CacheConfig` has them.
        young, young_bits: so many tokens after the window have scalar codes of that width.
        scale: "bfloat16"; "log8"; or "log8 fine", bytes whose step suits the range of their page.
        balance: keys against queries: "off", per "pair" of RoPE, per pair by powers of two ("pair, 2^n"), by
            the energy of the keys alone ("keys"), or by whole second moments ("matrix").
        balance_values: "off", or values against the output projection by whole second moments ("matrix").
    """

    name: str
    bits_k: int | tuple[int, ...] = 3
    bits_v: int | tuple[int, ...] = 3
    codec: str = "trellis"
    window: int = 128
    sinks: int = 4
    young: int = 0
    young_bits: int = 8
    scale: str = "bfloat16"
    offsets: str = "auto"
    balance: str = "off"
    balance_values: str = "off"
    seed: int = 0

    def bits(self, layer: int) -> tuple[int, int]:
        """Bits of keys and values of a layer."""
        sides = (self.bits_k, self.bits_v)
        key, value = (side if isinstance(side, int) else side[layer] for side in sides)
        return key, value

    def all_in_bits(self, config: Any, tokens: int) -> float:
        """Bits per value of a bfloat16 model with this `config`, at `tokens` tokens, window at its mean."""
        dim, heads, layers = config.head_dim, config.num_key_value_heads, config.num_hidden_layers
        of_scale = 16 / dim if self.scale == "bfloat16" else 8 / dim + 128 / (2 * PAGE_TOKENS * dim)
        exact = self.sinks + self.window + (PAGE_TOKENS - 1) / 2
        old = tokens - exact - self.young
        total = 0.0
        for layer in range(layers):
            total += 16 * (exact + (self.offsets != "off")) + (self.young_bits + of_scale) * self.young
            total += (sum(self.bits(layer)) / 2 + of_scale) * old + 96 * old / PAGE_TOKENS / (2 * heads * dim)
        return total / tokens / layers


@dataclass(frozen=True)
class Moments:
    """Of one layer: second moments `[kv_heads, head_dim, head_dim]` of the queries of each KV head's group,
    and of what the output projection makes of that group's values."""

    queries: Tensor
    outputs: Tensor


class SimulatedLayer:
    """Tokens of one layer under a `Choice`."""

    def __init__(self, choice: Choice, layer: int, moments: Moments) -> None:
        self.choice, self.layer, self.moments = choice, layer, moments
        self.exact: list[Tensor] = []
        self.read: list[Tensor] = []
        self.old_pages = self.young_pages = 0
        self.offsets: list[Tensor | float] | None = None
        self.transforms: list[tuple[Tensor, Tensor] | None] = [None, None]

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take tokens in; returns what attention reads now."""
        new = [keys, values]
        self.exact = [torch.cat(pair, 2) for pair in zip(self.exact, new, strict=True)] if self.exact else new
        self.read = [torch.cat(pair, 2) for pair in zip(self.read, new, strict=True)] if self.read else new
        reads = self.read
        self._settle()
        return reads[0], reads[1]

    def _settle(self) -> None:
        choice, tokens = self.choice, self.exact[0].shape[2]
        young = max(tokens - choice.sinks - choice.window, 0) // PAGE_TOKENS
        old = max(tokens - choice.sinks - choice.window - choice.young, 0) // PAGE_TOKENS
        if young and self.offsets is None:
            self._freeze(choice.sinks + young * PAGE_TOKENS)
        if choice.young:
            self._code(max(self.young_pages, old), young, choice.young_bits)
            self.young_pages = young
        self._code(self.old_pages, old, None)
        self.old_pages = max(self.old_pages, old)

    def _freeze(self, stop: int) -> None:
        choice = self.choice
        paged = ExactTokens(*(part[:, :, choice.sinks : stop] for part in self.exact))
        found = None if choice.offsets == "off" else estimate(paged, choice.offsets)
        sides = (None, None) if found is None else (found.keys, found.values)
        self.offsets = [0.0 if side is None else side for side in sides]
        if choice.balance != "off":
            self.transforms[0] = _transform(
                choice.balance, paged.keys - self.offsets[0], self.moments.queries
            )
        if choice.balance_values != "off":
            plain = paged.values - self.offsets[1]
            self.transforms[1] = _transform(choice.balance_values, plain, self.moments.outputs)

    def _code(self, first: int, stop: int, width: int | None) -> None:
        """Code the pages first..stop-1, with scalar codes of `width` bits or as the choice says."""
        if stop <= first:
            return
        assert self.offsets is not None
        place = slice(self.choice.sinks + first * PAGE_TOKENS, self.choice.sinks + stop * PAGE_TOKENS)
        changed = [part.clone() for part in self.read]  # the step under way keeps what it has
        for side, bits in enumerate(self.choice.bits(self.layer)):
            offset, transform = self.offsets[side], self.transforms[side]
            plain = self.exact[side][:, :, place] - offset
            coded = self._through(plain if transform is None else plain @ transform[0], width or bits, width)
            changed[side][:, :, place] = (coded if transform is None else coded @ transform[1]) + offset
        self.read = changed

    def _through(self, vectors: Tensor, bits: int, width: int | None) -> Tensor:
        scalar = width is not None or bits > MOST_TRELLIS_BITS
        codec = "scalar" if scalar else self.choice.codec
        form = _form(codec, bits, vectors.shape[-1], self.choice.seed, vectors.device)
        codes, scales = form.encode(vectors)
        rounded = _rounded(scales, self.choice.scale)
        return (form.lookup(codes) @ form.rotation) * rounded.unsqueeze(-1)


@lru_cache(maxsize=256)
def _form(codec: str, bits: int, dim: int, seed: int, device: torch.device) -> TorchForm:
    return torch_codec(make_codec(CodecSpec(codec, dim, bits, "auto", "least_squares", seed)), device)


def _rounded(scales: Tensor, how: str) -> Tensor:
    """bfloat16 scales `[..., tokens]` of whole pages, as a scale format keeps them."""
    if how == "bfloat16":
        return scales.float()
    pages = scales.float().unflatten(-1, (-1, PAGE_TOKENS))
    base = pages.amax(-1, keepdim=True)
    octaves = torch.log2((pages / base.clamp_min(1e-30)).clamp_min(1e-30))
    if how == "log8":
        steps = torch.full_like(base, 16.0)
    else:
        span = (-octaves).amax(-1, keepdim=True).clamp_min(1e-9)
        steps = torch.exp2(torch.floor(torch.log2(253 / span)).clamp(4, 10))
    rounded = (octaves * steps).round().clamp_min(-253) / steps
    return (base * torch.exp2(rounded)).flatten(-2)


def _transform(how: str, vectors: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix `[batch, kv_heads, head_dim, head_dim]` for row vectors, and its inverse, for least error."""
    if how == "matrix":
        return _of_moments(vectors, moment)
    half = vectors.shape[-1] // 2
    of_vectors = vectors.square().mean(2)
    of_vectors = of_vectors[..., :half] + of_vectors[..., half:]
    diagonal = torch.diagonal(moment, dim1=-2, dim2=-1)
    other = (diagonal[..., :half] + diagonal[..., half:])[None].expand_as(of_vectors)
    if how == "keys":
        other = torch.ones_like(of_vectors)
    scale = (other / of_vectors.clamp_min(1e-12)).clamp(1e-6, 1e6) ** 0.25
    scale = (scale / torch.exp(torch.log(scale).mean(-1, keepdim=True))).clamp(1 / 32, 32)
    if how == "pair, 2^n":
        scale = torch.exp2(torch.log2(scale).round())
    both = torch.cat([scale, scale], -1)
    return torch.diag_embed(both), torch.diag_embed(1 / both)


def _of_moments(vectors: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """A A^T = C^-1/2 (C^1/2 M C^1/2)^1/2 C^-1/2 for the second moments C of the vectors and M."""
    eye = torch.eye(vectors.shape[-1], device=vectors.device, dtype=torch.float64)

    def mean(matrix: Tensor) -> Tensor:
        return torch.diagonal(matrix, dim1=-2, dim2=-1).mean(-1)[..., None, None]

    def power(matrix: Tensor, exponent: float) -> Tensor:
        values, vectors_ = torch.linalg.eigh(matrix)
        return (vectors_ * values.clamp_min(1e-12).pow(exponent).unsqueeze(-2)) @ vectors_.transpose(-1, -2)

    own = (vectors.transpose(-1, -2) @ vectors / vectors.shape[2]).double()
    other = moment.double()[None].expand_as(own)
    own, other = own + RIDGE * mean(own) * eye, other + RIDGE * mean(other) * eye
    root, inverse = power(own, 0.5), power(own, -0.5)
    matrix = power(inverse @ power(root @ other @ root, 0.5) @ inverse, 0.5)
    matrix = matrix / mean(matrix)
    return matrix.float(), torch.linalg.inv(matrix).float()


def simulated_cache(choice: Choice, model: Any, moments: list[Moments]) -> Any:
    """A `DynamicCache` whose layers give attention what a cache of this choice would."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        _simulate(layer, SimulatedLayer(choice, index, moments[index]))
    return cache


def _simulate(layer: Any, simulated: SimulatedLayer) -> None:
    def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        reads = simulated.update(keys, values)
        layer.is_initialized = True
        layer.keys, layer.values = simulated.exact
        return reads

    layer.update = update


def moments_of(model: Any, input_ids: Tensor) -> list[Moments]:
    """Of every layer, over `[1, tokens]` ids."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    queries: dict[int, Tensor] = {}

    def noting(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        queries[module.layer_idx] = query
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("noting", noting)
    AttentionMaskInterface.register("noting", sdpa_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = "noting"
    try:
        with torch.inference_mode():
            model(input_ids, use_cache=False)
    finally:
        model.config._attn_implementation = before
    heads, found = model.config.num_key_value_heads, []
    for index, layer in enumerate(model.model.layers):
        rows = queries[index].unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3)
        weight = layer.self_attn.o_proj.weight.detach().unflatten(1, (heads, -1, rows.shape[-1]))
        weight = weight.permute(1, 2, 0, 3)
        found.append(
            Moments(
                rows.transpose(-1, -2) @ rows / rows.shape[1],
                (weight.transpose(-1, -2) @ weight).sum(1),
            )
        )
    return found
