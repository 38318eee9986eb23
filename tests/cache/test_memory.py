"""`memory()` says what is really held: the tensor storages reachable from the layer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tqai.cache.memory import MemoryReport


def storages_bytes(*roots):
    """Bytes of every tensor storage and host array reachable from `roots`, each counted once."""
    seen, sizes, todo = set(), {}, list(roots)
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, np.ndarray):
            base = thing
            while isinstance(base.base, np.ndarray):
                base = base.base
            sizes[base.__array_interface__["data"][0]] = base.nbytes
        elif isinstance(thing, (list, tuple, set)):
            todo.extend(thing)
        elif isinstance(thing, dict):
            todo.extend(thing.values())
        elif dataclasses.is_dataclass(thing):
            todo.extend(getattr(thing, field.name) for field in dataclasses.fields(thing))
        elif type(thing).__module__.startswith("tqai.cache"):
            todo.extend(vars(thing).values())
    return sum(sizes.values())


@pytest.mark.parametrize("bits", [(4, 2), (3, 3), (8, 8), (5, 1)], ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize(
    "settings", [{}, {"sink_tokens": 5}, {"residual_window": 100}, {"sliding_window": 90}], ids=str
)
def test_report_equals_storages(filled_layer, bits, tokens, settings):
    layer = filled_layer(tokens, chunk=111, batch=3, bits_k=bits[0], bits_v=bits[1], **settings)
    # codecs and rotations are shared by all caches of a process, so they are no part of one
    held = storages_bytes(layer.pool._slabs, layer.pool.table, layer.pool._history, layer.window, layer.sinks)
    assert layer.memory().total_bytes == held
    assert layer.memory().tokens == layer.held_tokens


def test_incremental_copy_is_counted(filled_layer, random_tokens):
    layer = filled_layer(300, cache_strategy="incremental")
    layer.materialize(layer.append(*random_tokens(1, 1, 2, 1, 64)))
    assert layer.memory().copy_bytes == 2 * 4 * 2 * 256 * 64
    held = storages_bytes(
        layer.pool._slabs, layer.pool.table, layer.pool._history, layer.window, layer._decoded
    )
    assert layer.memory().total_bytes == held


@pytest.mark.parametrize(
    ("bits_k", "bits_v", "most"), [(4, 2, 3.3), (3, 3, 3.3), (4, 4, 4.3), (3, 2, 2.8), (2, 2, 2.3)]
)
def test_bits_per_value_all_in_at_8k_tokens(filled_layer, bits_k, bits_v, most):
    """bfloat16 model, head_dim 128: codes, scales, the open page and the tables together."""
    layer = filled_layer(8192, dim=128, heads=1, dtype=torch.bfloat16, bits_k=bits_k, bits_v=bits_v)
    report = layer.memory()
    assert (bits_k + bits_v) / 2 + 16 / 128 <= report.bits_per_value <= most
    assert report.compression_factor == pytest.approx(16 / report.bits_per_value)
    assert report.bf16_bytes == 2 * 2 * 8192 * 128


def test_growing_one_token_at_a_time_allocates_little_ahead(filled_layer):
    layer = filled_layer(64 * 100, chunk=64)
    report = layer.memory()
    assert report.slack_bytes <= 0.04 * (report.codes_bytes + report.scales_bytes)


def test_sum_adds_up_and_keeps_backends():
    parts = [
        MemoryReport(tokens=5, values=10, codes_bytes=3, backend="a", backend_reason="x"),
        MemoryReport(tokens=7, values=20, window_bytes=4, backend="b", backend_reason="x"),
        MemoryReport(other_bytes=9),
    ]
    total = MemoryReport.sum(parts)
    assert (total.tokens, total.values, total.total_bytes, total.other_bytes) == (7, 30, 7, 9)
    assert (total.backend, total.backend_reason) == ("a, b", "x")
    assert total.to_dict()["bits_per_value"] == 8 * 7 / 30
    assert MemoryReport.sum([]).compression_factor == 1.0
