"""Tiny random models of mlx-lm; without mlx-lm these tests are left out: `pip install 'tqai[mlx]'`."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("mlx_lm") is None:
    collect_ignore_glob = ["test_*.py"]

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 96,
}
TINY = {
    "llama": {**COMMON, "num_hidden_layers": 2},
    "gemma3_text": {**COMMON, "num_hidden_layers": 2, "sliding_window": 80, "sliding_window_pattern": 2},
    "gemma2": {**COMMON, "num_hidden_layers": 2, "query_pre_attn_scalar": 64},
    "gpt_oss": {
        **COMMON,
        "num_hidden_layers": 2,
        "sliding_window": 70,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_theta": 10000,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mamba": {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "state_size": 8,
        "num_hidden_layers": 1,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
}


@pytest.fixture
def tiny():
    """A random float32 model of one of mlx-lm's kinds, unpatched at the end."""
    import mlx.core as mx
    from mlx.utils import tree_map

    import tqai

    made = []

    def make(kind, seed=0):
        module = importlib.import_module(f"mlx_lm.models.{kind}")
        mx.random.seed(seed)
        model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **TINY[kind]}))
        rng = np.random.default_rng(seed)

        def weight(x):
            return mx.array(
                rng.standard_normal(x.shape).astype(np.float32) * max(x.shape[-1], 16) ** -0.5 * 1.5
            )

        model.update(tree_map(lambda x: weight(x) if x.ndim > 1 else x, model.parameters()))
        mx.eval(model.parameters())
        made.append(model)
        return model

    yield make
    for model in made:
        tqai.unpatch(model)


@pytest.fixture
def vectors():
    """Keys and values `[batch, heads, tokens, dim]` of a seed, as MLX arrays."""

    import mlx.core as mx

    def draw(seed, batch, heads, tokens, dim, dtype=None):
        rng = np.random.default_rng(seed)
        parts = (rng.standard_normal((batch, heads, tokens, dim)).astype(np.float32) for _ in range(2))
        return tuple(mx.array(part).astype(dtype or mx.float32) for part in parts)

    return draw


@pytest.fixture
def ids():
    """Random token ids as a list."""

    def draw(seed, count):
        return np.random.default_rng(seed).integers(0, 96, count).tolist()

    return draw
