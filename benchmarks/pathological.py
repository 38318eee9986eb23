"""Copies of a small model that are hard on a cache and equal to their originals in exact arithmetic.

    key bias    a constant vector on the slowest RoPE pairs of every key. Those pairs turn by nothing here
                (`original` sets the frequency of the two slowest to zero, "proportional" RoPE), so the
                constant adds the same number to all logits of a query, and softmax does not see it.
    drift       the same constant on the slowest pair with its real frequency, so that it turns slowly with
                the position, as the key biases of Qwen2 do. Queries are zero on that pair (in `original`
                too), so no logit sees it.
    pairs       of every eight RoPE pairs one holds keys 4 times as large and queries 4 times as small.
    sinks       keys of the token <s> are 20 times as long as others, on the pair that queries use least
                (they are zero on it, in `original` too); documents begin with four <s>. The residual stream
                gets four more coordinates: one marks <s>, one all other tokens, both by the same amount,
                so that RMSNorm sees a constant, which a smaller epsilon takes off again; two stay zero.

A copy is a model like any other, built from a changed configuration and changed weights; `original` is the
model that it must equal, `largest_difference` says how nearly it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BIAS_NORM = 10.0  # of the constant, in mean key norms of its head
BIAS_PAIRS = 2
PAIR_SCALE = 4.0
PAIR_PERIOD = 8
SINK_NORM = 20.0  # in mean key norms of its head
SINK_TOKENS = 4
WIDER = 4  # coordinates more; transformers wants a multiple of the heads
MARK = 0.5  # of the largest mark that epsilon can take off


@dataclass(frozen=True)
class Copy:
    """One hard copy.

    Attributes:
        name: "plain", "key bias", "drift", "pairs" or "sinks".
        original: the model whose logits it must have.
        model: the copy.
        prefix: token ids that every document begins with.
    """

    name: str
    original: Any
    model: Any
    prefix: tuple[int, ...] = ()


def make_copy(name: str, model: Any, text: Tensor) -> Copy:
    """A copy of `model` (Llama or Qwen2 with full rotary heads, float32) by name.

    Args:
        text: int64 `[tokens]`, to measure key norms and the use of pairs on.
    """
    return COPIES[name](model, text)


def largest_difference(copy: Copy, text: Tensor) -> float:
    """Largest difference of a logit between copy and original, in units of the largest logit."""
    batch = torch.cat([torch.tensor(copy.prefix, dtype=text.dtype, device=text.device), text])[None]
    batch = batch.to(copy.model.device)
    with torch.inference_mode():
        expected, got = (net(batch, use_cache=False).logits for net in (copy.original, copy.model))
    return float((expected - got).abs().max() / expected.abs().max())


def _plain(model: Any, text: Tensor) -> Copy:
    return Copy("plain", model, model)


def _key_bias(model: Any, text: Tensor) -> Copy:
    half = model.config.head_dim // 2
    rope = {
        **model.config.rope_parameters,
        "rope_type": "proportional",
        "partial_rotary_factor": (half - BIAS_PAIRS) / half,
    }
    original = _rebuilt(model, {"rope_parameters": rope})
    changed = _with_biases(original)
    for layer, (norms, _) in zip(_layers(changed), _statistics(original, text), strict=True):
        _add_bias(layer, norms, range(half - BIAS_PAIRS, half))
    return Copy("key bias", original, changed)


def _drift(model: Any, text: Tensor) -> Copy:
    slowest = model.config.head_dim // 2 - 1
    original = _rebuilt(model, {})
    for layer in _layers(original):
        _silence_queries(layer, [slowest] * model.config.num_key_value_heads)
    changed = _with_biases(original)
    for layer, (norms, _) in zip(_layers(changed), _statistics(original, text), strict=True):
        _add_bias(layer, norms, range(slowest, slowest + 1))
    return Copy("drift", original, changed)


def _pairs(model: Any, text: Tensor) -> Copy:
    changed = _rebuilt(model, {})
    scale = torch.ones(model.config.head_dim // 2, device=model.device)
    scale[PAIR_PERIOD // 2 :: PAIR_PERIOD] = PAIR_SCALE
    both = torch.cat([scale, scale])
    with torch.no_grad():
        for layer in _layers(changed):
            for projection, factor in ((layer.k_proj, both), (layer.q_proj, 1 / both)):
                rows = factor.repeat(projection.out_features // both.numel())
                projection.weight.mul_(rows[:, None])
                if projection.bias is not None:
                    projection.bias.mul_(rows)
    return Copy("pairs", model, changed)


def _sinks(model: Any, text: Tensor) -> Copy:
    original = _rebuilt(model, {})
    statistics = _statistics(model, text)
    for layer, (_, use) in zip(_layers(original), statistics, strict=True):
        _silence_queries(layer, use.argmin(-1).tolist())
    config, bos = model.config, model.config.bos_token_id
    old, new = config.hidden_size, config.hidden_size + WIDER
    epsilon = config.rms_norm_eps
    mark = (MARK * old * epsilon) ** 0.5
    changed = _rebuilt(
        original,
        {"hidden_size": new, "rms_norm_eps": (old * epsilon - mark**2) / new},
        fit=lambda name, value: _widened(name, value, old, bos, mark),
    )
    # What RMSNorm makes of the mark depends on the token: of <s> alone, and that once per layer.
    first = torch.tensor([[bos] * SINK_TOKENS], device=model.device)
    marks = _normed_marks(changed, first, old)
    for layer, (norms, use), got in zip(_layers(changed), statistics, marks, strict=True):
        keys = layer.k_proj.weight.view(config.num_key_value_heads, config.head_dim, new)
        with torch.no_grad():
            for head, pair in enumerate(use.argmin(-1).tolist()):
                keys[head, pair, old] = SINK_NORM * norms[head] / got
    return Copy("sinks", original, changed, (bos,) * SINK_TOKENS)


COPIES: dict[str, Callable[[Any, Tensor], Copy]] = {
    "plain": _plain,
    "key bias": _key_bias,
    "drift": _drift,
    "pairs": _pairs,
    "sinks": _sinks,
}


def _layers(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def _rebuilt(model: Any, changes: dict[str, Any], fit: Callable[[str, Tensor], Tensor] | None = None) -> Any:
    """A new model of the configuration with `changes`, with the weights (through `fit`)."""
    config = type(model.config).from_dict({**model.config.to_dict(), **changes})
    config._attn_implementation = "sdpa"
    fresh = type(model)(config).to(model.device, model.dtype).eval()
    state = {name: value if fit is None else fit(name, value) for name, value in model.state_dict().items()}
    for name, value in fresh.state_dict().items():
        if name not in state and name.endswith("bias"):
            state[name] = torch.zeros_like(value)
    fresh.load_state_dict(state)
    return fresh.requires_grad_(False)


def _with_biases(model: Any) -> Any:
    """A copy whose keys can have biases: Qwen2's always do, Llama's by `attention_bias`."""
    return _rebuilt(model, {"attention_bias": True} if model.config.model_type == "llama" else {})


def _statistics(model: Any, text: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per layer: mean key norm `[kv_heads]`, and how much logits owe to each pair `[kv_heads, pairs]`."""
    config, found = model.config, []
    captured: dict[Any, Tensor] = {}
    hooks = []
    for layer in _layers(model):
        for projection in (layer.q_proj, layer.k_proj):
            hooks.append(
                projection.register_forward_hook(lambda module, _, out: captured.__setitem__(module, out[0]))
            )
    with torch.inference_mode():
        model(text[None].to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer in _layers(model):
        kv, half = config.num_key_value_heads, config.head_dim // 2
        keys = captured[layer.k_proj].unflatten(-1, (kv, 2, half))
        queries = captured[layer.q_proj].unflatten(-1, (kv, -1, 2, half))
        use = queries.square().sum((0, 2, 3)) * keys.square().sum((0, 2))
        found.append((keys.flatten(2).norm(dim=-1).mean(0), use))
    return found


def _add_bias(layer: Any, norms: Tensor, pairs: range) -> None:
    """A constant of `BIAS_NORM` mean key norms on both coordinates of the pairs, with changing signs."""
    bias = layer.k_proj.bias.view(len(norms), 2, -1)
    size = BIAS_NORM * norms / (2 * len(pairs)) ** 0.5
    with torch.no_grad():
        for index, pair in enumerate(pairs):
            bias[:, 0, pair] += size * (-1) ** index
            bias[:, 1, pair] -= size * (-1) ** index


def _silence_queries(layer: Any, pairs: list[int]) -> None:
    """Zero all queries of each KV head's group on one pair."""
    for tensor in (layer.q_proj.weight, layer.q_proj.bias):
        if tensor is not None:
            rows = tensor.view(len(pairs), -1, 2, layer.head_dim // 2, *tensor.shape[1:])
            with torch.no_grad():
                for head, pair in enumerate(pairs):
                    rows[head, :, :, pair] = 0


def _widened(name: str, value: Tensor, old: int, bos: int, mark: float) -> Tensor:
    """Weights for a residual stream that is some coordinates wider and never changes them."""
    if "embed_tokens" in name or "lm_head" in name:
        marks = value.new_zeros(value.shape[0], WIDER)
        marks[:, 1] = mark
        marks[bos] = torch.tensor([mark] + [0.0] * (WIDER - 1))
        return torch.cat([value, marks], dim=1)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return torch.cat([value, value.new_zeros(WIDER, value.shape[1])])
    if name.endswith(
        ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
    ):
        return torch.cat([value, value.new_zeros(value.shape[0], WIDER)], dim=1)
    if name.endswith("norm.weight"):
        # The mean is over more coordinates; the last norm must not show the marks to the output.
        ends = 0.0 if name == "model.norm.weight" else 1.0
        return torch.cat([value * (old / (old + WIDER)) ** 0.5, value.new_full((WIDER,), ends)])
    return value


def _normed_marks(model: Any, first: Tensor, index: int) -> list[float]:
    """What each layer's key projection sees of the mark of <s>, mean over the first tokens."""
    seen: list[float] = []
    hooks = [
        layer.k_proj.register_forward_pre_hook(
            lambda module, inputs: seen.append(float(inputs[0][..., index].mean()))
        )
        for layer in _layers(model)
    ]
    with torch.inference_mode():
        model(first, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen
