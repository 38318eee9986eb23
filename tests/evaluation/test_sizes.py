"""All-in bits at a length, for caches whose sizes can be worked out by hand."""

import pytest
import torch

from tqai.errors import InputError
from tqai.evaluation import cache_maker, size_at


def test_an_uncompressed_cache_has_the_bits_of_its_numbers(model):
    for dtype, bits in ((torch.bfloat16, 16), (torch.float32, 32)):
        size = size_at(cache_maker("dynamic", model), model.config, 300, dtype)
        assert (size.tokens, size.mean, size.most) == (300, bits, bits)


def test_one_layer_stands_for_all_where_all_are_alike(model):
    maker = cache_maker("K3/V2", model, sink_tokens=4, residual_window=64)
    whole, one = (size_at(maker, model.config, 700, layers=layers) for layers in (None, 1))
    assert whole.mean == pytest.approx(one.mean) and whole.most == pytest.approx(one.most)


def test_codes_scales_window_and_sinks_are_counted(model):
    # head_dim 64: 4 bits and a scale of 16 bits per vector; the window holds 128 to 191 tokens of 16 bits.
    size = size_at(cache_maker("K4/V4", model, sink_tokens=4, residual_window=128), model.config, 2048)
    exact = (4 + 128 + 31.5) / 2048
    expected = exact * 16 + (1 - exact) * 4.25
    assert expected < size.mean < expected * 1.06
    assert size.mean < size.most < expected * 1.15


def test_offsets_are_counted(model):
    without, with_them = (
        size_at(cache_maker("K2/V2", model, offsets=offsets), model.config, 512).mean
        for offsets in ("off", "auto")
    )
    # the mean of lengths from 400 to 512
    assert with_them - without == pytest.approx(16 / 450, rel=0.03)


def test_short_lengths_are_refused(model):
    with pytest.raises(InputError, match="tokens=255"):
        size_at(cache_maker("dynamic", model), model.config, 255)
