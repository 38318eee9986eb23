"""The attention kernels' own text, run on the CPU (`attend_on_cpu`), against float64 attention.

The same checks as `test_attend_gpu.py` makes on a GPU, of small cases: they see wrong arithmetic, wrong
places and missing waits between lanes, warps and blocks, not what only a GPU can get wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.backends.cuda.attend_on_cpu import built

from tqai.backends.cuda import attention, calls
from tqai.backends.cuda.attention import Exact, attend_pages
from tqai.backends.cuda.layout import fragment_pages
from tqai.backends.cuda.plan import Shape
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import CanonicalPages, PageFormat

BOUND = 5e-4
SMALL = Shape(2, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("attend")


@pytest.fixture(params=[False, True], ids=["pages arrive late", "pages arrive at once"])
def gpu(request, monkeypatch, folder):
    """`attend_pages` launches on an emulated GPU of 4 multiprocessors. What is shared lies in `memory`."""
    memory: dict[int, torch.Tensor] = {}

    def kernel(file, entry, macros, device, shared_bytes):
        known = {name: value for name, value in macros.items() if value != -1}
        return SimpleNamespace(file=file, macros=known, address=0, clusters=lambda *_: 64)

    def launch(function, grid, threads, shared_bytes, cluster, overlap):
        library = built(function.file, function.macros, folder)

        def go(params, stream):
            assert library.run(params, *grid, cluster, threads, shared_bytes, int(request.param)) == 0

        return go

    def workspace(device, stream, kind, words):
        if kind not in memory:
            memory[kind] = torch.full((1 << 16,), kind, dtype=torch.int32)
        return memory[kind].data_ptr()

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=4)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(calls, "shared_memory_bytes", lambda _: 232448)
    monkeypatch.setattr(calls, "kernel", kernel)
    monkeypatch.setattr(calls, "Launch", launch)
    monkeypatch.setattr(calls, "_BY_IDENTITY", {})
    monkeypatch.setattr(attention, "workspace", workspace)
    monkeypatch.setattr(attention, "_stream", lambda _: 0)
    calls.prepared.cache_clear()
    yield memory
    calls.prepared.cache_clear()
    for kind, words in memory.items():
        assert (words == kind).all(), "a launch must leave in the workspace what it found there"


@dataclass
class Case:
    page_format: PageFormat
    query: torch.Tensor
    raw: torch.Tensor
    addresses: torch.Tensor
    keys: torch.Tensor  # decoded, float64 [batch, heads, tokens, dim]
    values: torch.Tensor
    sinks: Exact | None
    recent: Exact
    first_token: int

    def run(
        self, mask=None, scaling=0.125, softcap=None, page_counts=None, counts=None, shape=SMALL, **launch
    ):
        return attend_pages(
            *(self.query, self.page_format, self.addresses, self.addresses.shape[1] - 2, scaling),
            page_counts=page_counts,
            first_token=self.first_token,
            sinks=self.sinks,
            recent=Exact(*self.recent[:2], counts),
            mask=mask,
            softcap=softcap,
            out_dtype=torch.float32,
            shape=shape,
            **launch,
        )

    def tokens(self):
        sides = []
        for at, history in enumerate((self.keys, self.values)):
            parts = [history[:, :, self.first_token :], self.recent[at].double()]
            sides.append(torch.cat(parts if self.sinks is None else [self.sinks[at].double(), *parts], 2))
        return sides

    def causal(self):
        total, new = self.tokens()[0].shape[2], self.query.shape[2]
        return torch.arange(total) <= torch.arange(total - new, total)[:, None]

    def reference(self, seen=None, scaling=0.125, softcap=None):
        keys, values = (
            side.repeat_interleave(self.query.shape[1] // side.shape[1], 1) for side in self.tokens()
        )
        logits = self.query.double() @ keys.nan_to_num(0.0).transpose(-1, -2) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~(self.causal() if seen is None else seen), -torch.inf)
        lse = torch.logsumexp(logits, -1)
        weights = (logits - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)).exp()
        return weights @ values.nan_to_num(0.0), lse


def make_case(
    bits=(4, 2),
    dim=64,
    batch=1,
    kv_heads=1,
    group=4,
    new_tokens=1,
    pages=9,
    recent=18,
    sinks=3,
    first=0,
    scale=1.0,
    codec="scalar",
):
    generator = np.random.default_rng(7)
    page_format = PageFormat(*(make_codec(CodecSpec(codec, dim, b)) for b in bits))
    shape = (batch, max(pages, 1), kv_heads, 64, dim)
    both = [generator.standard_normal(shape).astype(np.float32) for _ in range(2)]
    encoded = [c.encode(x) for c, x in zip((page_format.key, page_format.value), both, strict=True)]
    raw = torch.from_numpy(fragment_pages(CanonicalPages(*encoded), page_format).copy())
    places = torch.arange(batch * pages)
    addresses = torch.full((batch, pages + 2), -1, dtype=torch.int64)
    addresses[:, :pages] = raw.data_ptr() + places.view(batch, pages) * raw.stride(1)
    decoded = []
    for codec, side in zip((page_format.key, page_format.value), encoded, strict=True):
        tokens = torch.from_numpy(codec.decode(side)).double().transpose(1, 2)[:, :, :pages]
        decoded.append(tokens.reshape(batch, kv_heads, pages * 64, dim))
    torch.manual_seed(3)

    def exact(tokens):
        return Exact(*(torch.randn(batch, kv_heads, tokens, dim).bfloat16() for _ in range(2)))

    query = (torch.randn(batch, kv_heads * group, new_tokens, dim) * scale).bfloat16()
    return Case(
        page_format, query, raw, addresses, *decoded, exact(sinks) if sinks else None, exact(recent), first
    )


def check(case, seen=None, bound=BOUND, scaling=0.125, softcap=None, **launch):
    out, lse = case.run(scaling=scaling, softcap=softcap, **launch)
    wanted, wanted_lse = case.reference(seen, scaling, softcap)
    # each head by itself: a wrong one must not hide among the others
    wrong = (out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-6)
    assert wrong[wanted.norm(dim=-1) > 0].max() < 2 * bound
    known = wanted_lse > -torch.inf
    torch.testing.assert_close(lse[known].double(), wanted_lse[known], rtol=0, atol=bound)
    assert (lse[~known] == -torch.inf).all() and (out[~known] == 0).all()


@pytest.mark.parametrize(
    "launch",
    [
        {"splits": 1},
        {"splits": 3, "cluster": True},
        {"splits": 3, "cluster": False},
        {"blocks": 1},
        {"blocks": 3},
    ],
    ids=str,
)
def test_forms_of_a_launch(gpu, launch):
    check(make_case(kv_heads=2, group=3), **launch)


@pytest.mark.parametrize("early", [False, True])
def test_launches_in_a_row_leave_nothing_behind(gpu, early):
    for pages in (9, 0, 1, 14):
        check(make_case(pages=pages), splits=3, cluster=False, early=early)


def test_first_page_begins_inside_and_new_tokens_see_no_later_ones(gpu):
    check(make_case(first=13, new_tokens=3, group=3, batch=2), splits=2, cluster=False)


def test_exact_tokens_alone_and_many(gpu):
    for recent, sinks, pages in ((1, 0, 0), (65, 33, 2), (16, 1, 5)):
        check(make_case(recent=recent, sinks=sinks, pages=pages), splits=2, cluster=False)


def test_one_buffer_of_a_warp_and_warps_of_several_columns_of_exact_tokens(gpu):
    """Keys and values then come one by one. 5 is no multiple of 4: a warp takes each column of some items."""
    case = make_case(kv_heads=2, group=2, recent=65, sinks=33, pages=22)
    check(case, shape=Shape(5, 1), splits=2, cluster=False)


def test_logits_that_leave_the_reference_of_the_exponentials(gpu):
    check(make_case(scale=30.0, pages=6), splits=2, cluster=False, scaling=0.25, bound=6e-2)


def test_a_negative_scaling(gpu):
    check(make_case(), splits=2, cluster=False, scaling=-0.125)


def test_lengths_read_on_the_device(gpu):
    case = make_case(batch=3, pages=7, recent=20)
    pages, counts = (torch.tensor(n, dtype=torch.int32) for n in ([7, 0, 3], [20, 1, 17]))
    index = torch.arange(3 + 7 * 64 + 20)
    history = (index < 3) | (index < 3 + 64 * pages[:, None])
    seen = torch.where(index < 3 + 448, history, index - 451 < counts[:, None])[:, None, None]
    case.addresses[1] = -1
    check(case, seen, page_counts=pages, counts=counts)


def test_nan_in_a_query_or_a_page_shows_and_nowhere_else(gpu):
    case = make_case(kv_heads=2, group=2)
    case.query[0, 1, 0, 5] = math.nan
    out, _ = case.run(splits=3, cluster=False)
    assert out[0, 1].isnan().all()
    assert not out[0, [0, 2, 3]].isnan().any()
    case.sinks = None  # nor do exact tokens hide what pages make of it
    alone, _ = case.run(splits=3, cluster=False, counts=torch.zeros(1, dtype=torch.int32))
    assert torch.equal(alone.isnan(), out.isnan())
    case = make_case(kv_heads=2, group=2)
    scales = case.raw[0, 4, 1, case.page_format.key_scales_at :].view(torch.bfloat16)
    scales[7] = math.nan
    out, _ = case.run(splits=3, cluster=False)
    assert out[0, 2:].isnan().all()
    assert not out[0, :2].isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "dim"), [((3, 4), 80), ((8, 8), 64), ((2, 1), 64)])
def test_widths(gpu, bits, dim):
    check(make_case(bits, dim, pages=5), splits=2, cluster=False)


@pytest.mark.slow
def test_mask_and_softcap(gpu):
    case = make_case(new_tokens=2, pages=4, first=9, scale=4.0)
    torch.manual_seed(1)
    mask = torch.rand(1, 1, 2, case.tokens()[0].shape[2]) < 0.7
    mask[0, 0, 1] = False
    case.recent.values[:, :, 4] = math.nan
    mask[..., 3 + 4 * 64 - 9 + 4] = False
    check(case, mask, mask=mask, softcap=20.0, splits=2, cluster=False, bound=1e-3)
