"""Errors of attention outputs: none without compression, local in the layer whose cache is wrong."""

import pytest
import torch
from transformers import DynamicCache

from tqai.errors import UnsupportedError
from tqai.evaluation import CacheMaker, attention_errors, cache_maker


class OneLayerWrong(DynamicCache):
    """Gives back the values of layer 0 one tenth too large, all of them."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return (keys, values * 1.1) if layer_idx == 0 else (keys, values)


def test_nothing_is_wrong_without_compression(model, text):
    found = attention_errors(model, text, [cache_maker("dynamic", model)], 128)["dynamic"]
    assert max(*found.local, *found.accumulated) < 1e-6


def test_a_wrong_layer_is_found_and_its_followers_are_not_blamed(model, text):
    wrong = CacheMaker("wrong", "test", lambda: OneLayerWrong(config=model.config))
    found = attention_errors(model, text, [wrong], 128)["wrong"]
    assert found.local[0] == pytest.approx(0.1, rel=1e-3)
    assert found.accumulated[0] == pytest.approx(0.1, rel=1e-3)
    assert found.local[1] < 1e-5 < found.accumulated[1]


def test_fewer_bits_more_error_in_every_layer(model, text):
    makers = [cache_maker(name, model) for name in ("K2/V2", "K4/V4")]
    coarse, fine = attention_errors(model, text, makers, 128).values()
    assert all(2 * few < many for few, many in zip(fine.local, coarse.local, strict=True))
    assert set(coarse.to_dict()) == {"local", "accumulated"} and len(coarse.local) == 2


def test_hooks_are_gone_afterwards(model, text):
    attention_errors(model, text[:100], [cache_maker("dynamic", model)], 64)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_an_unknown_kind_of_model_is_refused(text):
    odd = torch.nn.Linear(1, 1)
    odd.device = torch.device("cpu")
    with pytest.raises(UnsupportedError, match="self_attn"):
        attention_errors(odd, text, [], 64)
