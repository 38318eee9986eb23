"""Keys balanced against queries: exact, worth it where it is asked for, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch

from tqai.backends.base import ExactTokens
from tqai.cache.balance import MOST_LEFT, factors, query_energy
from tqai.cache.first_prefill import BitPlan
from tqai.cache.layer import CompressedLayer
from tqai.cache.layer_state import export_layer, import_layer
from tqai.cache.offsets import Offsets
from tqai.cache.storage import read_file, write_file
from tqai.config import CacheConfig
from tqai.evaluation import held_bytes

DIM, HEADS, GROUPS = 64, 2, 3
SCALE = torch.ones(DIM)
SCALE[4::8] = 4.0  # "pairs" of benchmarks/pathological.py
SCALING = DIM**-0.5


def tokens(count, seed=0, scale=SCALE, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, HEADS, count, DIM, generator=generator) for _ in "kv")
    return ExactTokens((keys * scale).to(dtype), values.to(dtype))


def queries(count, seed=1, scale=SCALE):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(2, HEADS * GROUPS, count, DIM, generator=generator) / scale


def layer(expects=True, **changes):
    settings = {"bits_k": 3, "bits_v": 8, "balance": "auto", "backend": "torch", **changes}
    made = CompressedLayer(CacheConfig(**settings))
    made.expects_queries = expects
    return made


def truth(held, query):
    keys, values = (part.double().repeat_interleave(GROUPS, 1) for part in held)
    return torch.softmax(SCALING * query.double() @ keys.transpose(-1, -2), -1) @ values


def shown(made, count, seed=0, **kwargs):
    step = made.append(*tokens(count, seed, **kwargs))
    if made.wants_query:
        made.see_query(queries(count, seed + 1))
    return step


def test_factors_are_those_of_least_error():
    keys, energy = tokens(500).keys, query_energy(queries(300), HEADS)
    by = factors(keys, energy)
    assert by.shape == (2, HEADS, 1, DIM)
    assert by.log().mean(-1).abs().max() < 1e-5
    # 1/4 against the others, by definition of SCALE
    assert (by[..., SCALE == 4] / by[..., SCALE == 1].mean(-1, keepdim=True) - 0.25).abs().max() < 0.05

    def product(scale):
        return (keys * scale).square().sum((2, 3)) * (energy / scale.squeeze(2).square()).sum(-1)

    assert (product(by) < 0.5 * product(torch.ones_like(by))).all()
    for seed in range(20):
        other = by * torch.exp(0.3 * torch.randn(by.shape, generator=torch.Generator().manual_seed(seed)))
        assert (product(by) <= product(other)).all()


def test_only_heads_that_win_take_part():
    ones = torch.ones(DIM)
    energy = query_energy(queries(300, scale=ones), HEADS)
    assert factors(tokens(500, scale=ones).keys, energy) is None
    mixed = tokens(500).keys
    mixed[:, 1] = tokens(500, scale=ones).keys[:, 1]
    energy[:, 0] = query_energy(queries(300), HEADS)[:, 0]
    by = factors(mixed, energy)
    assert (by[:, 1] == 1).all() and (by[:, 0] != 1).any()
    assert 0 < MOST_LEFT < 1


def test_a_coordinate_that_no_query_uses():
    keys, energy = tokens(200).keys, query_energy(queries(100), HEADS)
    keys[..., 9] *= 100.0
    energy[..., 9] = 0.0
    by = factors(keys, energy)
    assert by.isfinite().all() and (by > 0).all()
    assert (by[..., 9] < 0.1 * by[..., 10]).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0, 3e38])
def test_factors_of_odd_tokens(bad):
    keys = tokens(200).keys
    keys[:, :, 7] = bad
    by = factors(keys, query_energy(queries(100), HEADS))
    assert by is None or by.isfinite().all()
    odd = queries(100)
    odd[:, :, 3] = bad
    assert query_energy(odd, HEADS).isfinite().all() or bad == 3e38
    assert factors(torch.zeros_like(keys), query_energy(queries(9), HEADS)) is None
    assert factors(tokens(70).keys, torch.zeros(2, HEADS, DIM)) is None


def test_the_grouping_of_energies():
    query = torch.zeros(1, 6, 300, 4)
    query[0, 2:4, -1] = 16.0
    energy = query_energy(query, 3)
    assert energy.shape == (1, 3, 4)
    assert energy[0, :, 0].tolist() == [0, 1.0, 0]  # 2 of 2 * 256 are 256


@pytest.mark.parametrize(
    "changes", [{}, {"residual_window": 30, "sink_tokens": 5}, {"offsets": "on"}], ids=str
)
@pytest.mark.parametrize("chunks", [(400,), (40, 100, 200, 60)], ids=str)
def test_attention_gains_what_it_promises(changes, chunks):
    errors = {}
    for balance in ("off", "auto"):
        made = layer(balance=balance, bits_k=4, **changes)
        for turn, count in enumerate(chunks):
            shown(made, count, turn)
        query, seen = queries(32, 99), torch.ones(1, 1, 32, sum(chunks), dtype=torch.bool)
        out = made.attend(made.view(), query, seen, SCALING)
        parts = [tokens(count, turn) for turn, count in enumerate(chunks)]
        wanted = truth([torch.cat(side, 2) for side in zip(*parts, strict=True)], query)
        errors[balance] = float((out.out - wanted).norm() / wanted.norm())
        assert made.pool.pages == (sum(chunks) - made.config.window_tokens - made.sink_tokens) // 64
        assert (made.offsets is not None and made.offsets.factors is not None) == (balance == "auto")
    assert errors["auto"] < 0.75 * errors["off"]
    assert errors["auto"] < 0.25


def test_exact_tokens_stay_exact():
    held = tokens(90)
    offsets = Offsets(
        held.keys.mean(2, keepdim=True), None, factors(held.keys, query_energy(queries(50), HEADS))
    )
    moved, query = offsets.taken_off(held), queries(1)
    target = ExactTokens(*(torch.empty_like(part) for part in held))
    offsets.take_off_into(target, held)
    for one, other, back in zip(moved, target, offsets.put_back(moved), strict=True):
        assert torch.equal(one, other)
        assert back.shape == one.shape
    logits = [
        q.double() @ k.double().repeat_interleave(GROUPS, 1).transpose(-1, -2)
        for q, k in ((query, held.keys - offsets.keys), (offsets.for_query(query), moved.keys))
    ]
    assert (logits[0] - logits[1]).norm() < 1e-6 * logits[0].norm()
    assert (offsets.put_back(moved).keys - held.keys).norm() < 1e-6 * held.keys.norm()
    assert offsets.nbytes == 2 * 2 * HEADS * DIM * 4
    rows = torch.tensor([1, 1, 0])
    assert torch.equal(offsets.select(rows).factors, offsets.factors[rows])


def test_factors_are_of_keys_without_their_offset():
    made = layer(offsets="on")
    keys, values = tokens(300)
    keys[..., 3] += 50.0
    made.append(keys, values)
    made.see_query(queries(300))
    assert (made.offsets.keys[..., 3] > 40).all()
    by = made.offsets.factors.squeeze(2)
    assert (by[..., 3] / by[..., 2] - 1).abs().max() < 0.3


@pytest.mark.parametrize("changes", [{}, {"residual_window": 20}], ids=str)
def test_pages_wait_for_the_first_query_and_no_longer(changes):
    made, off = layer(**changes), layer(balance="off", **changes)
    made.append(*tokens(300))
    off.append(*tokens(300))
    assert made.pool.pages == 0 and made.waits and made.wants_query
    assert made.memory().layer_bits == ()
    made.see_query(queries(300))
    assert made.pool.pages == off.pool.pages > 0
    assert not made.waits and not made.wants_query
    assert len(made.window) == len(off.window)
    assert made.window.capacity == off.window.capacity
    before = made.offsets
    made.see_query(queries(5))
    assert made.offsets is before


def test_without_a_query_it_is_as_without_balance():
    forgotten, never, off = layer(), layer(expects=False), layer(balance="off")
    for made in (forgotten, never, off):
        for turn in range(3):
            made.append(*tokens(150, turn))
    assert forgotten.offsets is never.offsets is None
    for made in (forgotten, never):
        assert torch.equal(made.pool.raw(), off.pool.raw())
        assert len(made.window) == len(off.window)


def test_taking_tokens_back_and_going_on():
    made = layer()
    shown(made, 300)
    assert made.offsets.factors is not None
    made.crop(280)
    assert made.offsets is None and made.pool.pages == 0
    kept = made.view().materialize()
    error = (kept.keys - tokens(300).keys[:, :, :20]).norm() / kept.keys.norm()
    assert error < 0.2  # out of a page of 3 bits
    made.select(torch.tensor([1, 0, 0]))
    made.append(*(part[[1, 0, 0]] for part in tokens(200, 5)))
    assert made.pool.pages == 3 and made.offsets.factors.shape[0] == 3


def test_with_bits_by_the_first_prefill():
    made = [layer(bits_v=3, bits_budget=5.0, balance="auto") for _ in range(2)]
    for index, one in enumerate(made):
        one.layer = index
    plan = BitPlan(made[0].config.with_changes(bits_budget=5.0), made, with_queries=True)
    for one in made:
        one.append(*tokens(300))
        one.see_query(queries(300))
        plan.show_query(one, queries(300), SCALING)
    assert not plan.pending
    for one in made:
        assert one.pool.pages == 4 and one.offsets.factors is not None and not one.waits


def test_saved_and_read_again(tmp_path):
    made = layer(offsets="on")
    shown(made, 300)
    tensors, about = export_layer(made)
    assert set(tensors) >= {"key_factors", "value_offsets"}
    write_file(
        tmp_path / "file", {f"layers.0.{name}": part for name, part in tensors.items()}, {"layers": []}
    )
    read, header = read_file(tmp_path / "file")
    assert header["version"] == 4
    again = layer(offsets="on")
    import_layer(
        again,
        {name.removeprefix("layers.0."): part for name, part in read.items()},
        about,
        torch.device("cpu"),
    )
    for one, other in zip(again.view().materialize(), made.view().materialize(), strict=True):
        assert torch.equal(one, other)
    query, step = queries(1), again.view()
    assert torch.equal(
        again.attend(step, query, None, SCALING).out, made.attend(made.view(), query, None, SCALING).out
    )
    assert torch.equal(copy.deepcopy(made).offsets.factors, made.offsets.factors)


@pytest.mark.parametrize("scale", [SCALE, torch.ones(DIM)], ids=["factors", "none"])
def test_memory_counts_what_balance_holds(scale):
    made = layer()
    made.append(*tokens(400, scale=scale))
    made.see_query(queries(400, scale=scale))
    assert (made.offsets is not None) == (scale is SCALE)
    assert made.memory().total_bytes == held_bytes(made)


def test_a_coordinate_that_nobody_uses_gets_no_boundless_factor():
    """Energies count for a thousandth of their mean at least, and factors are within 1/32 to 32."""
    keys, energy = tokens(300, scale=torch.ones(DIM)).keys, torch.ones(2, HEADS, DIM)
    keys[..., 4:] *= 0.1
    keys[..., 3] = 0
    energy[..., :3] = 0.01
    by = factors(keys, energy)
    # |q| / |k| is 1 / 0.1 of the usual coordinate, and 1 / sqrt(floor of |k|^2) of this one
    usual = by[..., 10:].mean(-1)
    floor = 1e-3 * keys.square().mean((2, 3))
    wanted = (keys[..., 10:].square().mean((2, 3)) / floor) ** 0.25
    assert (by[..., 3] / usual - wanted.unsqueeze(-1)).abs().max() < 0.3
    energy[:] = 0
    energy[..., 3] = 1
    by = factors(tokens(300, scale=(torch.arange(DIM) != 3).float()).keys, energy)
    assert (by[..., 3] == 32).all()


def test_keys_that_a_factor_could_carry_out_of_range_stay():
    keys, energy = tokens(300, dtype=torch.float16).keys, query_energy(queries(300), HEADS)
    keys[:, 0, 5, 0] = 2000  # 32 times that is beyond float16
    by = factors(keys, energy)
    assert (by[:, 0] == 1).all() and (by[:, 1] != 1).any()


def test_the_query_of_a_prompt_without_a_page_is_not_taken():
    """With the sinks still to come, 66 tokens fill no page."""
    made = layer(sink_tokens=4)
    shown(made, 66)
    assert not made.waits and made.wants_query and not made.pool.pages
    shown(made, 3, seed=2)
    assert made.pool.pages == 1 and not made.wants_query
