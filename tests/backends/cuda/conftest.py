"""The CUDA backend and a float64 reference on the GPU, for the tests that need one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tqai.backends import load
from tqai.backends.base import ExactTokens, History
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat
from tqai.errors import BackendError, ConfigError


@pytest.fixture(scope="session")
def cuda_backend():
    """The backend; skipped with the reason where there is no GPU or no compiler for it."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    try:
        return load("cuda")
    except ConfigError:
        from tqai.backends.cuda import CudaBackend

        return CudaBackend()
    except BackendError as error:
        pytest.skip(str(error))


def formats(bits_k, bits_v, key_dim, value_dim=None, **spec):
    return PageFormat(
        make_codec(CodecSpec("scalar", key_dim, bits_k, **spec)),
        make_codec(CodecSpec("scalar", value_dim or key_dim, bits_v, seed=1, **spec)),
    )


@dataclass
class Case:
    """A query, its history in pages, and what float64 attention needs."""

    page_format: PageFormat
    query: torch.Tensor
    raw: torch.Tensor
    history: History
    sinks: ExactTokens | None
    recent: ExactTokens

    def all_tokens(self):
        """Keys and values of sinks, history and recent tokens, float64, history decoded by core."""
        from tqai.backends.cuda.layout import plain_pages

        batch, heads = self.query.shape[0], self.recent.keys.shape[1]
        pages = plain_pages(self.raw.cpu().numpy(), self.page_format)
        sides = []
        both = ((self.page_format.key, pages.key), (self.page_format.value, pages.value))
        for at, (codec, encoded) in enumerate(both):
            decoded = torch.from_numpy(codec.decode(encoded)).cuda().double()
            dim = decoded.shape[-1]
            decoded = decoded.view(batch, -1, heads, 64, dim).transpose(1, 2).reshape(batch, heads, -1, dim)
            parts = [decoded[:, :, self.history.first_token :], self.recent[at].double()]
            if self.sinks is not None:
                parts.insert(0, self.sinks[at].double())
            sides.append(torch.cat(parts, 2))
        return sides


def make_case(
    backend,
    page_format,
    batch=1,
    kv_heads=2,
    group=4,
    new_tokens=1,
    pages=5,
    recent=70,
    sinks=0,
    first_token=0,
    dtype=torch.bfloat16,
    seed=0,
    query_scale=1.0,
    edit=None,
):
    """Random tokens, encoded into poisoned pages; `edit(keys, values)` may alter them first."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    dim_k, dim_v = page_format.key.spec.head_dim, page_format.value.spec.head_dim
    keys, values = draw(batch * pages, kv_heads, 64, dim_k), draw(batch * pages, kv_heads, 64, dim_v)
    if edit is not None:
        edit(keys, values)
    raw = torch.full(
        (batch * pages, kv_heads, page_format.page_bytes), 0xFF, dtype=torch.uint8, device="cuda"
    )
    if pages:
        backend.encode(keys, values, page_format, raw)
    ids = torch.arange(batch * pages, device="cuda").view(batch, pages)
    # Wider than the pages, as the cache has it; the rest must not be read.
    addresses = torch.full((batch, pages + 3), -1, dtype=torch.int64, device="cuda")
    addresses[:, :pages] = raw.data_ptr() + ids * raw.stride(0)
    history = History(page_format, [raw], [0], ids.cpu().int().numpy(), addresses, first_token)
    return Case(
        page_format,
        draw(batch, kv_heads * group, new_tokens, dim_k) * query_scale,
        raw,
        history,
        ExactTokens(draw(batch, kv_heads, sinks, dim_k), draw(batch, kv_heads, sinks, dim_v))
        if sinks
        else None,
        ExactTokens(draw(batch, kv_heads, recent, dim_k), draw(batch, kv_heads, recent, dim_v)),
    )


def causal(case):
    """Which tokens each query sees without a mask, bool `[1, 1, new_tokens, tokens]`."""
    new = case.query.shape[2]
    sinks = case.sinks.keys.shape[2] if case.sinks is not None else 0
    tokens = sinks + case.history.tokens + case.recent.keys.shape[2]
    index = torch.arange(tokens, device="cuda")
    return (index <= torch.arange(tokens - new, tokens, device="cuda")[:, None])[None, None]


def reference(case, seen, scaling, softcap=None):
    """Float64 attention and log-sum-exp; unseen tokens are taken out, not weighed by 0."""
    keys, values = case.all_tokens()
    group = case.query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    logits = case.query.double() @ keys.nan_to_num(0.0).transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    weights = (logits - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)).exp()
    return weights @ values.nan_to_num(0.0), lse


def relative(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()
