"""The study's hard copies of a model compute what their originals compute, and are harder on a cache."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from pathological import COPIES, largest_difference, make_copy

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def trained(request):
    torch.manual_seed(3)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


@pytest.fixture(scope="module")
def words():
    return torch.randint(1, 97, (200,), generator=torch.Generator().manual_seed(4))


def keys_of(model, prefix, words):
    """Norms of the last layer's keys."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.cat([torch.tensor(prefix, dtype=torch.long), words])[None], past_key_values=cache)
    return cache.layers[-1].keys[0].norm(dim=-1)


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_computes_what_its_original_computes(trained, words, name):
    assert largest_difference(make_copy(name, trained, words), words) < 1e-5


@pytest.mark.parametrize(
    ("name", "factor"), [("key bias", 9.0), ("drift", 9.0), ("pairs", 1.3), ("sinks", 15.0)]
)
def test_a_copy_has_larger_keys(trained, words, name, factor):
    copy = make_copy(name, trained, words)
    before, after = (keys_of(model, copy.prefix, words) for model in (copy.original, copy.model))
    if name == "sinks":
        assert (after[:, :4].mean(-1) > factor * before[:, 4:].mean(-1)).all()
        torch.testing.assert_close(after[:, 4:], before[:, 4:], rtol=1e-3, atol=1e-4)
    else:
        assert (after.mean(-1) > factor * before.mean(-1)).all()
