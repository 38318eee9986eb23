"""The attention kernel against float64 attention to what core decodes from the same bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.backends.cuda.conftest import causal, formats, make_case, reference, relative

from tqai.backends.cuda.attention import Exact, attend_pages
from tqai.backends.cuda.plan import Shape

pytestmark = pytest.mark.gpu

BOUND = 5e-4
LSE_BOUND = 5e-4
# After rounding to the query's dtype: bfloat16 alone is 1.6e-3.
ROUNDED = {torch.bfloat16: 3e-3, torch.float16: 2.1e-3}


def run(case, mask=None, softcap=None, scaling=None, **launch):
    """The kernel's float32 result."""
    scaling = case.query.shape[-1] ** -0.5 if scaling is None else scaling
    exact = [None if t is None else Exact(*t) for t in (case.sinks, case.recent)]
    return attend_pages(
        case.query,
        case.page_format,
        case.history.addresses,
        case.history.pages,
        scaling,
        first_token=case.history.first_token,
        sinks=exact[0],
        recent=exact[1],
        mask=mask,
        softcap=softcap,
        out_dtype=torch.float32,
        **launch,
    )


def check(case, seen=None, mask=None, softcap=None, bound=BOUND, lse_bound=LSE_BOUND, **launch):
    scaling = case.query.shape[-1] ** -0.5
    out, lse = run(case, mask, softcap, **launch)
    wanted, wanted_lse = reference(case, causal(case) if seen is None else seen, scaling, softcap)
    assert relative(out, wanted) < bound
    known = wanted_lse > -torch.inf
    torch.testing.assert_close(lse[known].double(), wanted_lse[known], rtol=0, atol=lse_bound)
    assert (lse[~known] == -torch.inf).all() and (out[~known] == 0).all()


@pytest.mark.parametrize("bits_v", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("bits_k", [1, 2, 3, 4, 8])
def test_every_pair_of_widths(cuda_backend, bits_k, bits_v):
    check(make_case(cuda_backend, formats(bits_k, bits_v, 128), pages=9))


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (128, 64), (80, 112)]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_head_dims(cuda_backend, key_dim, value_dim, bits):
    check(make_case(cuda_backend, formats(bits, bits, key_dim, value_dim), pages=7))


@pytest.mark.parametrize("rotation", ["haar", "hadamard", "hadamard2", "identity"])
def test_rotations(cuda_backend, rotation):
    check(make_case(cuda_backend, formats(4, 3, 128, rotation=rotation), pages=7))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("new_tokens", [1, 2, 3, 16])
def test_groups_and_new_tokens(cuda_backend, group, new_tokens):
    check(make_case(cuda_backend, formats(4, 2, 128), batch=2, group=group, new_tokens=new_tokens, pages=6))


@pytest.mark.parametrize("recent", [1, 2, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("sinks", [0, 1, 16, 33])
def test_exact_tokens(cuda_backend, recent, sinks):
    check(make_case(cuda_backend, formats(4, 4, 128), batch=3, recent=recent, sinks=sinks, pages=3))


@pytest.mark.parametrize("pages", [0, 1, 2, 11, 12, 13, 24, 25, 132, 1000])
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_page_counts(cuda_backend, pages, kv_heads):
    check(make_case(cuda_backend, formats(4, 4, 128), kv_heads=kv_heads, pages=pages))


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 50, 131, 132])
@pytest.mark.parametrize("shape", [Shape(12, 2), Shape(5, 2), Shape(4, 1), Shape(2, 3)])
def test_any_cut_of_the_work_gives_the_same(cuda_backend, blocks, shape):
    check(make_case(cuda_backend, formats(4, 2, 128), batch=3, pages=17), blocks=blocks, shape=shape)


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize(("bits_k", "bits_v"), [(4, 2), (4, 4), (3, 3), (8, 8), (2, 2)])
def test_long_stretches_of_a_block(cuda_backend, bits_k, bits_v, cluster):
    """So long that keys and values are fetched apart, into one buffer for each warp."""
    case = make_case(cuda_backend, formats(bits_k, bits_v, 128), pages=199, first_token=5)
    check(case, splits=2, cluster=cluster)


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 3, 7, 16, 17])
@pytest.mark.parametrize("shape", [Shape(12, 2), Shape(12, 1), Shape(5, 2), Shape(4, 1), Shape(2, 3)])
def test_any_split_of_the_segments_gives_the_same(cuda_backend, splits, cluster, shape):
    if cluster and splits == 17:
        pytest.skip("clusters have at most 16 blocks")
    for pages in (0, 5, 70):
        case = make_case(cuda_backend, formats(4, 2, 128), batch=2, pages=pages, recent=90, sinks=3)
        check(case, splits=splits, cluster=cluster, shape=shape)


@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("cluster", [False, True])
def test_launches_that_overlap(cuda_backend, splits, cluster):
    """Copies of pages begin while the launch before still runs: many different calls in a row."""
    cases = [make_case(cuda_backend, formats(4, 2, 128), kv_heads=8, pages=300, seed=s) for s in range(4)]
    launch = {} if splits is None else {"splits": splits, "cluster": cluster}
    wanted = [run(case)[0] for case in cases]
    got = [run(case, early=True, **launch)[0] for _ in range(10) for case in cases]
    for i, out in enumerate(got):
        assert relative(out, wanted[i % 4].double()) < 1e-5


def test_a_query_written_just_before_is_the_one_that_counts(cuda_backend):
    case = make_case(cuda_backend, formats(4, 2, 128), kv_heads=8, pages=300)
    queries = [torch.randn_like(case.query) for _ in range(8)]
    wanted = []
    for query in queries:
        case.query.copy_(query)
        torch.cuda.synchronize()
        wanted.append(run(case)[0])
    torch.cuda.synchronize()
    got = []
    for query in queries:
        case.query.copy_(query)
        got.append(run(case, early=True)[0])
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_backend_rounds_to_the_dtype(cuda_backend, dtype):
    case = make_case(cuda_backend, formats(4, 2, 128), batch=2, pages=20, dtype=dtype)
    result = cuda_backend.attend(case.query, case.history, case.sinks, case.recent, None, 128**-0.5)
    wanted, wanted_lse = reference(case, causal(case), 128**-0.5)
    assert result.out.dtype == dtype
    assert relative(result.out, wanted) < ROUNDED[dtype]
    torch.testing.assert_close(result.lse.double(), wanted_lse, rtol=0, atol=LSE_BOUND)


def test_softcap(cuda_backend):
    check(make_case(cuda_backend, formats(4, 2, 128), pages=7, query_scale=5.0), softcap=30.0, lse_bound=1e-2)


@pytest.mark.parametrize("first_token", [1, 13, 63])
def test_first_page_begins_inside(cuda_backend, first_token):
    check(make_case(cuda_backend, formats(4, 4, 128), batch=2, pages=4, sinks=5, first_token=first_token))


@pytest.mark.parametrize("per_head", [False, True])
def test_mask(cuda_backend, per_head):
    case = make_case(cuda_backend, formats(4, 4, 128), batch=2, new_tokens=3, pages=4, sinks=5, first_token=9)
    heads = case.query.shape[1] if per_head else 1
    mask = torch.rand(2, heads, 3, causal(case).shape[-1], device="cuda") < 0.7
    mask[0, 0, 0] = False
    check(case, seen=mask, mask=mask)


def test_masked_tokens_may_be_nan(cuda_backend):
    def poison(keys, values):
        keys[0, :, 3] = torch.nan
        values[1, :, 5, 7] = torch.inf

    case = make_case(cuda_backend, formats(4, 4, 128), pages=3, sinks=2, edit=poison)
    case.recent.values[:, :, 4] = torch.nan
    mask = causal(case).clone()
    for token in (2 + 3, 2 + 64 + 5, 2 + 192 + 4):
        mask[..., token] = False
    check(case, seen=mask, mask=mask)


def test_nan_in_sight_shows(cuda_backend):
    for side in (0, 1):

        def poison(keys, values, side=side):
            (keys, values)[side][1, 0, 3] = torch.nan

        out, _ = run(make_case(cuda_backend, formats(4, 4, 128), pages=3, edit=poison))
        assert out[:, :4].isnan().all()
        assert not out[:, 4:].isnan().any()


def test_zero_vectors_and_zero_queries(cuda_backend):
    def clear(keys, values):
        keys[0] = 0
        values[1] = 0

    case = make_case(cuda_backend, formats(4, 4, 128), pages=3, edit=clear)
    check(case)
    case.query.zero_()
    check(case)


def test_logits_that_rise_steeply(cuda_backend):
    """The reference of the exponentials has to move many times."""

    def ramp(keys, values):
        keys *= torch.linspace(0.01, 60.0, len(keys), device="cuda").view(-1, 1, 1, 1).to(keys.dtype)

    case = make_case(cuda_backend, formats(8, 8, 128), pages=150, edit=ramp)
    check(case, bound=2e-2, lse_bound=0.1)


def test_ragged_lengths_are_read_on_the_device(cuda_backend):
    case = make_case(cuda_backend, formats(4, 4, 128), batch=4, pages=20, recent=40)
    pages = torch.tensor([20, 0, 7, 13], dtype=torch.int32, device="cuda")
    counts = torch.tensor([40, 1, 17, 33], dtype=torch.int32, device="cuda")
    case.history.addresses[1, :] = -1
    out, lse = attend_pages(
        case.query,
        case.page_format,
        case.history.addresses,
        20,
        128**-0.5,
        page_counts=pages,
        recent=Exact(*case.recent, counts),
        out_dtype=torch.float32,
    )
    index = torch.arange(20 * 64 + 40, device="cuda")
    seen = torch.where(index < 1280, index < 64 * pages[:, None], index - 1280 < counts[:, None])[
        :, None, None
    ]
    wanted, wanted_lse = reference(case, seen, 128**-0.5)
    assert relative(out, wanted) < BOUND
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=LSE_BOUND)


@pytest.mark.parametrize("new_tokens", [1, 3, 20])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 50])
def test_counts_of_a_history(cuda_backend, new_tokens, masked, kv_heads):
    """Sequences with fewer pages; what their part of the table lists is not read."""
    case = make_case(
        cuda_backend, formats(4, 4, 128), batch=4, kv_heads=kv_heads, pages=20, sinks=3, new_tokens=new_tokens
    )
    counts = torch.tensor([20, 0, 7, 13], dtype=torch.int32, device="cuda")
    index = torch.arange(causal(case).shape[-1], device="cuda")
    absent = (index >= 3 + 64 * counts[:, None]) & (index < 3 + 1280)
    mask = causal(case).clone().repeat(4, 1, 1, 1)
    if masked:
        mask[..., 5::7] = False
    wanted, wanted_lse = reference(case, mask & ~absent[:, None, None], 128**-0.5)
    if new_tokens <= 16:  # more are served by decoding, which reads page 0 in the place of absent ones
        case.history.addresses[1, :] = -1
        case.history.addresses[2, 7:] = -1
    history = replace(case.history, counts=counts)
    given = mask if masked else None
    result = cuda_backend.attend(case.query, history, case.sinks, case.recent, given, 128**-0.5)
    assert relative(result.out, wanted) < 5e-3
    torch.testing.assert_close(result.lse.double(), wanted_lse, rtol=0, atol=5e-3)


def test_graphs_may_be_replayed_at_the_same_time(cuda_backend):
    """Each captured launch has a workspace of its own."""
    cases = [make_case(cuda_backend, formats(4, 2, 128), kv_heads=8, pages=900, seed=s) for s in range(2)]
    wanted = [run(case, splits=16, cluster=False)[0] for case in cases]
    torch.cuda.synchronize()
    graphs, outs = [], []
    for case in cases:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append([run(case, splits=16, cluster=False)[0] for _ in range(20)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(5):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for results, right in zip(outs, wanted, strict=True):
        assert all(torch.equal(out, right) for out in results)


def test_strided_inputs(cuda_backend):
    case = make_case(cuda_backend, formats(4, 4, 128), batch=2, pages=3)
    plain = cuda_backend.attend(case.query, case.history, None, case.recent, None, 128**-0.5)
    recent = type(case.recent)(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in case.recent))
    query = torch.empty(2, 1, 8, 256, dtype=case.query.dtype, device="cuda")[..., 3:131].transpose(1, 2)
    query.copy_(case.query)
    odd = cuda_backend.attend(query, case.history, None, recent, None, 128**-0.5)
    torch.testing.assert_close(odd.out, plain.out, rtol=0, atol=0)


def test_captured_in_a_graph_and_replayed(cuda_backend):
    """No host synchronization, no state: a replay computes on what lies in the buffers now."""
    case = make_case(cuda_backend, formats(4, 2, 128), kv_heads=8, pages=40)
    other = make_case(cuda_backend, formats(4, 2, 128), kv_heads=8, pages=40, seed=7)
    wanted = [run(c) for c in (case, other)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(case)
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(out, wanted[0][0], rtol=0, atol=0)
    case.query.copy_(other.query)
    case.raw.copy_(other.raw)
    for mine, theirs in zip(case.recent, other.recent, strict=True):
        mine.copy_(theirs)
    out.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(out, wanted[1][0], rtol=0, atol=0)
    torch.testing.assert_close(lse, wanted[1][1], rtol=0, atol=0)


def test_same_bits_every_time(cuda_backend):
    case = make_case(cuda_backend, formats(4, 2, 128), batch=2, kv_heads=8, pages=300)
    first = run(case)[0]
    for _ in range(20):
        assert torch.equal(run(case)[0], first)


@pytest.mark.parametrize("new_tokens", [17, 70, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_prefill_chunks(cuda_backend, new_tokens, masked):
    case = make_case(
        cuda_backend,
        formats(4, 2, 128),
        new_tokens=new_tokens,
        recent=new_tokens + 30,
        sinks=4,
        pages=21,
        first_token=5,
    )
    mask = causal(case).clone()
    if masked:
        mask[..., 7:40] = False
    result = cuda_backend.attend(
        case.query, case.history, case.sinks, case.recent, mask if masked else None, 128**-0.5
    )
    wanted, wanted_lse = reference(case, mask, 128**-0.5)
    assert relative(result.out, wanted) < 5e-3
    torch.testing.assert_close(result.lse.double(), wanted_lse, rtol=0, atol=5e-3)
