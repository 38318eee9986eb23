"""The window's buffer: what it holds, what it costs, and views that stay true."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai.backends.base import ExactTokens
from tqai.cache.offsets import Offsets
from tqai.cache.window import ROOM_TOKENS, Window


def tokens(start, count, batch=2):
    """Tokens numbered from `start` on: every coordinate of a key is its number, of a value minus that."""
    numbers = torch.arange(start, start + count, dtype=torch.float32).view(1, 1, -1, 1)
    keys = numbers.expand(batch, 3, count, 4)
    return ExactTokens(keys.clone(), -keys[..., :2].clone())


def window(capacity, batch=2):
    return Window(*tokens(0, 1, batch), capacity)


operations = st.lists(
    st.tuples(st.sampled_from(["append", "oldest", "newest", "replace", "fix"]), st.integers(0, 70)),
    max_size=30,
)


@given(operations, st.integers(1, 90))
@settings(max_examples=200, deadline=None)
def test_it_holds_the_tokens_that_a_list_would(done, capacity):
    held, expected, following = window(capacity), [], 0
    fixed = False
    for what, count in done:
        if what == "append":
            fits = held.append(*tokens(following, count))
            assert fits == (len(expected) + count <= capacity)
            expected += range(following, following + count) if fits else []
            following += count
        elif what == "replace":
            count = min(count, capacity)
            held.replace(*tokens(following, count))
            expected = list(range(following, following + count))
            following += count
        elif what == "fix":
            held.fix()
            fixed = True
        else:
            count = min(count, len(expected))
            getattr(held, f"drop_{what}")(count)
            expected = expected[count:] if what == "oldest" else expected[: len(expected) - count]
        assert len(held) == len(expected)
        assert held.tokens.keys[1, 2, :, 3].tolist() == expected
        assert held.tokens.values[0, 0, :, 1].tolist() == [-number for number in expected]
        assert held.keys.shape[2] == held.values.shape[2] == held.rows
        if fixed:
            assert held.rows == capacity
        else:
            assert len(expected) <= held.rows <= max(capacity, ROOM_TOKENS)
            # spent rows are given back at once; what was taken back stays room until it is much
            assert held.rows <= len(expected) + ROOM_TOKENS


def test_decoding_holds_little_more_than_the_tokens():
    held, rows = window(128 + 64), []
    for number in range(1000):
        held.append(*tokens(number, 1))
        if len(held) == 128 + 64:
            held.drop_oldest(64)
        rows.append(held.rows - len(held))
    assert max(rows) <= ROOM_TOKENS
    assert sum(rows) / len(rows) <= ROOM_TOKENS / 2


def test_views_of_one_step_stay_true_in_the_next():
    held = window(100)
    held.append(*tokens(0, 90))
    before = held.tokens.keys
    seen = before.clone()
    held.drop_oldest(64)
    held.append(*tokens(90, 70))
    assert torch.equal(before, seen)


def test_a_fixed_buffer_keeps_its_address():
    held = window(70)
    held.append(*tokens(0, 30))
    held.fix()
    places = held.keys.data_ptr(), held.values.data_ptr()
    for start in range(30, 2000, 10):
        if not held.append(*tokens(start, 10)):
            held.drop_oldest(60)
            assert held.append(*tokens(start, 10))
        held.drop_newest(1)
        held.append(*tokens(start + 9, 1))
    assert (held.keys.data_ptr(), held.values.data_ptr()) == places
    held.replace(*tokens(5, 70))
    assert held.keys.data_ptr() == places[0]
    held.move_to_front()
    assert (held.start, held.stop) == (0, 70)


@pytest.mark.parametrize("fixed", [False, True])
def test_moved_tokens_lie_in_new_buffers(fixed):
    held = window(70)
    held.append(*tokens(0, 30))
    if fixed:
        held.fix()
    before = held.tokens.keys
    held.move(Offsets(torch.ones(2, 3, 1, 4), None).taken_off)
    assert held.tokens.keys[0, 0, :, 0].tolist() == [float(n - 1) for n in range(30)]
    assert held.tokens.values[0, 0, :, 0].tolist() == [float(-n) for n in range(30)]
    assert before[0, 0, :, 0].tolist() == list(range(30))
    assert held.rows == (70 if fixed else 30)


def test_too_many_are_refused():
    with pytest.raises(ValueError, match="71 tokens do not fit a window of 70"):
        window(70).replace(*tokens(0, 71))


def test_no_more_rows_than_it_may_hold():
    held = window(70)
    held.append(*tokens(0, 66))
    assert held.append(*tokens(66, 1)) and held.rows == 70
    assert held.append(*tokens(67, 3)) and not held.append(*tokens(70, 1))
    assert held.rows == 70
