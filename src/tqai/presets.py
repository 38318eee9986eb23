"""Settings of a cache that have a name. Data only: `CacheConfig.preset` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["NAMED_PRESETS", "PRESETS", "STUDY_PRESETS"]

PRESETS: Mapping[str, tuple[int, int]] = {
    "K4/V2": (4, 2),
    "K3/V2": (3, 2),
    "K3/V3": (3, 3),
    "K4/V3": (4, 3),
    "K4/V4": (4, 4),
}
"""Presets of bits alone: scalar codes without window, sinks and offsets. Name -> (bits_k, bits_v)."""

_MEASURED: Mapping[str, Any] = {
    "codec": "trellis",
    "sink_tokens": 4,
    "offsets": "auto",
    "balance": "auto",
}
NAMED_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "balanced": {"bits_k": 3, "bits_v": 2, "last_layer_bits": (4, 4), "residual_window": 160, **_MEASURED},
    "quality": {"bits_k": 3, "bits_v": 3, "last_layer_bits": (8, 4), "residual_window": 320, **_MEASURED},
    "small": {"bits_k": 2, "bits_v": 1, "last_layer_bits": (4, 2), "residual_window": 144, **_MEASURED},
}
"""Presets that choose more than bits, by the measure of docs/quality.md: name -> fields of `CacheConfig`.
All-in, at 8,192 tokens, they take at most 3.35, 4.35 and 2.35 bits per value on the models measured there."""

STUDY_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "kv-only": {},
    "kv+hidden8": {"compress_hidden": True, "bits_hidden": 8},
    "kv+hidden6": {"compress_hidden": True, "bits_hidden": 6},
    "kv+ffn8": {"compress_ffn": True, "bits_ffn": 8},
    "all8": {"compress_hidden": True, "bits_hidden": 8, "compress_ffn": True, "bits_ffn": 8},
    "all6": {"compress_hidden": True, "bits_hidden": 6, "compress_ffn": True, "bits_ffn": 6},
    "aggressive": {
        "bits_k": 3,
        "bits_v": 2,
        "compress_hidden": True,
        "bits_hidden": 6,
        "compress_ffn": True,
        "bits_ffn": 6,
    },
}
"""Presets that also round activations (`tqai.activations`): name -> fields of `CacheConfig`. Only the
cache saves memory; rounding activations shows how sensitive a model is."""
