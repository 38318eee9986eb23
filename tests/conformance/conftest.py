"""Every backend that loads here, and the float64 reference that each is held against."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

from tqai.backends import BACKENDS, load
from tqai.backends.base import ExactTokens
from tqai.cache.layer import page_format_for
from tqai.cache.pages import PagePool
from tqai.config import CacheConfig
from tqai.core.page import PAGE_TOKENS, decode_part
from tqai.errors import BackendError


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    """Each registered backend; skipped, with its own reason, where it does not load or has no device."""
    try:
        found = load(request.param)
    except BackendError as error:
        pytest.skip(str(error))
    refusal = found.refuses(page_format_for(CacheConfig(), 128, 128), "cpu", "float32")
    if refusal is not None:
        pytest.skip(f"{request.param} does not serve the CPU: {refusal}")
    return found


@pytest.fixture
def format_for(backend):
    """Page format of (bits_k, bits_v, key_dim, value_dim), skipped where the backend refuses it."""

    def make(bits_k, bits_v, key_dim, value_dim=None, **settings):
        config = CacheConfig(bits_k=bits_k, bits_v=bits_v, **settings)
        page_format = page_format_for(config, key_dim, value_dim or key_dim)
        refusal = backend.refuses(page_format, "cpu", "float32")
        if refusal is not None:
            pytest.skip(f"{backend.name}: {refusal}")
        return page_format

    return make


@dataclass
class Filled:
    """A pool filled by a backend, and the tokens that core decodes from its bytes, float64."""

    pool: PagePool
    keys: torch.Tensor
    values: torch.Tensor


@pytest.fixture
def fill(backend):
    """Encode raw keys and values `[batch, kv_heads, pages * 64, dim]` into a pool, several slabs if asked."""

    def make(page_format, keys, values, slabs=1):
        batch, heads, tokens, _ = keys.shape
        pool = PagePool(page_format, batch, heads, keys.device)
        pages = tokens // PAGE_TOKENS
        cuts = np.linspace(0, pages, slabs + 1).astype(int)
        for start, stop in pairwise(cuts):
            if stop == start:
                continue
            ids, buffer = pool.append(int(stop - start))
            buffer.fill_(0xFF)
            part = slice(start * PAGE_TOKENS, stop * PAGE_TOKENS)
            by_page = [
                x[:, :, part].unflatten(2, (-1, PAGE_TOKENS)).transpose(1, 2).flatten(0, 1)
                for x in (keys, values)
            ]
            backend.encode(*by_page, page_format, buffer)
            pool.commit(ids, buffer)
        canonical = backend.to_canonical(pool.raw(), page_format)
        decoded = []
        for codec, encoded in ((page_format.key, canonical.key), (page_format.value, canonical.value)):
            vectors = torch.from_numpy(decode_part(encoded, codec)).double()
            decoded.append(vectors.transpose(1, 2).flatten(2, 3))
        return Filled(pool, *decoded)

    return make


@pytest.fixture
def reference_attention():
    """Attention in float64 over explicit tokens: the definition, written out."""

    def attention(query, keys, values, mask, scaling, softcap=None):
        groups = query.shape[1] // keys.shape[1]
        keys, values = (x.double().repeat_interleave(groups, dim=1) for x in (keys, values))
        logits = scaling * query.double() @ keys.transpose(-1, -2)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        new_tokens, tokens = logits.shape[-2:]
        if mask is None:
            mask = torch.ones(new_tokens, tokens, dtype=torch.bool).tril(tokens - new_tokens)
        logits = logits.masked_fill(~mask, -torch.inf)
        lse = torch.logsumexp(logits, dim=-1)
        weights = torch.nan_to_num(torch.exp(logits - lse.unsqueeze(-1)), nan=0.0)
        seen = mask.expand(logits.shape).any(-2).unsqueeze(-1)
        return weights @ torch.where(seen, values, 0.0), lse

    return attention


@pytest.fixture
def exact_tokens():
    """Random exact tokens, laid out as a view into a larger buffer, as the window's are."""

    def make(generator, batch, heads, tokens, key_dim, value_dim, dtype):
        buffers = [
            torch.full((batch, heads, tokens + 5, dim), torch.nan, dtype=dtype)
            for dim in (key_dim, value_dim)
        ]
        for buffer in buffers:
            buffer[:, :, 3 : 3 + tokens] = torch.randn(
                buffer.shape[0], heads, tokens, buffer.shape[3], generator=generator
            ).to(dtype)
        return ExactTokens(*(buffer[:, :, 3 : 3 + tokens] for buffer in buffers))

    return make
