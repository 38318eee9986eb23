"""A tiny random model whose predictions depend strongly on its history, and caches that misbehave."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

VOCABULARY = 97
LAYERS = 2
KV_HEADS = 2
HEAD_DIM = 64


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        # Large, so that logits are spread out and a wrong history shows.
        initializer_range=0.2,
    )
    torch.manual_seed(5)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def double_model(model) -> LlamaForCausalLM:
    """The same in float64, for comparing different orders of summation."""
    return copy.deepcopy(model).double()


@pytest.fixture(scope="session")
def text() -> torch.Tensor:
    """One document of 193 tokens: three pages of 64 and one token."""
    return torch.randint(VOCABULARY, (193,), generator=torch.Generator().manual_seed(6))


class ForgetfulCache(DynamicCache):
    """Has the right length, but gives back zeros for all that it was not just told."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        old = keys.shape[-2] - key_states.shape[-2]
        keys, values = keys.clone(), values.clone()
        keys[..., :old, :] = 0
        values[..., :old, :] = 0
        return keys, values


@pytest.fixture
def forgetful(model):
    from tqai.evaluation import CacheMaker

    return CacheMaker("forgetful", "test", lambda: ForgetfulCache(config=model.config))


@pytest.fixture
def quanto(monkeypatch):
    """optimum-quanto with unpacking in torch, so that no test waits for a C++ compiler."""
    pytest.importorskip("optimum.quanto")
    from optimum.quanto.library.extensions.cpp import ext

    class Library:
        @staticmethod
        def unpack(packed, bits):
            return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    monkeypatch.setattr(ext, "_lib", Library)
