"""The native backend on every instruction set of this machine, and histories of random pages."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch

from tqai.backends import load
from tqai.backends.base import History
from tqai.cache.layer import page_format_for
from tqai.config import CacheConfig
from tqai.core.page import PAGE_TOKENS
from tqai.errors import BackendError

ARM = platform.machine().lower() in ("arm64", "aarch64")
ISAS = ("scalar", "neon") if ARM else ("scalar", "avx2", "avx512")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def native():
    """The loaded backend; skipped, with the loader's reason, where it was not built."""
    try:
        return load("native")
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture
def isas(native):
    """Names of the instruction sets that this machine has; the one in use is put back afterwards."""
    before = native.isa
    here = [name for name in ISAS if native.use_isa(name)]
    native.use_isa(before)
    yield here
    native.use_isa(before)


@pytest.fixture(params=ISAS)
def each_isa(request, native):
    """The backend computing with one instruction set."""
    before = native.isa
    if not native.use_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield native
    native.use_isa(before)


@pytest.fixture
def page_format():
    """Page format of (bits_k, bits_v, key_dim, value_dim)."""

    def make(bits_k=4, bits_v=4, key_dim=128, value_dim=None, **settings):
        return page_format_for(
            CacheConfig(bits_k=bits_k, bits_v=bits_v, **settings), key_dim, value_dim or key_dim
        )

    return make


@pytest.fixture
def history(native):
    """Pages of random tokens in shuffled order in memory, and the tokens decoded from them by core.

    Returns (History, keys, values), tokens float64 `[batch, kv_heads, tokens in sight, dim]`.
    """

    def make(page_format, batch, heads, pages, first_token=0, seed=0, slack=0, mean_value=0.0):
        generator = torch.Generator().manual_seed(seed)
        shape = (batch * pages, heads, PAGE_TOKENS)
        keys = torch.randn(*shape, page_format.key.spec.head_dim, generator=generator)
        values = torch.randn(*shape, page_format.value.spec.head_dim, generator=generator) + mean_value
        slab = torch.full((batch * pages, heads, page_format.page_bytes), 0xFF, dtype=torch.uint8)
        native.encode(keys, values, page_format, slab)
        table = torch.randperm(batch * pages, generator=generator).reshape(batch, pages)
        addresses = torch.zeros(batch, pages + slack, dtype=torch.int64)
        addresses[:, :pages] = slab.data_ptr() + table * heads * page_format.page_bytes
        canonical = native.to_canonical(slab, page_format)
        decoded = []
        for codec, encoded in ((page_format.key, canonical.key), (page_format.value, canonical.value)):
            vectors = torch.from_numpy(codec.decode(encoded)).double()[table]
            decoded.append(vectors.transpose(1, 2).flatten(2, 3)[:, :, first_token:])
        found = History(page_format, [slab], [0], table.numpy().astype(np.int32), addresses, first_token)
        return found, *decoded

    return make


@pytest.fixture
def attention64():
    """Attention in float64 over explicit tokens; (out, lse), out 0 and lse -inf where nothing is seen."""

    def attention(query, keys, values, seen, scaling, softcap=None):
        groups = query.shape[1] // keys.shape[1]
        keys, values = (x.double().repeat_interleave(groups, dim=1) for x in (keys, values))
        logits = scaling * query.double() @ keys.transpose(-1, -2)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        new, tokens = logits.shape[-2:]
        if seen is None:
            seen = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
        logits = logits.masked_fill(~seen, -torch.inf)
        lse = torch.logsumexp(logits, -1)
        weights = torch.nan_to_num(torch.exp(logits - lse.unsqueeze(-1)), nan=0.0)
        return weights @ torch.where(seen.expand_as(logits).any(-2).unsqueeze(-1), values, 0.0), lse

    return attention
