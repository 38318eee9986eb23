"""A backend, a model or the machine that fails in the middle of a step: who is lost, and who is not."""

import logging
import time

import pytest
import torch
from engine_runs import Outcome, finished, request, run, run_one
from serving import serving

from tqai.backends import load
from tqai.config import CacheConfig
from tqai.errors import BackendError
from tqai.server.engine.engine import Draining, Engine
from tqai.server.engine.page_codes import CodedPages
from tqai.server.engine.sequence import RequestFailed
from tqai.server.engine.settings import EngineSettings


class Fragile:
    """A backend whose pages are in another byte order than torch's, and which fails when it is told to."""

    name = "fragile"

    def __init__(self, sound):
        self.sound, self.broken = sound, set()

    def _reordered(self, raw):
        return raw.flip(-1) if isinstance(raw, torch.Tensor) else raw[..., ::-1].copy()

    def encode(self, keys, values, page_format, out):
        self._may_fail("encode")
        self.sound.encode(keys, values, page_format, out)
        out.copy_(self._reordered(out))

    def attend(self, query, history, *rest):
        self._may_fail("attend")
        slab = self._reordered(history.slabs[0]).contiguous()
        addresses = history.addresses - history.slabs[0].data_ptr() + slab.data_ptr()
        changed = type(history)(
            history.page_format, (slab,), history.slab_starts, history.table, addresses, 0, history.counts
        )
        return self.sound.attend(query, changed, *rest)

    def to_canonical(self, raw, page_format):
        return self.sound.to_canonical(self._reordered(raw), page_format)

    def _may_fail(self, what):
        if what in self.broken:
            raise BackendError("the kernel is gone")


@pytest.mark.parametrize("where", ["attend", "encode"])
def test_a_backend_that_fails_is_replaced_loudly_and_the_codes_are_kept(
    make_engine, document_ids, caplog, where
):
    """Both requests are running when the backend fails; one then completes a page."""
    cache = CacheConfig(backend="torch")
    wanted = [request(document_ids[n : n + 120 + n], max_tokens=14, ignore_eos=True) for n in (0, 64)]
    with make_engine(cache=cache, prefix_caching=False, pages=20) as engine:
        expected = [run_one(engine, wish).tokens for wish in wanted]
    with make_engine(cache=cache, prefix_caching=False, pages=20) as engine:
        fragile = Fragile(load("torch"))
        for codes in engine.store.codes:
            codes.backend = fragile
        outcomes = [Outcome() for _ in wanted]
        for wish, outcome in zip(wanted, outcomes, strict=True):
            engine.submit(wish, outcome.events.append)
        wait_for(lambda: all(len(outcome.tokens) > 1 for outcome in outcomes))
        with caplog.at_level(logging.WARNING, "tqai.server"):
            fragile.broken = {where}
            assert engine.wait_idle(120)
        assert [outcome.tokens for outcome in outcomes] == expected
        assert all(codes.backend is load("torch") for codes in engine.store.codes)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == len(engine.store.codes) and "fragile failed (the kernel is gone)" in said[0]
        with serving(engine) as served:
            assert served.http.get("/status.json").json()["backend"] == "torch"


def test_torch_itself_is_not_replaced(loaded):
    codes = CodedPages(CacheConfig(backend="torch"), layer_shape(), torch.float32, torch.device("cpu"))
    with pytest.raises(BackendError, match="enough"):
        codes._fall_back(BackendError("enough"), torch.zeros(1, 2, codes.page_bytes, dtype=torch.uint8))


def layer_shape():
    from tqai.server.engine.model import LayerShape

    return LayerShape(2, 64, 64, None)


@pytest.mark.parametrize("length", [200, 251])
def test_the_request_that_breaks_a_decode_step_fails_alone(make_engine, document_ids, length):
    """Which one that is cannot be told from the exception; at length 251 a page of it is due as well."""
    good = [request(document_ids[n : n + 61 + n], max_tokens=12, ignore_eos=True) for n in (0, 20, 40, 60)]
    bad = request(document_ids[500 : 500 + length], max_tokens=12, ignore_eos=True)
    with make_engine(prefix_caching=False) as engine:
        expected = [run_one(engine, wish).tokens for wish in good]
        runner = engine.scheduler.runner
        decode = runner.decode

        def fragile(step, tokens, positions):
            logits = decode(step, tokens, positions)  # the step has been taken before it fails
            if length + 4 in positions:  # nobody else gets so far
                raise RuntimeError("a kernel that cannot do this row")
            return logits

        runner.decode = fragile
        together = run(engine, [*good[:2], bad, *good[2:]])
    assert isinstance(together[2].end, RequestFailed) and "kernel" not in together[2].end.message
    assert len(together[2].tokens) == 5
    assert [outcome.tokens for outcome in [*together[:2], *together[3:]]] == expected


def test_when_nothing_works_any_more_everybody_is_told(loaded, document_ids, monkeypatch):
    engine = Engine(*loaded, EngineSettings(max_running=2, max_kv_bytes=8 << 20))
    engine.start()
    outcomes = [Outcome() for _ in range(3)]
    for outcome in outcomes:
        engine.submit(request(document_ids[:70], max_tokens=500, ignore_eos=True), outcome.events.append)
    wait_for(lambda: outcomes[0].tokens)
    for name in ("step", "fail_all"):
        monkeypatch.setattr(engine.scheduler, name, lambda *args: 1 / 0)
    assert engine.wait_idle(60)
    wait_for(lambda: all(isinstance(outcome.end, RequestFailed) for outcome in outcomes))
    engine._thread.join(60)
    with pytest.raises(Draining):
        engine.submit(request([5], max_tokens=1), print)
    with serving(engine) as served:
        health = served.http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed"})
        assert served.post("/v1/completions", prompt="x").status_code == 503
    engine.stop()


def test_a_failing_observer_of_ends_costs_no_answer(make_engine, document_ids):
    with make_engine() as engine:
        engine.on_finished = lambda sequence: 1 / 0
        assert finished(run_one(engine, request(document_ids[:5], max_tokens=2)))
        assert finished(run_one(engine, request(document_ids[:5], max_tokens=2)))


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
