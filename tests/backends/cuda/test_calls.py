"""What the host tells a launch, seen without a GPU: the driver is replaced by a recorder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tqai.backends.cuda import attention, calls
from tqai.backends.cuda.attention import Exact, attend_pages
from tqai.backends.cuda.levels import integer_levels
from tqai.backends.cuda.params import CHANGING, Sizes
from tqai.backends.cuda.plan import division
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat
from tqai.errors import BackendError, InputError

FORMAT = PageFormat(*(make_codec(CodecSpec("scalar", 128, bits)) for bits in (4, 2)))
PARTIAL, COUNTERS = 1 << 20, 1 << 21


class Recorder:
    """Kernels and launches that only note what they are asked for. `fitting`: clusters at a time, by size."""

    def __init__(self) -> None:
        self.launched: list[SimpleNamespace] = []
        self.made: list[dict[str, int]] = []
        self.fitting = {6: 20, 2: 66}
        self.workspaces: list[tuple[int, int]] = []

    def kernel(self, file, entry, macros, device, shared_bytes):
        def clusters(cluster, threads, shared):
            return self.fitting.get(cluster, 0)

        self.made.append(macros)
        return SimpleNamespace(
            file=file, macros=macros, address=hash((file, *macros.items())), clusters=clusters
        )

    def launch(self, function, grid, threads, shared_bytes, cluster=1, overlap=False):
        form = SimpleNamespace(function=function, grid=grid, cluster=cluster, overlap=overlap)

        def go(params, stream):
            self.launched.append(SimpleNamespace(form=form, params=params, stream=stream))

        return go

    def workspace(self, device, stream, kind, words):
        self.workspaces.append((kind, words))
        return PARTIAL if kind == attention.ABSENT else COUNTERS


def pair(made):
    return made.factor, made.shift


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(calls, "shared_memory_bytes", lambda index: 232448)
    monkeypatch.setattr(calls, "kernel", made.kernel)
    monkeypatch.setattr(calls, "Launch", made.launch)
    monkeypatch.setattr(calls, "_BY_IDENTITY", {})
    monkeypatch.setattr(attention, "workspace", made.workspace)
    monkeypatch.setattr(attention, "_stream", lambda device: 77)
    calls.prepared.cache_clear()
    yield made
    calls.prepared.cache_clear()


def inputs(batch=1, pages=512, new_tokens=1, recent=1, heads=32, kv_heads=8):
    query = torch.zeros(batch, heads, new_tokens, 128, dtype=torch.bfloat16)
    exact = Exact(*(torch.zeros(batch, kv_heads, recent, 128, dtype=torch.bfloat16) for _ in range(2)))
    return query, torch.zeros(batch, pages + 3, dtype=torch.int64), exact


def told(launched):
    """The two halves of the parameters: a tuple as in `CHANGING`, and `Sizes`."""
    changing = CHANGING.unpack(launched.params[: CHANGING.size])
    return changing, Sizes.from_buffer_copy(launched.params[CHANGING.size :])


@pytest.mark.parametrize(
    ("batch", "pages", "file", "grid", "cluster", "words"),
    [
        (1, 64, "attend_split.cu", (6, 8), 6, 0),
        (1, 512, "attend_split.cu", (16, 8), 1, 128 * 520),
        (8, 512, "attend_split.cu", (2, 64), 2, 0),
        (40, 512, "attend_line.cu", (132, 1), 1, 132 * 2 * 520),
    ],
)
def test_form_of_a_launch(recorder, batch, pages, file, grid, cluster, words):
    query, addresses, recent = inputs(batch, pages)
    attend_pages(query, FORMAT, addresses, pages, 0.25, recent=recent)
    (launched,) = recorder.launched
    assert launched.form.function.file == file
    assert (launched.form.grid, launched.form.cluster, launched.form.overlap) == (grid, cluster, True)
    assert launched.stream == 77
    changing, sizes = told(launched)
    assert (sizes.pages, sizes.batch, sizes.kv_heads, sizes.group) == (pages, batch, 8, 4)
    if file == "attend_split.cu":
        assert launched.form.function.macros["CLUSTER"] == int(cluster > 1)
        assert recorder.workspaces == ([(attention.ABSENT, words)] if words else [])
    else:
        assert recorder.workspaces == [(attention.COUNTERS, 320)]
    # partial results and counters, where the launch has them
    assert (changing[29] == PARTIAL) == (file == "attend_split.cu" and words > 0)
    assert (changing[30] == COUNTERS) == (file == "attend_line.cu")


def test_tables_of_trellis_codes_are_for_single_blocks(recorder):
    """No kernel for clusters is compiled that would not be launched, and none is launched by mistake."""
    codec = make_codec(CodecSpec("trellis", 128, 3))
    page_format = PageFormat(codec, codec)
    query, addresses, recent = inputs(8, 512)
    attend_pages(query, page_format, addresses, 512, 0.25, recent=recent)
    (launched,) = recorder.launched
    assert (launched.form.grid, launched.form.cluster) == ((2, 64), 1)
    assert [macros["CLUSTER"] for macros in recorder.made] == [0]
    with pytest.raises(BackendError, match="clusters of 2 blocks: tables of trellis codes"):
        attend_pages(query, page_format, addresses, 512, 0.25, recent=recent, splits=2, cluster=True)
    with pytest.raises(BackendError, match="clusters of 17 blocks: at most 16"):
        attend_pages(query, FORMAT, addresses, 512, 0.25, recent=recent, splits=17, cluster=True)
    assert len(recorder.launched) == 1


def test_divisors_and_tables(recorder):
    """What the kernels divide by, and the levels of each side."""
    query, addresses, recent = inputs(2, 512, new_tokens=3, recent=33, heads=24)
    attend_pages(query, FORMAT, addresses, 512, 0.25, recent=recent, splits=2)
    (launched,) = recorder.launched
    _, sizes = told(launched)
    # 3 heads of a group times 3 tokens: three groups of four columns; 48 segments, two blocks for each
    assert launched.form.grid == (2, 48)
    assert (sizes.group, sizes.new_tokens, sizes.col_groups) == (3, 3, 3)
    assert pair(sizes.by_items) == division(512 + 3)
    assert pair(sizes.by_heads) == division(24)
    assert pair(sizes.by_col_groups) == division(3)
    assert pair(sizes.by_group) == division(3)
    assert pair(sizes.by_grid) == division(2)
    for side, codec in ((sizes.levels_k, FORMAT.key), (sizes.levels_v, FORMAT.value)):
        levels = integer_levels(codec)
        assert tuple(side.tables) == levels.permute_tables()
        wanted = (levels.coef_b, levels.unit)
        assert tuple(side.coefficients) == pytest.approx(wanted, rel=1e-6)
    assert sizes.plan_k != sizes.plan_v


@pytest.mark.parametrize(
    ("bits", "capability", "batch", "pages", "stages"),
    [
        ((4, 2), (9, 0), 8, 192, 1),
        ((4, 2), (9, 0), 8, 191, 2),  # 95 pages for a block
        ((4, 2), (9, 0), 1, 1536, 1),
        ((4, 2), (9, 0), 1, 1535, 2),
        ((4, 2), (8, 0), 8, 512, 2),  # nothing is fetched in halves there
        ((2, 2), (9, 0), 8, 512, 2),  # too little of the memory's time would be asked for ahead
        ((4, 4), (9, 0), 20, 512, 2),  # the line of all work, in whole pages
    ],
)
def test_long_stretches_need_one_buffer(recorder, monkeypatch, bits, capability, batch, pages, stages):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    page_format = PageFormat(*(make_codec(CodecSpec("scalar", 128, width)) for width in bits))
    query, addresses, recent = inputs(batch, pages)
    attend_pages(query, page_format, addresses, pages, 0.25, recent=recent)
    (launched,) = recorder.launched
    assert (launched.form.function.macros["WARPS"], launched.form.function.macros["STAGES"]) == (12, stages)


@pytest.mark.parametrize(("at_a_time", "cluster"), [(7, 1), (8, 6), (0, 1)])
def test_clusters_are_for_segments_that_run_all_at_a_time(recorder, at_a_time, cluster):
    recorder.fitting = {6: at_a_time}
    query, addresses, recent = inputs(pages=64)
    attend_pages(query, FORMAT, addresses, 64, 0.25, recent=recent)
    assert recorder.launched[0].form.cluster == cluster


def test_room_for_two_partial_results_of_each_block_of_a_line(recorder):
    query, addresses, recent = inputs(40)
    attend_pages(query, FORMAT, addresses, 512, 0.25, recent=recent)
    (call,) = calls.prepared(FORMAT, torch.bfloat16, query.device)._calls.values()
    assert call.words == 132 * 2 * 4 * (128 + 2)
    assert pair(Sizes.from_buffer_copy(call.sizes).by_grid) == division(132)


def test_addresses_and_strides(recorder):
    query, addresses, _ = inputs(2, 20, new_tokens=3)
    addresses = addresses[:, :21]
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    keys, values = (torch.zeros(2, 8, 40, 256, dtype=torch.bfloat16)[:, :, :17, :128] for _ in range(2))
    counts = torch.tensor([17, 5], dtype=torch.int32)
    sinks = Exact(*(torch.zeros(2, 8, 4, 128, dtype=torch.bfloat16) for _ in range(2)))
    page_counts = torch.tensor([20, 3], dtype=torch.int32)
    mask = torch.ones(1, 1, 3, 4 + 20 * 64 + 17, dtype=torch.bool)
    out, lse = attend_pages(
        query,
        FORMAT,
        addresses,
        20,
        0.25,
        page_counts=page_counts,
        first_token=9,
        sinks=sinks,
        recent=Exact(keys, values, counts),
        mask=mask,
        softcap=30.0,
        early=True,
    )
    assert out.shape == (2, 32, 3, 128) and out.is_contiguous() and out.dtype == torch.bfloat16
    assert lse.shape == (2, 32, 3) and lse.is_contiguous() and lse.dtype == torch.float32
    changing, sizes = told(recorder.launched[0])
    assert changing[:4] == (addresses.data_ptr(), 23, page_counts.data_ptr(), counts.data_ptr())
    assert changing[4:8] == (query.data_ptr(), *query.stride()[:3])
    assert changing[8:12] == (
        keys.data_ptr(),
        values.data_ptr(),
        sinks.keys.data_ptr(),
        sinks.values.data_ptr(),
    )
    assert changing[12:18] == keys.stride()[:3] + values.stride()[:3]
    assert changing[18:24] == sinks.keys.stride()[:3] + sinks.values.stride()[:3]
    # one mask for all sequences and heads: strides of 0
    assert changing[24:29] == (mask.data_ptr(), 0, 0, *mask.stride()[2:])
    assert changing[31:33] == (out.data_ptr(), lse.data_ptr())
    # page counts are read on the device: no copies before the launch before has ended
    assert changing[33:] == (17, 9, 0, 0.25)
    macros = recorder.launched[0].form.function.macros
    assert (macros["MASKED"], macros["SOFTCAP"], macros["OUT"]) == (1, 1, 1)
    assert (sizes.softcap, sizes.sinks, sizes.new_tokens, sizes.col_groups) == (30.0, 4, 3, 3)


def test_calls_are_prepared_once_for_each_size(recorder):
    query, addresses, recent = inputs()
    for _ in range(3):
        attend_pages(query, FORMAT, addresses, 512, 0.25, recent=recent, early=True)
    ready = calls.prepared(FORMAT, torch.bfloat16, query.device)
    assert len(ready._calls) == 1
    assert len({id(launched.form) for launched in recorder.launched}) == 1
    assert [told(launched)[0][-2] for launched in recorder.launched] == [1, 1, 1]
    attend_pages(query, FORMAT, addresses, 511, 0.25, recent=recent)
    assert len(ready._calls) == 2


def test_what_cannot_be_launched(recorder):
    query, addresses, recent = inputs(1)
    with pytest.raises(InputError, match="number of KV heads"):
        attend_pages(query, FORMAT, addresses, 512, 0.25)
    many = torch.zeros(1025, 32, 1, 128, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="1025 sequences"):
        attend_pages(many, FORMAT, addresses, 512, 0.25, recent=recent)


def test_pages_that_do_not_fit_into_shared_memory(recorder, monkeypatch):
    monkeypatch.setattr(calls, "shared_memory_bytes", lambda index: 10_000)
    query, addresses, recent = inputs()
    with pytest.raises(BackendError, match=r"6400 bytes does not fit"):
        attend_pages(query, FORMAT, addresses, 512, 0.25, recent=recent)
