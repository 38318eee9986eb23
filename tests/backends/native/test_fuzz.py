"""Fuzz: random formats, shapes, lengths, alignments and special values through every instruction set. C alone
is fuzzed under sanitizers by test_c_checks.py."""

from __future__ import annotations

import os

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tqai.backends.base import ExactTokens, History
from tqai.cache.layer import page_format_for
from tqai.config import CacheConfig

EXAMPLES = int(os.environ.get("TQAI_FUZZ_EXAMPLES", "30"))
"""How many; a longer run sets the variable, such as TQAI_FUZZ_EXAMPLES=20000."""

SPECIALS = (0.0, -0.0, 1e-40, 1e-30, 1e30, 3e38, float("nan"), float("inf"), float("-inf"))
DIMS = (16, 32, 64, 80, 96, 128, 160, 192, 256)


@st.composite
def cases(draw):
    dims = draw(st.sampled_from(DIMS)), draw(st.sampled_from(DIMS))
    codec = draw(st.sampled_from(("scalar", "scalar", "trellis", "trellis256")))
    bits = [draw(st.sampled_from((2, 3, 4, 8) if codec == "scalar" else (1, 2, 3, 4))) for _ in range(2)]
    settings = {"codec": codec, "scale_format": draw(st.sampled_from(("bfloat16", "log8")))}
    sizes = {
        "batch": draw(st.integers(1, 3)),
        "heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 5)),
        "new": draw(st.integers(1, 5)),
        "pages": draw(st.integers(0, 11)),
        "first": draw(st.integers(0, 63)),
        "sinks": draw(st.sampled_from((0, 1, 5))),
        "window": draw(st.sampled_from((0, 1, 63, 64, 65))),
        "gap": draw(st.sampled_from((0, 16, 48))),
        "threads": draw(st.integers(1, 3)),
    }
    choices = {name: draw(st.booleans()) for name in ("ragged", "masked", "softcap")}
    return (
        dims,
        bits,
        settings,
        sizes,
        choices,
        draw(st.sampled_from(SPECIALS)),
        draw(st.integers(0, 2**31 - 1)),
    )


def pages_at(native, page_format, sizes, special):
    """Pages at any multiple of 16 bytes, between bytes that are not theirs; (raw, addresses, all bytes)."""
    count, size = sizes["batch"] * sizes["pages"], page_format.page_bytes * sizes["heads"]
    rows = [
        torch.randn(count, sizes["heads"], 64, c.spec.head_dim) for c in (page_format.key, page_format.value)
    ]
    for side in rows:
        if side.numel():
            side.view(-1)[torch.randint(side.numel(), (3,))] = special
    raw = torch.full((count, sizes["heads"], page_format.page_bytes), 0xFF, dtype=torch.uint8)
    if page_format.key.spec.name == "scalar":
        if count:
            native.encode(*rows, page_format, raw)
    elif count:  # the search is slow: scales of one page, and any bytes are codes
        native.encode(*(side[:1] for side in rows), page_format, raw[:1])
        raw[1:] = raw[:1]
        for first, last in (
            (0, page_format.key_scales_at),
            (page_format.value_codes_at, page_format.value_scales_at),
        ):
            raw[..., first:last] = torch.randint(256, (*raw.shape[:2], last - first), dtype=torch.uint8)
    around = torch.full((16 + sizes["gap"] + count * (size + sizes["gap"]) + 64,), 0xFF, dtype=torch.uint8)
    start = -around.data_ptr() % 16 + sizes["gap"]
    offsets = start + torch.randperm(count) * (size + sizes["gap"])
    for page, offset in zip(raw, offsets.tolist(), strict=True):
        around[offset : offset + size] = page.reshape(-1)
    addresses = (around.data_ptr() + offsets).reshape(sizes["batch"], sizes["pages"])
    return raw, addresses, around


@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_every_isa_agrees_with_scalar(native, isas, case):
    dims, bits, settings, sizes, choices, special, seed = case
    torch.manual_seed(seed)
    page_format = page_format_for(CacheConfig(bits_k=bits[0], bits_v=bits[1], **settings), *dims)
    batch, heads, new = sizes["batch"], sizes["heads"], sizes["new"]
    raw, addresses, around = pages_at(native, page_format, sizes, special)
    before = around.clone()

    def exact(tokens):
        return ExactTokens(*(torch.randn(batch, heads, tokens, dim) for dim in dims))

    counts = torch.randint(sizes["pages"] + 1, (batch,)).int() if choices["ragged"] else None
    first = sizes["first"] if sizes["pages"] else 0
    table = np.zeros((batch, sizes["pages"]), dtype=np.int32)
    history = History(page_format, [], [], table, addresses, first, counts)
    sinks = exact(sizes["sinks"]) if sizes["sinks"] else None
    recent = exact(new + sizes["window"])
    query = torch.randn(batch, heads * sizes["group"], new, dims[0])
    total = sizes["sinks"] + history.tokens + new + sizes["window"]
    mask = torch.rand(batch, 1, new, total) < 0.7 if choices["masked"] else None
    softcap = 20.0 if choices["softcap"] else None
    threads = torch.get_num_threads()
    torch.set_num_threads(sizes["threads"])
    found, decoded = {}, {}
    try:
        for isa in isas:
            assert native.use_isa(isa)
            found[isa] = native.attend(query, history, sinks, recent, mask, dims[0] ** -0.5, softcap)
            decoded[isa] = native.decode(raw, page_format, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(around, before)
    wanted = found["scalar"]
    keys = decoded["scalar"][0].double().nan_to_num(0.0, 0.0, 0.0).norm(dim=-1)
    norms = query.double().norm(dim=-1).flatten(1)
    largest = dims[0] ** -0.5 * norms * (keys.max() if keys.numel() else 0.0)
    if softcap is not None and float(largest.max()) > 1e4 * softcap:
        return  # a rounding near 0 then moves a logit from one cap to the other
    for isa in isas:
        for one, other in zip(decoded[isa], decoded["scalar"], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        out, lse = found[isa]
        assert torch.equal(out.isnan(), wanted.out.isnan())
        assert torch.equal(lse.isnan(), wanted.lse.isnan())
        # a logit is off by a share of |q| |k|, which may be many times the logit
        assert torch.equal(lse.isinf(), wanted.lse.isinf())
        apart = (lse.double() - wanted.lse.double()).nan_to_num().abs().flatten(1)
        assert (apart <= (5e-4 * largest).clamp(min=6e-3)).all(), isa
        # by row, as one row may hold numbers that are 10^38 times another's
        error = (out.double() - wanted.out.double()).nan_to_num().norm(dim=-1)
        size = wanted.out.double().nan_to_num().norm(dim=-1)
        assert (error <= 6e-3 * size + 1e-30).all(), isa
