"""Tiny random models, one per way of attending that the integration has to serve.

Two layers, a vocabulary of 96, weights large enough that attention is far from uniform: logits
depend on tokens long ago and greedy tokens vary (test_tiny_models.py holds both).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

VOCABULARY = 96
SLIDING_WINDOW = 96
WEIGHT_DEVIATION = 0.15


def _settings(**changes: Any) -> dict[str, Any]:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    return {**settings, **changes}


def _llama(**changes: Any) -> Any:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            **_settings(**{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, **changes})
        )
    )


def _gemma(model: Any, config: Any, **changes: Any) -> Any:
    alternating = ["sliding_attention", "full_attention"]
    shared = {"head_dim": 256, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 64}
    return model(config(**_settings(**{**shared, "layer_types": alternating, **changes})))


def _qwen3_next() -> Any:
    sizes = {"linear_num_value_heads": 2, "linear_num_key_heads": 2}
    sizes |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "head_dim": 64}
    layer_types = ["linear_attention", "full_attention"]
    return tf.Qwen3NextForCausalLM(
        tf.Qwen3NextConfig(
            **_settings(layer_types=layer_types, mlp_only_layers=[0, 1], num_experts=0, **sizes)
        )
    )


def _falcon_h1() -> Any:
    sizes = {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 2,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    }
    return tf.FalconH1ForCausalLM(tf.FalconH1Config(**_settings(head_dim=64, **sizes)))


def _deepseek() -> Any:
    sizes = {"q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 48}
    experts = {"first_k_dense_replace": 2, "n_routed_experts": 2, "n_group": 1, "topk_group": 1}
    config = _settings(v_head_dim=32, num_key_value_heads=2, num_experts_per_tok=1, **sizes, **experts)
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**config))


def _gpt_oss() -> Any:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return _gemma(tf.GptOssForCausalLM, tf.GptOssConfig, head_dim=64, **experts)


def _llama4() -> Any:
    kinds = {"no_rope_layers": [1, 0], "layer_types": ["chunked_attention", "full_attention"]}
    sizes = {"attention_chunk_size": SLIDING_WINDOW, "intermediate_size_mlp": 96, "head_dim": 64}
    config = _settings(moe_layers=[], num_local_experts=1, **kinds, **sizes)
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**config))


def _gemma3n() -> Any:
    layers = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4}
    layers["layer_types"] = ["sliding_attention", "full_attention"] * 2
    sizes = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "laurel_rank": 8}
    return _gemma(tf.Gemma3nForCausalLM, tf.Gemma3nTextConfig, head_dim=64, **layers, **sizes)


BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama_dim80": lambda: _llama(head_dim=80),
    "llama_dim96": lambda: _llama(head_dim=96, num_key_value_heads=4),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_settings(hidden_size=128))),
    "mistral": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**_settings(head_dim=64, sliding_window=SLIDING_WINDOW))
    ),
    "gemma2": lambda: _gemma(
        tf.Gemma2ForCausalLM,
        tf.Gemma2Config,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=None,
        # the only one of transformers' that soft-caps on the CPU; in 5.16 it is not the default
        attn_implementation="eager",
    ),
    "gemma3": lambda: _gemma(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig),
    "gemma3n": _gemma3n,
    "qwen3_next": _qwen3_next,
    "falcon_h1": _falcon_h1,
    "deepseek": _deepseek,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
    "diffllama": lambda: tf.DiffLlamaForCausalLM(
        tf.DiffLlamaConfig(**_settings(num_attention_heads=4, num_key_value_heads=2, head_dim=64))
    ),
    "gptj": lambda: tf.GPTJForCausalLM(
        tf.GPTJConfig(
            vocab_size=VOCABULARY,
            n_positions=512,
            n_embd=128,
            n_layer=2,
            n_head=2,
            rotary_dim=32,
            bos_token_id=1,
            eos_token_id=None,
        )
    ),
}
"""Name -> builder. gemma2 soft-caps, gpt_oss has learned sinks, deepseek has values of another size
than keys, falcon_h1 attention and a recurrent state in one layer, gemma3n layers that read the keys
of others, diffllama touches values between update and attention, gptj calls no attention interface."""


def build(name: str) -> Any:
    """The model of that name, in evaluation mode, with the same weights every time."""
    torch.manual_seed(sum(name.encode()))
    model = BUILDERS[name]().eval()
    for label, parameter in model.named_parameters():
        if parameter.ndim >= 2 or "bias" in label or "sinks" in label:
            torch.nn.init.normal_(parameter, std=WEIGHT_DEVIATION)
    model.generation_config.pad_token_id = 0
    return model


def prompt(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids int64 `[batch, tokens]`, without the padding id 0."""
    return torch.randint(2, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
