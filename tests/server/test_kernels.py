"""The engine's Triton kernels: on the GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts off where bfloat16 is to be rounded
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
TOLERANCE = 3e-3 if DEVICE == "cuda" else 1e-3
MODULE = "tqai.server.engine.exact_decode"
MERGE = "tqai.server.engine.merge_kernel"


def _triton_fixtures():
    path = Path(__file__).parents[1] / "backends" / "triton" / "conftest.py"
    spec = importlib.util.spec_from_file_location("triton_fixtures", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton", reason="triton is not installed")
    if DEVICE == "cuda":
        yield importlib.import_module(MODULE), importlib.import_module(MERGE)
        return
    fixtures = _triton_fixtures()
    packages = ("triton", MODULE, MERGE)
    before = fixtures._taken_out(packages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        fixtures._let_numpy_index()
        yield importlib.import_module(MODULE), importlib.import_module(MERGE)
    fixtures._taken_out(packages)
    sys.modules.update(before)


@pytest.mark.parametrize(
    ("dims", "group", "pages", "recent"),
    [
        ((32, 64), 4, [5, 0, 2], [64, 1, 63]),
        ((64, 16), 20, [1], [17]),
    ],
)
def test_attends_as_plain_attention_does(kernels, dims, group, pages, recent):
    """Pages in any order; whatever is beyond the lengths is NaN and does not show."""
    torch.manual_seed(0)
    batch, kv_heads, room, slots = len(pages), 2, 6, 9
    sides = [torch.randn(slots, kv_heads, 64, dim, device=DEVICE).to(DTYPE) for dim in dims]
    slab = torch.cat([side.flatten(2) for side in sides], dim=-1).contiguous()
    numbers = torch.randperm(slots - 1, generator=torch.Generator().manual_seed(1))
    table = torch.full((batch, room), slots - 1, dtype=torch.int64)
    slab[slots - 1] = torch.nan
    used = iter(numbers.tolist())
    for row, count in enumerate(pages):
        table[row, :count] = torch.tensor([next(used) for _ in range(count)])
    # slots with sinks beside them are wider than 64 tokens
    exact = [torch.randn(batch + 1, kv_heads, 64, dim, device=DEVICE).to(DTYPE)[:batch] for dim in dims]
    for row, count in enumerate(recent):
        for part in exact:
            part[row, :, count:] = torch.nan
    query = torch.randn(batch, kv_heads * group, 1, dims[0], device=DEVICE).to(DTYPE)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    counts = [torch.tensor(count, dtype=torch.int32, device=DEVICE) for count in (pages, recent)]
    out, lse = kernels[0].attend_exact_pages(
        query, slab, table.to(DEVICE), counts[0], *exact, counts[1], scaling=0.11
    )
    assert out.shape == (batch, kv_heads * group, 1, dims[1]) and out.dtype == DTYPE
    for row in range(batch):
        keys, values = (
            torch.cat([*side[table[row, : pages[row]]].unbind(0), part[row, :, : recent[row]]], dim=1)
            .repeat_interleave(group, 0)
            .double()
            for side, part in zip(sides, exact, strict=True)
        )
        logits = 0.11 * (query[row].double() @ keys.transpose(1, 2))
        expected = logits.softmax(-1) @ values
        assert (out[row].double() - expected).norm() < TOLERANCE * expected.norm()
        assert torch.allclose(lse[row].double(), logits.logsumexp(-1), atol=2e-3)


def test_shapes_that_the_kernels_take(kernels):
    serves = kernels[0].serves
    assert serves(128, 64, torch.bfloat16)
    assert not serves(96, 96, torch.bfloat16)
    assert not serves(512, 128, torch.bfloat16)
    assert not serves(128, 128, torch.float32)


def test_merging_is_one_softmax_over_both(kernels):
    """Into rows of a larger tensor; what is beside them stays as it was. Each side has strides and a dtype
    of its own."""
    torch.manual_seed(0)
    number, heads, rows, dim = 2, 3, 19, 40
    one = torch.randn(rows, number, heads, dim, device=DEVICE).to(DTYPE).permute(1, 2, 0, 3)
    other = torch.randn(number, rows, heads, dim, device=DEVICE).transpose(1, 2)
    one_lse = 4 * torch.randn(rows, number, heads, device=DEVICE).permute(1, 2, 0)
    other_lse = 4 * torch.randn(number, heads, rows, device=DEVICE)
    shares = torch.stack([one_lse, other_lse]).softmax(0)[..., None]
    expected = shares[0] * one.float() + shares[1] * other
    for dtype in (torch.float32, DTYPE):
        wide = torch.full((heads, number, rows + 7, dim), 7.0, device=DEVICE, dtype=dtype)
        wide_lse = torch.full((heads, number, rows + 7), 7.0, device=DEVICE)
        inside, inside_lse = (part.transpose(0, 1)[:, :, 5 : 5 + rows] for part in (wide, wide_lse))
        kernels[1].merge(one, one_lse, other, other_lse, inside, inside_lse)
        tolerance = {"atol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
        assert torch.allclose(inside.float(), expected, **tolerance)
        assert torch.allclose(inside_lse, torch.logaddexp(one_lse, other_lse), atol=1e-5)
        for part in (wide, wide_lse):
            assert (part[:, :, :5] == 7).all() and (part[:, :, 5 + rows :] == 7).all()
