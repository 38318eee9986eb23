"""A captured decode step against eager steps of the same model, cache and tokens."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from tqai import TurboQuantCache
from tqai.errors import UnsupportedError
from tqai.integrations.transformers.decode_graph import DecodeGraph


@pytest.fixture(autouse=True)
def torch_backend(request):
    """In place of the folder's fixture of that name, where the CUDA backend is wanted."""
    if "gpu" not in request.keywords:
        request.getfixturevalue("monkeypatch").setattr(
            "tqai.backends.BACKENDS", {"torch": "tqai.backends.torch_ops:TorchBackend"}
        )


def tiny(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


def test_layers_that_cannot_be_captured_are_named():
    model = tiny()
    cache = TurboQuantCache(model, bits=4)
    with pytest.raises(UnsupportedError, match="run the prompt first"):
        DecodeGraph(model, cache)
    model(torch.arange(90)[None], past_key_values=cache)
    with pytest.raises(UnsupportedError, match="allowed is 'cuda'"):
        DecodeGraph(model, cache)
    with pytest.raises(UnsupportedError, match="DynamicLayer"):
        plain = DynamicCache(config=model.config)
        model(torch.arange(90)[None], past_key_values=plain)
        DecodeGraph(model, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("settings", [{}, {"sink_tokens": 4, "residual_window": 70}, {"offsets": "off"}])
@pytest.mark.parametrize(("batch", "prompt"), [(1, 20), (3, 300)])
def test_replayed_steps_are_the_eager_ones(settings, batch, prompt):
    model = tiny().to("cuda", torch.bfloat16)
    ids = torch.randint(300, (batch, prompt + 220), device="cuda")
    cache = TurboQuantCache(model, bits_k=4, bits_v=4, backend="cuda", **settings)
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache)
        eager = copy.deepcopy(cache)
        # little room, so that the graph is captured several times
        step = DecodeGraph(model, cache, room_tokens=64)
        for at in range(prompt, prompt + 200):
            wanted = model(ids[:, at : at + 1], past_key_values=eager).logits[:, -1].double()
            got = step(ids[:, at : at + 1]).double()
            error = (got - wanted).norm() / wanted.norm()
            assert error < 1.5e-2, f"step {at}: {error}"
        assert cache.get_seq_length() == eager.get_seq_length() == prompt + 200
        # eager steps go on from where the graph stopped, and the graph from where they stopped
        for at in range(prompt + 200, prompt + 220):
            wanted = model(ids[:, at : at + 1], past_key_values=eager).logits[:, -1].double()
            if at % 2:
                got = step(ids[:, at : at + 1]).double()
            else:
                got = model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1].double()
            assert (got - wanted).norm() / wanted.norm() < 1.5e-2
    assert cache.memory().tokens == eager.memory().tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_graphs_captured_anew_hold_no_more_memory():
    """With a stream of its own each capture would leave a workspace of cuBLAS behind, 8 to 32 MiB."""
    model = tiny().to("cuda", torch.bfloat16)
    ids = torch.randint(300, (1, 20), device="cuda")
    held = []
    with torch.no_grad():
        for _ in range(4):
            cache = TurboQuantCache(model, bits_k=4, bits_v=4, backend="cuda")
            model(ids, past_key_values=cache)
            step = DecodeGraph(model, cache)
            for _ in range(3):
                step(ids[:, :1])
            del step, cache
            gc.collect()
            held.append(torch.cuda.memory_allocated())
    assert held[-1] - held[0] < 1 << 20, held
