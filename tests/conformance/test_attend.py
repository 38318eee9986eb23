"""Backends attend as float64 attention to the exactly decoded tokens does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

# Relative L2 error allowed per (backend, dtype of query and output). The torch backend accumulates in
# float32; kernels that work in 8-bit parts are held to 2e-3. Half types are bounded by output rounding.
TOLERANCE = {
    "torch": {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},
    "default": {torch.float32: 2e-3, torch.bfloat16: 4e-3, torch.float16: 2e-3},
}
# Relative to the logits, which reach 50 here: integer kernels round queries and levels to 12 to 15 bits.
LSE_TOLERANCE = {"torch": 1e-4}


def tolerance(backend, dtype):
    return TOLERANCE.get(backend.name, TOLERANCE["default"])[dtype]


def check(backend, attended, wanted, wanted_lse, dtype):
    error = (attended.out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-6)
    total = (attended.out.double() - wanted).norm() / wanted.norm()
    allowed = tolerance(backend, dtype)
    assert total < allowed, f"relative L2 {total:.2e} over {allowed:.0e}"
    assert error.max() < 5 * allowed, f"worst query {error.max():.2e}"
    assert attended.out.dtype == dtype
    assert attended.lse.dtype == torch.float32
    torch.testing.assert_close(
        attended.lse.double(), wanted_lse, rtol=LSE_TOLERANCE.get(backend.name, 5e-4), atol=2e-3
    )


CASES = [
    # bits_k, bits_v, key_dim, value_dim, batch, heads, groups, pages, recent, new, dtype
    (4, 2, 128, 128, 1, 2, 4, 5, 7, 1, torch.float32),
    (4, 4, 128, 128, 3, 2, 4, 1, 1, 1, torch.float32),
    (3, 3, 128, 128, 2, 2, 1, 3, 64, 1, torch.bfloat16),
    (3, 2, 64, 64, 1, 1, 8, 33, 20, 3, torch.float32),
    (4, 3, 96, 96, 2, 3, 2, 4, 33, 16, torch.float16),
    (2, 2, 80, 80, 1, 2, 2, 6, 5, 2, torch.float32),
    (8, 8, 64, 64, 2, 2, 4, 3, 10, 1, torch.float32),
    (8, 2, 256, 256, 1, 1, 4, 3, 9, 1, torch.bfloat16),
    (4, 8, 128, 128, 1, 2, 3, 2, 65, 65, torch.float32),
    (4, 2, 192, 128, 1, 2, 4, 3, 6, 1, torch.float32),
    (5, 7, 48, 48, 1, 2, 2, 3, 6, 4, torch.float32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_equals_reference(backend, format_for, fill, exact_tokens, reference_attention, case):
    bits_k, bits_v, key_dim, value_dim, batch, heads, groups, pages, own, new_tokens, dtype = case
    page_format = format_for(bits_k, bits_v, key_dim, value_dim)
    generator = torch.Generator().manual_seed(sum(case[:10]))

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    keys, values = normal(batch, heads, pages * 64, key_dim), normal(batch, heads, pages * 64, value_dim)
    keys *= torch.exp(normal(batch, heads, pages * 64, 1))
    values *= torch.exp(normal(batch, heads, pages * 64, 1))
    filled = fill(page_format, keys, values, slabs=min(pages, 3))
    recent = exact_tokens(generator, batch, heads, own, key_dim, value_dim, dtype)
    sinks = exact_tokens(generator, batch, heads, 3, key_dim, value_dim, dtype)
    query = (2.0 * normal(batch, heads * groups, new_tokens, key_dim)).to(dtype)
    scaling = key_dim**-0.5
    for with_sinks in (False, True):
        attended = backend.attend(
            query, filled.pool.history(), sinks if with_sinks else None, recent, None, scaling
        )
        exact = [sinks, recent] if with_sinks else [recent]
        all_keys = torch.cat([*(e.keys.double() for e in exact[:-1]), filled.keys, recent.keys.double()], 2)
        all_values = torch.cat(
            [*(e.values.double() for e in exact[:-1]), filled.values, recent.values.double()], 2
        )
        wanted, wanted_lse = reference_attention(query, all_keys, all_values, None, scaling)
        check(backend, attended, wanted, wanted_lse, dtype)


@pytest.mark.parametrize("first_token", [0, 1, 63])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_masks_sliding_starts_and_softcap(
    backend, format_for, fill, exact_tokens, reference_attention, first_token, softcap
):
    page_format = format_for(4, 4, 64)
    generator = torch.Generator().manual_seed(first_token)
    keys, values = (torch.randn(3, 2, 192, 64, generator=generator) for _ in range(2))
    filled = fill(page_format, keys, values)
    recent = exact_tokens(generator, 3, 2, 11, 64, 64, torch.float32)
    query = torch.randn(3, 4, 2, 64, generator=generator)
    history = filled.pool.history(first_token=first_token)
    tokens = 192 - first_token + 11
    mask = torch.rand(3, 1, 2, tokens, generator=generator) > 0.3
    mask[..., -2:] = True
    mask[1, :, :, : tokens - 20] = False
    for given in (None, mask, mask.expand(3, 4, 2, tokens)):
        attended = backend.attend(query, history, None, recent, given, 0.3, softcap)
        all_keys = torch.cat([filled.keys[:, :, first_token:], recent.keys.double()], 2)
        all_values = torch.cat([filled.values[:, :, first_token:], recent.values.double()], 2)
        wanted, wanted_lse = reference_attention(query, all_keys, all_values, given, 0.3, softcap)
        check(backend, attended, wanted, wanted_lse, torch.float32)


def test_a_masked_nan_token_has_no_influence(backend, format_for, fill, exact_tokens):
    page_format = format_for(4, 2, 64)
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randn(1, 1, 128, 64, generator=generator) for _ in range(2))
    recent = exact_tokens(generator, 1, 1, 4, 64, 64, torch.float32)
    query = torch.randn(1, 2, 1, 64, generator=generator)
    mask = torch.ones(1, 1, 1, 132, dtype=torch.bool)
    mask[..., [10, 70, 128]] = False
    clean = backend.attend(query, fill(page_format, keys, values).pool.history(), None, recent, mask, 0.125)
    for x in (keys, values):
        x[0, 0, [10, 70]] = torch.nan
    for x in recent:
        x[0, 0, 0] = torch.nan
    dirty = backend.attend(query, fill(page_format, keys, values).pool.history(), None, recent, mask, 0.125)
    assert torch.equal(clean.out, dirty.out)
    assert torch.equal(clean.lse, dirty.lse)


def test_a_query_that_sees_nothing_gives_zero(backend, format_for, fill, exact_tokens):
    page_format = format_for(4, 2, 64)
    generator = torch.Generator().manual_seed(6)
    keys, values = (torch.randn(2, 1, 64, 64, generator=generator) for _ in range(2))
    recent = exact_tokens(generator, 2, 1, 1, 64, 64, torch.float32)
    query = torch.randn(2, 2, 1, 64, generator=generator)
    mask = torch.ones(2, 1, 1, 65, dtype=torch.bool)
    mask[1] = False
    attended = backend.attend(
        query, fill(page_format, keys, values).pool.history(), None, recent, mask, 0.125
    )
    assert torch.equal(attended.out[1], torch.zeros_like(attended.out[1]))
    assert (attended.lse[1] == -torch.inf).all()
    assert attended.out[0].abs().min() > 0


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_sequences_with_fewer_pages_than_others(
    backend, format_for, fill, exact_tokens, reference_attention, new_tokens
):
    page_format = format_for(4, 3, 64)
    generator = torch.Generator().manual_seed(7)
    keys, values = (torch.randn(4, 2, 256, 64, generator=generator) for _ in range(2))
    filled = fill(page_format, keys, values, slabs=2)
    recent = exact_tokens(generator, 4, 2, 9, 64, 64, torch.float32)
    sinks = exact_tokens(generator, 4, 2, 2, 64, 64, torch.float32)
    query = torch.randn(4, 4, new_tokens, 64, generator=generator)
    counts = torch.tensor([4, 0, 1, 3], dtype=torch.int32)
    history = filled.pool.history(first_token=5)
    table = history.table.copy()
    present = torch.arange(4) < counts[:, None]
    table[~present.numpy()] = 0
    addresses = torch.where(present, history.addresses[:, :4], history.addresses[0, 0])
    history = replace(history, table=table, addresses=addresses, counts=counts)
    column = torch.arange(5, 256) < counts[:, None] * 64
    in_sight = torch.nn.functional.pad(column, (2, 9), value=True)[:, None, None]
    tokens = in_sight.shape[-1]
    causal = torch.ones(new_tokens, tokens, dtype=torch.bool).tril(tokens - new_tokens)
    some = torch.rand(4, 1, new_tokens, tokens, generator=generator) > 0.3
    some[..., -1] = True
    for given, wanted_mask in ((None, in_sight & causal), (some, in_sight & some)):
        attended = backend.attend(query, history, sinks, recent, given, 0.2)
        all_keys = torch.cat([sinks.keys.double(), filled.keys[:, :, 5:], recent.keys.double()], 2)
        all_values = torch.cat([sinks.values.double(), filled.values[:, :, 5:], recent.values.double()], 2)
        wanted, wanted_lse = reference_attention(query, all_keys, all_values, wanted_mask, 0.2)
        check(backend, attended, wanted, wanted_lse, torch.float32)
