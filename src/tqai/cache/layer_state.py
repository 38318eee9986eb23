"""A layer's tokens as named tensors in canonical form, and back: what is saved of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tqai.backends.base import ExactTokens
from tqai.cache.layer import CompressedLayer
from tqai.cache.offsets import Offsets
from tqai.core.codec import CodecSpec, Encoded
from tqai.core.page import PAGE_TOKENS, CanonicalPages, PageFormat
from tqai.errors import CorruptFileError, ModelMismatchError

__all__ = ["export_layer", "import_layer"]

OFFSETS = ("key_offsets", "value_offsets", "key_factors")
"""Tensors of the parts of `Offsets`, in their order."""


def export_layer(layer: CompressedLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description (JSON values) of everything that `layer` holds.

    Codes are uint8 `[batch, pages, kv_heads, 64, row_bytes]`, scales uint16 `[batch, pages, kv_heads,
    64]` (bfloat16 bits) or, of one byte, uint8 `[batch, pages, kv_heads, 66]` (`core.page`), exact tokens
    `[batch, kv_heads, tokens, head_dim]` in the model's dtype. Offsets are `[batch, kv_heads, head_dim]`
    in that dtype; all tokens are then without them.
    """
    about: dict[str, Any] = {"length": layer.length, "sliding_window": layer.sliding_window}
    if layer.window is None or layer.pool is None:
        return {}, {**about, "empty": True}
    page_format = layer.pool.page_format
    about["empty"] = False
    about["key_codec"], about["value_codec"] = (
        _written(page_format.key.spec),
        _written(page_format.value.spec),
    )
    if page_format.scale_format != "bfloat16":
        about["scale_format"] = page_format.scale_format
    tensors: dict[str, Tensor] = {}
    if layer.pool.pages:
        pages = layer.backend.to_canonical(layer.pool.raw(), page_format)
        for name, part in (("key", pages.key), ("value", pages.value)):
            tensors[f"{name}_codes"] = torch.from_numpy(part.codes)
            tensors[f"{name}_scales"] = torch.from_numpy(part.scales)
    tensors["window_keys"], tensors["window_values"] = layer.window.tokens
    if layer.sinks is not None:
        tensors["sink_keys"], tensors["sink_values"] = layer.sinks
    if layer.offsets is not None:
        for name, offset in zip(OFFSETS, layer.offsets.parts(), strict=True):
            if offset is not None:
                tensors[name] = offset.squeeze(2)
    return tensors, about


def import_layer(
    layer: CompressedLayer, tensors: Mapping[str, Tensor], about: Mapping[str, Any], device: torch.device
) -> None:
    """Fill the empty `layer` with what `export_layer` gave.

    Raises:
        ModelMismatchError: the codecs or the sliding window are not those of `layer`.
        CorruptFileError: the tensors contradict each other.
    """
    if about["sliding_window"] != layer.sliding_window:
        raise ModelMismatchError(
            f"layer {layer.layer} has sliding_window={about['sliding_window']} in the file and "
            f"{layer.sliding_window} in the model"
        )
    if about["empty"]:
        return
    try:
        window = ExactTokens(tensors["window_keys"].to(device), tensors["window_values"].to(device))
        layer.prepare(*window)
        assert layer.pool is not None and layer.window is not None
        page_format = layer.pool.page_format
        expected = (_written(page_format.key.spec), _written(page_format.value.spec))
        if expected != (about["key_codec"], about["value_codec"]):
            raise ModelMismatchError(
                f"layer {layer.layer} was saved with {about['key_codec']} / {about['value_codec']}, "
                f"this configuration makes {expected[0]} / {expected[1]}"
            )
        saved_scales = about.get("scale_format", "bfloat16")
        if saved_scales != page_format.scale_format:
            raise ModelMismatchError(
                f"layer {layer.layer} was saved with scale_format={saved_scales!r}, this configuration has "
                f"{page_format.scale_format!r}"
            )
        layer.window.replace(*window)
        if "key_codes" in tensors:
            parts = [
                Encoded(tensors[f"{name}_codes"].numpy(), tensors[f"{name}_scales"].numpy())
                for name in ("key", "value")
            ]
            raw = layer.backend.from_canonical(CanonicalPages(*parts), page_format)
            ids, buffer = layer.pool.append(raw.shape[1])
            buffer.copy_(torch.from_numpy(np.ascontiguousarray(raw)).flatten(0, 1))
            layer.pool.commit(ids, buffer)
        if "sink_keys" in tensors:
            layer.sinks = ExactTokens(tensors["sink_keys"].to(device), tensors["sink_values"].to(device))
        layer.offsets = _offsets(layer.pool.table.shape[0], layer.pool.kv_heads, page_format, tensors, device)
        layer.length = int(about["length"])
    except (KeyError, RuntimeError, ValueError) as error:
        if isinstance(error, ModelMismatchError):
            raise
        raise CorruptFileError(f"layer {layer.layer} of the file does not fit together: {error}") from error
    kept = layer.held_tokens
    if kept > layer.length or (layer.sliding_window is None and kept != layer.length):
        raise CorruptFileError(
            f"layer {layer.layer} of the file holds {kept} tokens ({layer.pool.pages} pages of "
            f"{PAGE_TOKENS}) but claims {layer.length}"
        )


def _written(spec: CodecSpec) -> dict[str, Any]:
    """The fields of a spec as version 1 of the format has them, and later ones where they say something."""
    written = asdict(spec)
    if not written.get("sketch"):
        written.pop("sketch", None)
    return written


def _offsets(
    batch: int, kv_heads: int, page_format: PageFormat, tensors: Mapping[str, Tensor], device: torch.device
) -> Offsets | None:
    parts: list[Tensor | None] = []
    for name in OFFSETS:
        offset = tensors.get(name)
        codec = page_format.value if name == "value_offsets" else page_format.key
        shape = (batch, kv_heads, codec.spec.head_dim)
        if offset is not None and offset.shape != shape:
            raise ValueError(f"{name} {list(offset.shape)} are not {list(shape)}")
        parts.append(None if offset is None else offset.to(device).unsqueeze(2))
    return None if all(part is None for part in parts) else Offsets(*parts)
