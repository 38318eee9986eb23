"""A backend that fails at run time is replaced by torch: once, with a warning, and nothing is wrong."""

from __future__ import annotations

import logging

import pytest
import torch

import tqai.backends
from tqai.backends import load
from tqai.cache.layer import CompressedLayer
from tqai.config import CacheConfig
from tqai.errors import BackendError

DIM = 64


class Failing:
    """The native backend, whose bytes have an order of their own, until `fails` of the named call."""

    name = "failing"

    def __init__(self, inner, call, good_calls):
        self.inner, self.call, self.left = inner, call, good_calls

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def _count(self, call):
        if call == self.call:
            self.left -= 1
            if self.left < 0:
                raise BackendError("the launch failed, as the test wants it")

    def encode(self, *arguments):
        self._count("encode")
        return self.inner.encode(*arguments)

    def attend(self, *arguments):
        self._count("attend")
        return self.inner.attend(*arguments)


@pytest.fixture
def layer_on(monkeypatch):
    """A layer on the native backend that fails in `call` after so many good ones."""
    try:
        native = load("native")
    except BackendError as error:
        pytest.skip(str(error))

    def make(call, good_calls, **settings):
        failing = Failing(native, call, good_calls)
        names = {"failing": "of.this.test:Failing", "torch": tqai.backends.BACKENDS["torch"]}
        monkeypatch.setattr(tqai.backends, "BACKENDS", names)
        original = tqai.backends.load
        monkeypatch.setattr(
            tqai.backends, "load", lambda name: failing if name == "failing" else original(name)
        )
        return CompressedLayer(CacheConfig(**settings))

    return make


def tokens_of(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, 2, count, DIM, generator=generator) for _ in "kv")


def fed(layer, steps):
    """Outputs of a prompt of 200 tokens and then of single ones, every second step from held tokens too."""
    outs, held = [], []
    for index in range(steps):
        step = layer.append(*tokens_of(1 if index else 200, index))
        query = torch.randn(1, 4, 1, DIM, generator=torch.Generator().manual_seed(1000 + index))
        outs.append(layer.attend(step, query, None, DIM**-0.5).out)
        held.append(layer.materialize(step))
    return outs, held


@pytest.mark.parametrize(
    "settings", [{}, {"offsets": "on", "sink_tokens": 3}, {"cache_strategy": "incremental"}]
)
@pytest.mark.parametrize(
    ("call", "good_calls"), [("attend", 0), ("attend", 70), ("encode", 0), ("encode", 1)]
)
def test_it_goes_on_with_torch(layer_on, caplog, call, good_calls, settings):
    steps = 140
    wanted = fed(CompressedLayer(CacheConfig(backend="torch", **settings)), steps)
    layer = layer_on(call, good_calls, **settings)
    with caplog.at_level(logging.WARNING, logger="tqai"):
        found = fed(layer, steps)
    for index in range(steps):
        for one, other in (
            (found[0][index], wanted[0][index]),
            *zip(found[1][index], wanted[1][index], strict=True),
        ):
            # both decode the same codes, but for coordinates within rounding of a boundary
            assert (one - other).norm() <= 2e-3 * other.norm(), (index, call)
    warnings = [record.message for record in caplog.records if "goes on with torch" in record.message]
    assert len(warnings) == 1 and "backend failing failed (the launch failed" in warnings[0]
    report = layer.memory()
    assert report.backend == "torch"
    assert report.backend_reason == "failing failed: the launch failed, as the test wants it"


def test_when_torch_fails_too_the_error_is_seen(monkeypatch):
    layer = CompressedLayer(CacheConfig(backend="torch"))

    def broken(*_):
        raise BackendError("no memory")

    monkeypatch.setattr(type(load("torch")), "encode", broken)
    with pytest.raises(BackendError, match="no memory"):
        layer.append(*tokens_of(100, 0))
