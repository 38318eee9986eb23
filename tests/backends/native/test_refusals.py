"""What must never reach the kernels is refused in Python, with a message that names it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tqai.backends.base import ExactTokens
from tqai.errors import InputError


@pytest.fixture
def call(native, page_format, history):
    """attend() on good arguments, some of them replaced."""
    pages = page_format(4, 2, 128)

    def attend(**changes):
        found, _, _ = history(pages, 2, 2, 3)
        if "history" in changes:
            found = dataclasses.replace(found, **changes.pop("history"))
        arguments = {
            "query": torch.randn(2, 8, 1, 128),
            "history": found,
            "sinks": None,
            "recent": ExactTokens(torch.randn(2, 2, 1, 128), torch.randn(2, 2, 1, 128)),
            "mask": None,
            "scaling": 0.1,
        }
        return native.attend(**{**arguments, **changes})

    return attend


def test_good_arguments_pass(call):
    assert call().out.isfinite().all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": torch.randn(2, 8, 128)}, "query"),
        ({"query": torch.randn(2, 8, 1, 64)}, "query"),
        ({"query": torch.randn(2, 8, 1, 128).double()}, "query"),
        ({"query": torch.randn(2, 7, 1, 128)}, "7 query heads"),
        ({"query": torch.randn(2, 8, 2, 128)}, "recent tokens"),
        ({"query": torch.randn(3, 8, 1, 128)}, "recent"),
        ({"query": torch.empty(2, 8, 1, 128, device="meta")}, "query"),
        ({"recent": ExactTokens(torch.randn(2, 2, 1, 128), torch.randn(2, 2, 1, 64))}, "recent values"),
        ({"recent": ExactTokens(torch.randn(2, 2, 1, 128), torch.randn(2, 2, 2, 128))}, "recent values"),
        ({"sinks": ExactTokens(torch.randn(1, 2, 4, 128), torch.randn(1, 2, 4, 128))}, "sinks"),
        ({"mask": torch.ones(2, 1, 1, 193)}, "mask"),
        ({"mask": torch.ones(2, 1, 1, 192, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(2, 3, 1, 193, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(1, 193, dtype=torch.bool)}, "mask"),
        ({"history": {"addresses": torch.ones(2, 2, dtype=torch.int64)}}, "addresses"),
        ({"history": {"addresses": torch.ones(1, 3, dtype=torch.int64)}}, "addresses"),
        ({"history": {"addresses": torch.ones(2, 3, dtype=torch.int32)}}, "addresses"),
        ({"history": {"addresses": torch.ones(3, 2, dtype=torch.int64).T}}, "addresses"),
        ({"history": {"addresses": torch.zeros(2, 3, dtype=torch.int64)}}, "null"),
        ({"history": {"addresses": torch.full((2, 3), 8, dtype=torch.int64)}}, "multiple of 16"),
        ({"history": {"first_token": 64}}, "first_token"),
        ({"history": {"counts": torch.ones(3, dtype=torch.int32)}}, "counts"),
        ({"history": {"counts": torch.ones(2, dtype=torch.int64)}}, "counts"),
        ({"history": {"counts": torch.tensor([3, 4], dtype=torch.int32)}}, "not served"),
        ({"history": {"counts": torch.tensor([-1, 3], dtype=torch.int32)}}, "not served"),
        ({"history": {"slabs": [torch.zeros(6, 2, 100, dtype=torch.uint8)]}}, "slab"),
    ],
)
def test_attend_refuses(call, changes, message):
    with pytest.raises(InputError, match=message):
        call(**changes)


def test_encode_and_decode_refuse(native, page_format):
    pages = page_format(4, 2, 128)
    rows, raw = torch.randn(1, 2, 64, 128), torch.empty(1, 2, pages.page_bytes, dtype=torch.uint8)
    for keys, values, out in (
        (rows[:, :, :63], rows, raw),
        (rows, rows[..., :64], raw),
        (rows.double(), rows, raw),
        (rows, rows, raw[..., :-1]),
        (rows, rows, raw.to(torch.int8)),
        (rows, rows, torch.empty(1, 2, 2 * pages.page_bytes, dtype=torch.uint8)[..., ::2]),
    ):
        with pytest.raises(InputError):
            native.encode(keys, values, pages, out)
    for wrong in (raw[..., :-1], raw.to(torch.int8)):
        with pytest.raises(InputError):
            native.decode(wrong, pages, torch.float32)
    with pytest.raises(InputError):
        native.decode(raw, pages, torch.float64)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ((1, 4, 128), "1 bits"),
        ((4, 6, 128), "6 bits"),
        ((4, 4, 112), "head_dim 112"),
        ((4, 4, 72), "head_dim 72"),
    ],
)
def test_what_is_not_served_says_so(native, page_format, settings, reason):
    assert reason in native.refuses(page_format(*settings), "cpu", "float32")


def test_other_devices_and_dtypes_are_not_served(native, page_format):
    assert "cuda" in native.refuses(page_format(), "cuda", "float32")
    assert "float64" in native.refuses(page_format(), "cpu", "float64")
    assert native.refuses(page_format(), "cpu", "bfloat16") is None


def test_a_history_is_looked_at_for_every_batch_and_number_of_heads(native, page_format, history):
    """What was found right once is not looked at again, but for other arguments, and in no copy."""
    found, _, _ = history(page_format(4, 2, 128), 2, 2, 3)

    def attend(history, batch, kv_heads):
        recent = ExactTokens(*(torch.randn(batch, kv_heads, 1, 128) for _ in range(2)))
        return native.attend(torch.randn(batch, 8, 1, 128), history, None, recent, None, 0.1)

    for _ in range(2):
        attend(found, 2, 2)
        with pytest.raises(InputError, match="has 2 rows for a batch of 1"):
            attend(found, 1, 2)
        with pytest.raises(InputError, match="a slab"):
            attend(found, 2, 4)
    assert attend(copy.deepcopy(found), 2, 2).out.isfinite().all()
    other = dataclasses.replace(found, first_token=64)
    with pytest.raises(InputError, match="first_token=64"):
        attend(other, 2, 2)
