"""Bits per layer: the knapsack against brute force, the budget against `memory()`, and the plan."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai.backends.base import ExactTokens
from tqai.cache.bit_plan import WIDTHS, LayerShape, SideErrors, _knapsack, all_in_bits, allocate
from tqai.cache.calibration import Calibration
from tqai.cache.first_prefill import BitPlan, _sampled, expected_errors
from tqai.cache.layer import CompressedLayer
from tqai.cache.memory import MemoryReport
from tqai.cache.page_format import page_format_for
from tqai.config import CacheConfig
from tqai.errors import ConfigError

SHAPE = LayerShape(kv_heads=2, key_dim=64, value_dim=64, value_bytes=4)


def falling(*errors):
    return dict(zip(WIDTHS, errors, strict=True))


amounts = st.floats(0.0, 10.0, allow_nan=False)
layers = st.lists(
    st.tuples(
        st.sampled_from([(1, 64, 64), (2, 128, 64), (3, 32, 96)]),
        st.tuples(*(amounts for _ in range(6))),
    ),
    min_size=1,
    max_size=2,
)


@settings(max_examples=40, deadline=None)
@given(layers=layers, share=st.floats(0.0, 1.1))
def test_no_better_choice_fits(layers, share):
    config = CacheConfig(budget_tokens=1024)
    shapes = [LayerShape(*shape, 2) for shape, _ in layers]
    errors = [SideErrors(falling(*found[:3]), falling(*found[3:])) for _, found in layers]
    least, most = (all_in_bits(config, shapes, [(b, b)] * len(shapes)) for b in (2, 4))
    budget = least + share * (most - least)
    chosen = allocate(config, shapes, errors, budget)

    def cost(bits):
        return sum(e.keys[k] + e.values[v] for e, (k, v) in zip(errors, bits, strict=True))

    assert all_in_bits(config, shapes, chosen) <= budget * (1 + 1e-12)
    pairs = list(itertools.product(WIDTHS, WIDTHS))
    fitting = [
        cost(bits)
        for bits in itertools.product(pairs, repeat=len(shapes))
        if all_in_bits(config, shapes, bits) <= budget
    ]
    assert cost(chosen) <= min(fitting) + 1e-9


def test_a_budget_below_everything_is_named():
    errors = [SideErrors(falling(3, 2, 1), falling(3, 2, 1))]
    with pytest.raises(ConfigError, match=r"bits_budget=2\.1: 2 bits everywhere take 2\.\d+ bits per value"):
        allocate(CacheConfig(), [SHAPE], errors, 2.1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sink_tokens": 4, "residual_window": 128},
        {"offsets": "on"},
        {"scale_format": "log8"},
        {"use_qjl": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("sliding_window", [None, 512])
@pytest.mark.parametrize("bits", [(2, 4), (3, 3)])
def test_the_budget_counts_what_memory_counts(changes, sliding_window, bits):
    tokens = 4096
    config = CacheConfig(*bits, budget_tokens=tokens, backend="torch", **changes)
    layer = CompressedLayer(config, 0, sliding_window)
    generator = torch.Generator().manual_seed(0)
    keys, values = (5 + torch.randn(1, 2, tokens + 32, 64, generator=generator) for _ in "kv")
    chunks = [*range(0, tokens - 32, 127), *range(tokens - 32, tokens + 33)]
    all_in, without_slack = [], []
    for start, stop in itertools.pairwise(chunks):
        layer.append(keys[:, :, start:stop], values[:, :, start:stop])
        layer.pool.history()
        counted = layer.memory()
        all_in.append(counted.bits_per_value)
        without_slack.append(all_in[-1] - 8 * counted.slack_bytes / counted.values)
    shape = LayerShape(2, 64, 64, 4, sliding_window)
    planned = all_in_bits(config, [shape], [bits])
    # slabs allocated ahead, and a sliding window that holds up to 63 tokens more than it shows
    assert planned == pytest.approx(np.mean(all_in[-64:]), rel=0.03 if sliding_window is None else 0.35)
    if sliding_window is None:
        assert planned == pytest.approx(np.mean(without_slack[-64:]), rel=2e-3)


def test_settings():
    config = CacheConfig(layer_bits=[[4, 2], [3, 3]])
    assert config.layer_bits == ((4, 2), (3, 3))
    assert CacheConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (config.for_layer(1).bits_k, config.for_layer(1).bits_v) == (3, 3)
    assert config.for_layer(0).layer_bits is None
    assert config.label == "K3.50/V2.50 by layer"
    assert CacheConfig(bits_budget=3).label == "auto 3"
    assert CacheConfig().for_layer(7) == CacheConfig()
    hash(config)
    for wrong, message in (
        ({"layer_bits": []}, "pair"),
        ({"layer_bits": [(4,)]}, "pair"),
        ({"layer_bits": [(4, 9)]}, r"layer_bits\[0\] bits_v=9: allowed are whole numbers from 1 to 8"),
        ({"layer_bits": [(4, 2)], "bits_budget": 3.0}, "beside layer_bits"),
        ({"bits_budget": 0}, "bits_budget=0"),
        ({"bits_budget": "3"}, "bits_budget='3'"),
        ({"budget_tokens": 63}, "budget_tokens=63"),
    ):
        with pytest.raises(ConfigError, match=message):
            CacheConfig(**wrong)
    with pytest.raises(ConfigError, match="no layer 2"):
        config.for_layer(2)
    for undecided in (config, CacheConfig(bits_budget=3.0)):
        with pytest.raises(ConfigError, match="no one page format"):
            page_format_for(undecided, 64, 64)
    with pytest.raises(ConfigError, match="bits_budget"):
        CompressedLayer(CacheConfig(bits_budget=3.0)).append(*(torch.zeros(1, 1, 1, 64) for _ in "kv"))


# --- the first prefill


def tokens_of(seed, count, heads=2, dim=64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, heads, count, dim, generator=generator) for _ in "kv")


def query_of(seed, count, heads=4, dim=64):
    return torch.randn(1, heads, count, dim, generator=torch.Generator().manual_seed(seed))


def planned(budget=3.4, layers=3, with_queries=True, sliding=None, **changes):
    config = CacheConfig(bits_budget=budget, backend="torch", **changes)
    made = [CompressedLayer(config, index, sliding if index == 1 else None) for index in range(layers)]
    return BitPlan(config, made, with_queries), made


def forward(plan, made, count, seed=0, shown=None):
    """What a model does: layer after layer takes tokens in, then attends."""
    outputs = []
    for index, layer in enumerate(made):
        step = layer.append(*tokens_of(seed + index, count))
        query = query_of(seed + index, count)
        if plan.with_queries and (shown is None or index in shown):
            plan.show_query(layer, query, 0.125)
        outputs.append(layer.attend(step, query, None, 0.125).out)
    return outputs


@pytest.mark.parametrize("with_queries", [True, False])
@pytest.mark.parametrize("chunks", [(300,), (20, 100, 64), (63, 1, 1), (1,) * 66])
@pytest.mark.parametrize(
    "changes", [{}, {"sink_tokens": 5, "residual_window": 30}, {"offsets": "on"}], ids=str
)
def test_after_the_decision_the_cache_is_one_of_those_bits(with_queries, chunks, changes):
    plan, made = planned(with_queries=with_queries, **changes)
    chunks = (*chunks, 40)
    held = []
    for turn, count in enumerate(chunks):
        outputs = forward(plan, made, count, 10 * turn)
        held.append(outputs)
    assert not plan.pending
    explicit = [
        CompressedLayer(plan.config.with_changes(bits_budget=None, bits_k=k, bits_v=v), index)
        for index, (k, v) in enumerate(plan.decided)
    ]
    for layer, twin in zip(made, explicit, strict=True):
        assert (layer.config.bits_k, layer.config.bits_v) == plan.decided[layer.layer]
        for turn, count in enumerate(chunks):
            twin.append(*tokens_of(10 * turn + layer.layer, count))
        assert layer.length == twin.length
        assert layer.pool.pages == twin.pool.pages > 0
        assert layer.window.capacity == twin.window.capacity
        tolerance = 0.0
        if "offsets" in changes:
            tolerance = 0.5  # frozen from other tokens: with a plan more of them are compressed first
        else:
            assert torch.equal(layer.pool.raw(), twin.pool.raw())
        for one, other in zip(layer.view().materialize(), twin.view().materialize(), strict=True):
            assert one.shape == other.shape
            assert (one - other).norm() <= tolerance * other.norm()


def test_the_first_pass_is_exact_and_what_follows_fits_the_budget():
    plan, made = planned(budget=5.2, budget_tokens=1024)
    outputs = forward(plan, made, 1024)
    for index, out in enumerate(outputs):
        keys, values = (part.double().repeat_interleave(2, 1) for part in tokens_of(index, 1024))
        logits = 0.125 * query_of(index, 1024).double() @ keys.transpose(-1, -2)
        seen = torch.ones(1024, 1024, dtype=torch.bool).tril()
        wanted = torch.softmax(torch.where(seen, logits, -torch.inf), -1) @ values
        assert (out - wanted).norm() < 1e-5 * wanted.norm()
    report = MemoryReport.sum(layer.memory() for layer in made)
    assert report.layer_bits == plan.decided
    assert {bits for pair in plan.decided for bits in pair} <= set(WIDTHS)
    bits = []
    for turn in range(64):  # the windows fill and empty again
        forward(plan, made, 1, turn)
        report = MemoryReport.sum(layer.memory() for layer in made)
        bits.append(8 * (report.total_bytes - report.slack_bytes) / (3 * 1024 * 2 * 2 * 64))
    assert np.mean(bits) == pytest.approx(5.2, abs=0.35)
    assert np.mean(bits) <= 5.2 * 1.03  # up to 64 tokens more than those 1024


def test_nothing_is_compressed_while_a_layer_is_open():
    plan, made = planned()
    forward(plan, made[:2], 200)
    assert plan.pending
    assert all(layer.pool.pages == 0 and layer.waits for layer in made[:2])
    assert made[0].memory().layer_bits == ()
    made[0].crop(150)
    assert len(made[0].window) == 50
    assert torch.equal(made[0].view().materialize().keys, tokens_of(0, 200)[0][:, :, :50])


def test_a_layer_that_is_never_used_does_not_hold_up_the_others():
    plan, made = planned()
    forward(plan, made[:2], 200)
    forward(plan, made[:2], 1, seed=5)
    assert not plan.pending
    assert all(layer.pool.pages == 3 for layer in made[:2])
    made[2].append(*tokens_of(0, 100))
    assert made[2].pool.pages == 1
    assert (made[2].config.bits_k, made[2].config.bits_v) == plan.decided[2]


def test_reset_and_copies():
    plan, made = planned()
    forward(plan, made, 200)
    decided = plan.decided
    twins = copy.deepcopy(made)
    assert twins[0].plan is twins[2].plan is not plan
    for layer in made:
        layer.reset()
    assert plan.pending
    assert twins[0].plan.decided == decided
    forward(plan, made, 100, seed=7)
    assert not plan.pending


def test_errors_are_those_of_the_attention_output():
    """Against float64 attention with core's codec, at one width of each side."""
    keys, values = tokens_of(3, 300)
    query = query_of(3, 300)
    found = expected_errors(ExactTokens(keys, values), query, 0.3, CacheConfig())
    wanted = [{}, {}]
    position = torch.arange(150, 300, 5)

    def attention(keys, values):
        logits = 0.3 * query[:, :, position].double() @ keys.repeat_interleave(2, 1).transpose(-1, -2)
        seen = torch.arange(300) <= position[:, None]
        return torch.softmax(torch.where(seen, logits, -torch.inf), -1) @ values.repeat_interleave(2, 1)

    exact = attention(keys.double(), values.double())
    for width in WIDTHS:
        codec = page_format_for(CacheConfig(width, width), 64, 64).key
        coded = [
            torch.from_numpy(codec.decode(codec.encode(part.double().numpy()))).double()
            for part in (keys, values)
        ]
        wanted[0][width] = float((attention(coded[0], values.double()) - exact).square().sum())
        wanted[1][width] = float((attention(keys.double(), coded[1]) - exact).square().sum())
    total = wanted[0][3] + wanted[1][3]
    for side, expected in zip((found.keys, found.values), wanted, strict=True):
        for width in WIDTHS:
            assert side[width] == pytest.approx(expected[width] / total, rel=2e-3)


def test_sharp_attention_asks_for_key_bits():
    """Where logits are large, errors of the keys are what shows."""
    tokens, query = ExactTokens(*tokens_of(3, 300)), query_of(3, 300)
    flat, sharp = (expected_errors(tokens, query, scaling, CacheConfig()) for scaling in (0.01, 0.3))
    assert flat.keys[3] < 0.1 * flat.values[3]
    assert sharp.keys[3] > 0.7 * sharp.values[3]


# --- calibration files


def calibration():
    errors = SideErrors(falling(3.0, 2.0, 1.0), falling(0.3, 0.2, 0.1))
    return Calibration(((SHAPE, errors), None, (SHAPE, errors)), "kl", {"config": "abc"}, {"tokens": 5})


def test_calibrations_are_written_read_and_spent(tmp_path):
    calibration().save(tmp_path / "c.json")
    found = Calibration.load(tmp_path / "c.json")
    assert found == calibration()
    config = CacheConfig(5, 6)
    low, high = (found.all_in_bits(config, ((b, b), (5, 6), (b, b))) for b in (2, 4))
    assert found.layer_bits(config, low) == ((2, 2), (5, 6), (2, 2))
    assert found.layer_bits(config, high) == ((4, 4), (5, 6), (4, 4))
    assert found.layer_bits(config, (low + high) / 2) == ((4, 2), (5, 6), (4, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "version 2: allowed is"),
        (lambda c: c.update(format="x"), "is a 'x'"),
        (lambda c: c["layers"][0]["keys"].pop("3"), "no calibration"),
        (lambda c: c["layers"][0]["keys"].update({"3": float("nan")}), "no calibration"),
        (lambda c: c.update(layers=[None]), "no calibration"),
        (lambda c: c.pop("layers"), "no calibration"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    calibration().save(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    change(content)
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        Calibration.load(tmp_path / "c.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Calibration.load(tmp_path / "missing.json")


def test_an_offset_is_a_vector_of_each_head_and_sinks_are_none_of_a_sliding_layer():
    def bits(shape, **changes):
        return all_in_bits(CacheConfig(budget_tokens=1024, **changes), [shape], [(3, 3)])

    vectors_bytes = SHAPE.kv_heads * (SHAPE.key_dim + SHAPE.value_dim) * SHAPE.value_bytes
    values = 1024 * SHAPE.kv_heads * (SHAPE.key_dim + SHAPE.value_dim)
    assert bits(SHAPE, offsets="on") - bits(SHAPE) == pytest.approx(8 * vectors_bytes / values)
    sliding = replace(SHAPE, sliding_window=256)
    assert bits(sliding, sink_tokens=64) == bits(sliding)
    assert bits(SHAPE, sink_tokens=64) > bits(SHAPE)


def test_rounding_of_large_costs_does_not_break_the_budget():
    """Counted in units of 1,000, 40 items of 409,999 would be 16,360 of 16,384."""
    rows = [[0, 409_999, 410_000]] * 40
    chosen = _knapsack(rows, [[3.0, 2.0, 2.0]] * 40, 16_384_000)
    assert chosen.count(0) == 1


@pytest.mark.parametrize("count", [1023, 1024, 1025, 3000])
def test_the_sample_is_the_first_page_and_the_newest_tokens(count):
    tokens = ExactTokens(*(torch.arange(float(count)).view(1, 1, -1, 1) for _ in "kv"))
    wanted = [*range(64), *range(count - 960, count)] if count > 1024 else list(range(count))
    for part in _sampled(tokens):
        assert part.flatten().tolist() == wanted
