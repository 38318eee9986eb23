"""Offsets of keys and values are estimated from what is typical."""

from __future__ import annotations

import pytest
import torch
from tests.cache.biased_tokens import DIM, biased, mean_of

from tqai.backends.base import Attended, ExactTokens
from tqai.cache.offsets import LEAST_TOKENS, MOST_TOKENS, Offsets, estimate


def test_the_mean_is_found():
    tokens = ExactTokens(*biased(1, 3, 2, 512))
    found = estimate(tokens, "on")
    for offset, part in zip((found.keys, found.values), tokens, strict=True):
        # the standard deviation of a mean of 512 is 0.044; shrinking takes little from means around 8
        assert (offset - mean_of(part)).abs().max() < 0.1


def test_without_a_mean_there_is_nothing_to_take():
    generator = torch.Generator().manual_seed(0)
    tokens = ExactTokens(*(torch.randn(2, 2, 256, DIM, generator=generator) for _ in "kv"))
    assert estimate(tokens, "auto") is None
    on = estimate(tokens, "on")
    assert on.keys.abs().max() < 0.3


def test_auto_asks_every_head():
    keys, values = biased(1, 1, 2, 256)
    keys[:, 1] -= mean_of(keys)[:, 1]
    values -= mean_of(values)
    found = estimate(ExactTokens(keys, values), "auto")
    assert found.values is None
    assert (found.keys[:, 1] == 0).all()
    assert (found.keys[:, 0] - mean_of(keys)[:, 0]).abs().max() < 0.2


def test_huge_sinks_do_not_spoil_it():
    keys, values = biased(1, 1, 2, 128)
    plain = estimate(ExactTokens(keys, values), "on")
    keys, values = keys.clone(), values.clone()
    for part in (keys, values):
        part[:, :, (0, 17)] = 1e4 * torch.randn(1, 2, 2, DIM, generator=torch.Generator().manual_seed(5))
    spoilt = estimate(ExactTokens(keys, values), "on")
    for one, other in zip((plain.keys, plain.values), (spoilt.keys, spoilt.values), strict=True):
        assert (one - other).abs().max() < 0.1


def test_padding_counts_once():
    keys, values = biased(1, 2, 2, 400)
    wanted = estimate(ExactTokens(keys[1:, :, 340:], values[1:, :, 340:]), "on")
    for part in (keys, values):
        part[1, :, :340] = 50 + 1e-4 * torch.randn(2, 340, DIM, generator=torch.Generator().manual_seed(5))
    found = estimate(ExactTokens(keys, values), "on")
    for one, other in zip((wanted.keys, wanted.values), (found.keys, found.values), strict=True):
        # the first token of the padding still counts, as one of 61
        assert (one[0] - other[1]).abs().max() < 2.0
    assert (found.keys[0] - mean_of(keys)[0]).abs().max() < 0.2


def test_a_mean_that_turns_is_left_alone():
    """What RoPE turns once in 200 tokens has no mean to rely on; what it turns once in 20000 has."""
    position = torch.arange(300.0)
    keys, values = biased(1, 1, 1, 300, bias=0.0)
    for at, wavelength in ((0, 200.0), (1, 20000.0)):
        keys[0, 0, :, at] += 30 * torch.cos(2 * torch.pi * position / wavelength)
    found = estimate(ExactTokens(keys, values), "on").keys[0, 0, 0]
    assert abs(found[0]) < 1
    assert 29 < found[1] < 31


@pytest.mark.parametrize("count", [LEAST_TOKENS - 1, LEAST_TOKENS])
def test_too_few_tokens_are_no_basis(count):
    keys, values = biased(1, 1, 1, 64)
    for part in (keys, values):
        part[:, :, count:] = part[:, :, count - 1 : count]
    found = estimate(ExactTokens(keys, values), "on")
    assert (found is None) == (count < LEAST_TOKENS)


def test_long_prefills_are_sampled_over_their_whole_length():
    keys, values = biased(1, 1, 1, 4 * MOST_TOKENS - 60, bias=0.0)
    keys[:, :, 2 * MOST_TOKENS :] += 8
    keys[:, :, 1::4] += 1000
    keys += 20
    found = estimate(ExactTokens(keys, values), "on").keys
    # halves of 20 and 28: the shrunken mean is 24 (1 - 8^2 / 24^2)
    assert (found - 24 * (1 - 64 / 576)).abs().max() < 0.3


@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e37])
def test_nan_huge_and_tiny_tokens(scale):
    keys, values = (part * (scale / 40) for part in biased(1, 1, 2, 128))
    keys[0, 0, 5, 0] = torch.nan
    values[0, 1, 9, 3] = torch.inf
    found = estimate(ExactTokens(keys, values), "on")
    for offset, part in zip((found.keys, found.values), (keys, values), strict=True):
        assert torch.isfinite(offset).all()
        good = torch.isfinite(part).all(-1).unsqueeze(-1)
        wanted = torch.where(good, part, 0.0).double().sum(2, keepdim=True) / good.sum(2, keepdim=True)
        assert ((offset - wanted).abs() < 0.02 * scale).all()


def test_numbers_near_the_end_of_the_range_have_none():
    keys, values = (part.half() for part in biased(1, 1, 1, 64))
    keys[:, :, 7, 3] = 30000.0
    found = estimate(ExactTokens(keys, values), "on")
    assert found.keys is None
    assert found.values is not None


def test_of_long_prefills_at_most_1024_tokens_are_looked_at():
    keys, values = biased(1, 1, 1, 3 * MOST_TOKENS - 1, bias=0.0)
    keys += 20
    keys[:, :, 1::3] += 6
    found = estimate(ExactTokens(keys, values), "on").keys
    assert (found - 20).abs().max() < 0.2


def test_tokens_of_three_times_the_usual_norm_do_not_count():
    keys, values = biased(1, 1, 1, 200, bias=0.0)
    keys += 5
    keys[:, :, ::5] = 15
    found = estimate(ExactTokens(keys, values), "on").keys
    assert (found - 5).abs().max() < 0.5


def test_tokens_with_nan_are_no_tokens_of_zeros():
    keys, values = (part + 0.0 for part in biased(1, 1, 2, 256))
    keys[:, :, ::2, 0] = torch.nan
    found = estimate(ExactTokens(keys, values), "on").keys
    assert (found - mean_of(keys[:, :, 1::2])).abs().max() < 0.2


def test_what_float16_cannot_hold_is_its_largest_number():
    """A value offset is added to the output; the sum of two numbers may be beyond the dtype's range."""
    offsets = Offsets(None, torch.full((1, 1, 1, 4), -6e4).half())
    attended = Attended(torch.full((1, 2, 3, 4), -1e4).half(), torch.zeros(1, 2, 3))
    found = offsets.corrected(attended, torch.zeros(1, 2, 3, 8).half(), 1.0, masked=False)
    assert (found.out == torch.finfo(torch.float16).min).all()
