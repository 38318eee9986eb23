"""The decode step whose lengths lie on the device, without a GPU: replayed by running it again."""

import pytest
import torch
from engine_runs import finished, request, run

import tqai.cache.balance
from tqai.config import CacheConfig
from tqai.server.engine.decode_graphs import DecodeGraphs, SlotStep, graph_rows
from tqai.server.engine.decode_step import DecodeRow
from tqai.server.engine.page_table import HeldPages

ROOM = 4
"""Pages of the table."""


def row(position, pages, new=None):
    return DecodeRow(position, [HeldPages(pages)], None if new is None else [new])


class Replayed(DecodeGraphs):
    """A step instead of its graph; rows in fours, so that the CPU's sums come out the same."""

    usable = True

    def capture_all(self):
        self._rows, self.replays = [4, 8], []
        for rows in self._rows:
            step = SlotStep(self._store, rows, self._room)
            step.load([], [])
            logits = torch.zeros(rows, step.forward(self._model, self._extra).shape[1])
            self._steps[rows] = step, _Again(self, step, logits), logits


class _Again:
    def __init__(self, graphs, step, logits):
        self.graphs, self.step, self.logits = graphs, step, logits

    def replay(self):
        self.graphs.replays.append(self.step.rows)
        self.logits.copy_(self.step.forward(self.graphs._model, self.graphs._extra))


def use_replays(engine):
    runner = engine.scheduler.runner
    with torch.inference_mode():
        runner.graphs = Replayed(runner.model, engine.store, ROOM, runner._extra(1))
        runner.graphs.capture_all()
    return runner.graphs


@pytest.mark.parametrize(
    "cache",
    [
        None,
        CacheConfig(backend="torch", sink_tokens=5),
        CacheConfig(backend="torch", sink_tokens=3, residual_window=20, offsets="on", balance="auto"),
    ],
    ids=["uncompressed", "codes", "window and offsets"],
)
def test_requests_come_and_go_in_a_step_that_stays(make_engine, document_ids, monkeypatch, cache):
    """Prompts of all kinds of length, of different output lengths, more than run at a time, with pages
    completed on the way; the same tokens as from steps that are made anew."""
    monkeypatch.setattr(tqai.cache.balance, "MOST_LEFT", 2.0)
    lengths = (1, 6, 63, 64, 69, 130, 2, 20, 62)
    wanted = [
        request(document_ids[31 * n : 31 * n + length], max_tokens=3 + 20 * (n % 2), ignore_eos=True)
        for n, length in enumerate(lengths)
    ]
    with make_engine(cache=cache, max_running=8, prefix_caching=False) as engine:
        expected = run(engine, wanted)
    with make_engine(cache=cache, max_running=8, prefix_caching=False) as engine:
        engine.store.pool.whole.fill_(255)  # NaN in every number and scale that nobody wrote
        graphs = use_replays(engine)
        found = run(engine, wanted)
        assert set(graphs.replays) == {4, 8}
    assert all(finished(outcome) for outcome in found)
    assert [outcome.tokens for outcome in found] == [outcome.tokens for outcome in expected]


def test_preempted_requests_leave_no_pages_in_the_table(make_engine, document_ids):
    """Slots change hands, and a request that comes back gets other pages."""
    cache = CacheConfig(backend="torch")
    wanted = [request(document_ids[300 * n : 350 + 302 * n][: 50 + 2 * n], max_tokens=24) for n in range(4)]
    with make_engine(cache=cache, pages=100) as engine:
        expected = run(engine, wanted)
    with make_engine(cache=cache, pages=3) as engine:
        use_replays(engine)
        found = run(engine, wanted)
        assert engine.scheduler.counters.preemptions > 0
    assert [outcome.tokens for outcome in found] == [outcome.tokens for outcome in expected]


def test_layers_of_different_bits_complete_their_pages(make_engine, document_ids, loaded):
    layers = loaded[0].config.num_hidden_layers
    bits = tuple((4, 2) if index % 2 else (3, 3) for index in range(layers))
    cache = CacheConfig(backend="torch", layer_bits=bits)
    wanted = [request(document_ids[:120], max_tokens=12, ignore_eos=True)]
    with make_engine(cache=cache) as engine:
        expected = run(engine, wanted)
    with make_engine(cache=cache) as engine:
        use_replays(engine)
        found = run(engine, wanted)
    assert [outcome.tokens for outcome in found] == [outcome.tokens for outcome in expected]


def test_a_table_that_is_too_narrow_is_left_alone(make_engine, document_ids):
    with make_engine(cache=CacheConfig(backend="torch")) as engine:
        graphs = use_replays(engine)
        rows = [row(64 * (ROOM + 1), list(range(ROOM + 1)))]
        assert graphs.run(rows, [5]) is None and not graphs.replays
        full = [row(64 * ROOM, list(range(ROOM)))]
        assert graphs.run(full, [5]) is not None and graphs.replays == [4]
        graphs.replays.clear()
        many = [row(0, [])] * 9
        assert graphs.run(many, [5] * 9) is None and not graphs.replays


def test_numbers_of_rows():
    assert graph_rows(1) == [1]
    assert graph_rows(8) == [1, 2, 4, 8]
    assert graph_rows(32) == [1, 2, 4, 8, 16, 32]
    assert graph_rows(40) == [1, 2, 4, 8, 16, 32, 40]
    assert graph_rows(4096) == [1, 2, 4, 8, 16, 32, 48, 64, 128, 256]


def test_without_a_gpu_there_are_no_graphs(make_engine):
    with make_engine(cache=CacheConfig(backend="torch")) as engine:
        assert not DecodeGraphs.serve(engine.store)
        assert engine.scheduler.runner.graphs is None


def test_tables_are_sent_only_when_they_change(make_engine):
    with make_engine(cache=CacheConfig(backend="torch")) as engine:
        step = SlotStep(engine.store, 4, 8)
        pages, other = [3, 1], [2]
        rows = [row(130, pages), row(70, other)]
        assert step._take_pages(rows) and not step._take_pages(rows)
        pages.append(7)
        assert step._take_pages(rows)
        assert step._table[:2, :3].tolist() == [[3, 1, 7], [2, 0, 0]]
        # a request that was preempted comes back with fewer pages, in a list of its own
        assert step._take_pages([row(66, [5]), rows[1]])
        assert step._table[0, 0] == 5
        step.load([row(66, [5]), rows[1]], [1, 2])
        slab = engine.store.slabs[1]
        assert step.addresses[1, 0, 0] == slab[5].data_ptr()
        assert step.inputs[:, :2].tolist() == [[1, 2], [66, 70], [2, 6], [3, 7], [1, 1]]


def test_pages_of_all_layers_and_rows_are_completed_where_they_belong(make_engine):
    with make_engine(cache=CacheConfig(backend="torch"), max_running=4) as engine:
        store = engine.store
        for held in store.exact:
            for part in held:
                part.normal_()
        store.complete_pages([row(63, [], 3), row(127, [0]), row(63, [], 1)])
        for layer, held in enumerate(store.exact):
            expected = store.codes[layer].encoded(*(part[[0, 2]] for part in held))
            assert torch.equal(store.slabs[layer][[3, 1]], expected)
