"""The trainer's own model: Llama or Qwen2, in plain PyTorch.

Parameter names and shapes are those of transformers' ``LlamaForCausalLM`` and
``Qwen2ForCausalLM`` with tied embeddings, so exporting is a plain save.  The
residual stream is kept in the compute dtype (bf16 on a GPU), as it is when the
exported model runs in bf16.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """A model's sizes; ``arch`` is "llama" (no biases) or "qwen2" (q/k/v biases)."""

    arch: str = "llama"
    vocab: int = 4096
    hidden: int = 320
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    mlp: int = 960
    theta: float = 100_000.0
    max_positions: int = 9216
    eps: float = 1e-6

    def hf_config(self) -> dict[str, object]:
        """The ``config.json`` of the exported model."""
        name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[self.arch]
        config: dict[str, object] = {
            "architectures": [name],
            "model_type": self.arch,
            "dtype": "bfloat16",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "rope_theta": self.theta,  # where mlx-lm looks
            "initializer_range": 0.02,
            "attention_dropout": 0.0,
            "use_cache": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "tie_word_embeddings": True,
        }
        if self.arch == "llama":
            config |= {"attention_bias": False, "mlp_bias": False}
        else:
            config |= {"use_sliding_window": False}
        return config

    def as_dict(self) -> dict[str, object]:
        """The sizes as plain values, for the log."""
        return asdict(self)


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in fp32, returned in the input's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * y.to(x.dtype)


class Linear(nn.Linear):
    """A linear map whose fp32 weights are cast to the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [batch, heads, tokens, head_dim]; halves are the rotated pairs."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        bias = s.arch == "qwen2"
        self.shape = s
        self.q_proj = Linear(s.hidden, s.heads * s.head_dim, bias=bias)
        self.k_proj = Linear(s.hidden, s.kv_heads * s.head_dim, bias=bias)
        self.v_proj = Linear(s.hidden, s.kv_heads * s.head_dim, bias=bias)
        self.o_proj = Linear(s.heads * s.head_dim, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            p(x).view(b, t, -1, self.shape.head_dim).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.shape.heads != self.shape.kv_heads
        )
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(s.hidden, s.mlp, bias=False)
        self.up_proj = Linear(s.hidden, s.mlp, bias=False)
        self.down_proj = Linear(s.mlp, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(s)
        self.mlp = MLP(s)
        self.input_layernorm = RMSNorm(s.hidden, s.eps)
        self.post_attention_layernorm = RMSNorm(s.hidden, s.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = RMSNorm(s.hidden, s.eps)


class LM(nn.Module):
    """The language model; ``forward`` is the training loss."""

    cos: Tensor
    sin: Tensor

    def __init__(self, s: Shape, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.dtype = s, dtype
        self.model = Decoder(s)
        inv = s.theta ** (-torch.arange(0, s.head_dim, 2, dtype=torch.float32) / s.head_dim)
        angle = torch.outer(torch.arange(s.max_positions, dtype=torch.float32), inv)
        angle = torch.cat((angle, angle), dim=-1)
        self.register_buffer("cos", angle.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(dtype), persistent=False)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                std = 0.02 if "embed" in name else p.shape[1] ** -0.5
                nn.init.normal_(p, std=std)

    def logits(self, ids: Tensor) -> Tensor:
        """Token ids [batch, tokens] -> logits [batch, tokens, vocab]."""
        x = self.model.embed_tokens(ids).to(self.dtype)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.model.layers:
            x = block(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight.to(self.dtype))

    def forward(self, ids: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean cross entropy in nats; all arguments [batch, tokens]."""
        logits = self.logits(ids).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        w = weights.flatten()
        return (loss * w).sum() / w.sum()
