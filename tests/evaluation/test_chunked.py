"""Evaluation in chunks equals one forward pass for a lossless cache, and says when it proves nothing."""

import warnings

import pytest
import torch
from transformers import DynamicCache

from tqai.errors import InputError
from tqai.evaluation import CacheNeverReadWarning, chunked_logits, history_read_back


@pytest.fixture(scope="module")
def full_logits(double_model, text):
    with torch.inference_mode():
        return double_model(text[None]).logits[0]


@pytest.mark.parametrize(
    ("prefill", "chunk"), [(1, 1), (64, 32), (63, 32), (65, 7), (128, 64), (192, 32), (150, 43)]
)
def test_chunks_equal_a_full_forward(double_model, text, full_logits, prefill, chunk):
    got = chunked_logits(double_model, text, DynamicCache, prefill, chunk)
    assert got.shape == (193 - prefill, full_logits.shape[1])
    torch.testing.assert_close(got, full_logits[prefill:], rtol=0, atol=1e-5)


def test_default_chunk_is_32_tokens(model, text):
    lengths = []

    class Counting(DynamicCache):
        def update(self, keys, values, layer_idx, *args, **kwargs):
            if layer_idx == 0:
                lengths.append(keys.shape[-2])
            return super().update(keys, values, layer_idx, *args, **kwargs)

    chunked_logits(model, text, lambda: Counting(config=model.config), 100)
    assert lengths == [100, 32, 32, 29]


def test_batch_axis_is_kept(double_model, text, full_logits):
    batch = torch.stack([text, text.flip(0)])
    got = chunked_logits(double_model, batch, DynamicCache, 64)
    assert got.shape[:2] == (2, 193 - 64)
    torch.testing.assert_close(got[0], full_logits[64:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("prefill", "chunk"), [(0, 193), (0, 500), (1, 192), (30, 163)])
def test_one_forward_pass_warns(model, text, prefill, chunk):
    with pytest.warns(CacheNeverReadWarning, match="of their history from the cache"):
        chunked_logits(model, text, lambda: DynamicCache(config=model.config), prefill, chunk)


@pytest.mark.parametrize(("prefill", "chunk"), [(0, 32), (64, 32), (150, 43)])
def test_chunks_do_not_warn(model, text, prefill, chunk):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chunked_logits(model, text, lambda: DynamicCache(config=model.config), prefill, chunk)


def test_history_read_back_is_counted():
    assert history_read_back(100, 0, 100) == 0.0
    # Tokens 2 and 3 read 2 of 3 and 2 of 4 from the cache, token 4 reads 4 of 5.
    assert history_read_back(5, 2, 2) == pytest.approx((2 / 3 + 2 / 4 + 4 / 5) / 3)
    assert history_read_back(2048, 512, 32) == pytest.approx(0.985, abs=0.003)


@pytest.mark.parametrize(("prefill", "chunk"), [(193, 32), (-1, 32), (64, 0)])
def test_lengths_that_leave_nothing_are_refused(model, text, prefill, chunk):
    with pytest.raises(InputError, match="tokens="):
        chunked_logits(model, text, lambda: DynamicCache(config=model.config), prefill, chunk)


@pytest.mark.parametrize("shape", [(0,), (1, 2, 3)])
def test_shapes_that_are_no_text_are_refused(model, shape):
    with pytest.raises(InputError, match="input_ids of shape"):
        chunked_logits(model, torch.zeros(shape, dtype=torch.long), lambda: None, 1)
