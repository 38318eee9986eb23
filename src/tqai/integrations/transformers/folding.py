"""The rotation of the values moved from the cache into a model's weights.

Values are coded as v @ R.T, and the output of attention comes back by @ R. Both are linear, so both can
be done once and for all in the weights beside them, per head:

    value projection   rows of a KV head       W_v' = R W_v,  b_v' = R b_v
    output projection  columns of a query head W_o' = W_o R^T

The model computes the same function within rounding, and its values need no rotation any more. Attention
only ever takes weighted sums of values, so R passes through it; where a model does more with them (gates,
norms with weights), the function would change, and where it caches something else than what it attends to
(latent attention), the cache would not come rotated. Both are found by running the model before and after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from tqai.activations.blocks import attention_modules
from tqai.core.rotation import rotation_matrix
from tqai.errors import UnsupportedError

__all__ = ["fold_value_rotation", "value_sample"]

OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "wo", "c_proj")
PROBE_TOKENS = 48
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest relative L2 change of a layer's attention output; 5e-2 for 16-bit weights, which are rounded
again when they are rotated. A rotation in the wrong place changes it by about 1."""
HALF_TOLERANCE = 5e-2
SAMPLED_VALUES = 16


@dataclass(frozen=True)
class ValuePath:
    """Where the values of an attention module come from and go to.

    Attributes:
        source: their projection, None where the module takes another layer's values.
        rows: int64 `[kv_heads, value_head_dim]`, which rows of it make them.
        output: the output projection.
        columns: int64 `[query_heads, value_head_dim]`, which columns of it take each head.
    """

    source: nn.Linear | None
    rows: Tensor
    output: nn.Linear
    columns: Tensor


@torch.no_grad()
def fold_value_rotation(model: Any, kind: str, seed: int) -> None:
    """Rotate the values of `model` in its weights, in place, by `rotation_matrix(kind, head_dim, seed)`.

    Raises:
        UnsupportedError: a layer whose projections are not known or quantized, or a model whose function
            would change. The model is as it was then.
    """
    modules = attention_modules(model)
    if not modules:
        raise UnsupportedError(f"{type(model).__name__} has no attention modules that tqai knows")
    paths = [value_path(module) for module in modules]
    weights = {
        id(part): part
        for path in paths
        for linear in (path.source, path.output)
        if linear is not None
        for part in (linear.weight, linear.bias)
        if part is not None
    }
    before = {key: part.detach().clone() for key, part in weights.items()}
    outputs, values = _probe(model, modules)
    for path in paths:
        _rotate(path, kind, seed)
    try:
        rotated_outputs, rotated_values = _probe(model, modules)
        _compare_outputs(outputs, rotated_outputs, model.dtype)
        _compare_values(values, rotated_values, kind, seed, model.dtype)
    except UnsupportedError:
        for key, part in weights.items():
            part.copy_(before[key])
        raise


def value_path(module: Any) -> ValuePath:
    """How values run through an attention module.

    Raises:
        UnsupportedError: its projections are of no kind that is known here.
    """
    name = type(module).__name__
    output = next((getattr(module, part) for part in OUTPUT_NAMES if hasattr(module, part)), None)
    if not _is_plain(output):
        raise UnsupportedError(
            f"{name} has no plain output projection; looked for linear layers {', '.join(OUTPUT_NAMES)}"
        )
    assert isinstance(output, nn.Linear)
    if _is_plain(getattr(module, "qkv_proj", None)):  # queries, keys and values, one after another
        source, dim = module.qkv_proj, int(module.head_dim)
        count = (source.out_features - output.in_features) // 2
        rows = torch.arange(source.out_features)[-count:].reshape(-1, dim)
    elif _is_plain(getattr(module, "v_proj", None)):
        source, dim = module.v_proj, int(module.head_dim)
        rows = torch.arange(source.out_features).reshape(-1, dim)
    elif getattr(module, "is_kv_shared_layer", False):
        source, dim = None, int(module.head_dim)
        rows = torch.empty(0, dim, dtype=torch.long)
    else:
        raise UnsupportedError(
            f"{name} has no plain value projection: allowed are linear layers called v_proj or qkv_proj "
            "(a quantized model must be converted before it is quantized)"
        )
    return ValuePath(source, rows, output, torch.arange(output.in_features).reshape(-1, dim))


def value_sample(model: Any) -> list[list[float]]:
    """A few weights of every value projection, by which a converted model is known again."""
    sample = []
    for module in attention_modules(model):
        path = value_path(module)
        if path.source is not None:
            row = path.source.weight.detach()[path.rows[0, 0], :SAMPLED_VALUES]
            sample.append([float(value) for value in row.float().cpu()])
    return sample


def _is_plain(part: Any) -> bool:
    return isinstance(part, nn.Linear) and type(part).__name__ == "Linear" and part.weight.is_floating_point()


def _rotate(path: ValuePath, kind: str, seed: int) -> None:
    dim = path.columns.shape[1]
    device = path.output.weight.device
    matrix = torch.from_numpy(rotation_matrix(kind, dim, seed).copy()).to(device)
    if path.source is not None:
        rows = path.rows.to(device)
        weight = path.source.weight
        weight[rows] = (matrix @ weight[rows].double()).to(weight.dtype)
        if path.source.bias is not None:
            bias = path.source.bias
            bias[rows] = (bias[rows].double() @ matrix.T).to(bias.dtype)
    weight = path.output.weight
    heads = weight.double().unflatten(1, tuple(path.columns.shape))
    weight.copy_((heads @ matrix.T).flatten(1).to(weight.dtype))


def _probe(model: Any, modules: list[nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
    """For some random tokens: what every attention module gives, the logits last; and all cached values."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).float())

    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    handles = [module.register_forward_hook(keep) for module in modules]
    training = model.training
    model.eval()
    cache = DynamicCache(config=model.config)
    try:
        logits = model(ids.to(model.device), past_key_values=cache, use_cache=True).logits.float()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    values = [getattr(layer, "values", None) for layer in cache.layers]
    return [*outputs, logits], [part.float() for part in values if isinstance(part, Tensor) and part.numel()]


def _compare_outputs(expected: list[Tensor], found: list[Tensor], dtype: torch.dtype) -> None:
    allowed = TOLERANCE.get(dtype, HALF_TOLERANCE)
    for index, (before, after) in enumerate(zip(expected, found, strict=True)):
        change = _distance(after, before)
        if not change <= allowed:
            where = f"the attention of layer {index}" if index < len(expected) - 1 else "the logits"
            raise UnsupportedError(
                f"rotating the values in the weights changes {where} by {change:.1e} (allowed is "
                f"{allowed:.0e}): this model does more with its values than attend, so it is not converted"
            )


def _compare_values(
    before: list[Tensor], after: list[Tensor], kind: str, seed: int, dtype: torch.dtype
) -> None:
    for index, (plain, rotated) in enumerate(zip(before, after, strict=True)):
        matrix = torch.from_numpy(rotation_matrix(kind, plain.shape[-1], seed).copy()).to(plain)
        change = _distance(rotated, plain @ matrix.T)
        if not change <= TOLERANCE.get(dtype, HALF_TOLERANCE):
            raise UnsupportedError(
                f"layer {index} caches something else than the values that it attends to (as latent "
                "attention does), so its cache would not come rotated: this model is not converted"
            )


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
