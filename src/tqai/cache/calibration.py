"""Calibration files: what each width costs each layer of one model, measured by `tqai calibrate`.

    {"format": "tqai-calibration", "version": 1, "model": {...}, "measure": "kl", "about": {...},
     "layers": [{"kv_heads": 2, "key_dim": 128, "value_dim": 128, "value_bytes": 2, "sliding_window": null,
                 "keys": {"2": 0.01, "3": ..., "4": ...}, "values": {...}}, null, ...]}

`null` stands for a layer of the cache that is not compressed. `model` is the fingerprint that saved caches
bear; only its `config` part is compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from tqai.cache.bit_plan import WIDTHS, LayerShape, SideErrors, all_in_bits, allocate
from tqai.config import CacheConfig
from tqai.errors import ConfigError

__all__ = ["Calibration"]

FORMAT_NAME = "tqai-calibration"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """Measured errors of one model.

    Attributes:
        layers: per layer of the cache its shape and errors, None where it is not compressed.
        measure: what the errors are, such as "kl" (nats per token).
        model: fingerprint of the model.
        about: how it was measured, for people.
    """

    layers: tuple[tuple[LayerShape, SideErrors] | None, ...]
    measure: str = "kl"
    model: Mapping[str, str | None] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def layer_bits(self, config: CacheConfig, budget: float) -> tuple[tuple[int, int], ...]:
        """Bits of every layer of the cache, of least total error within `budget` (see `bit_plan.allocate`);
        those of `config` for layers that are not compressed.

        Raises:
            ConfigError: not even 2 bits everywhere fit.
        """
        known = [layer for layer in self.layers if layer is not None]
        shapes, errors = [shape for shape, _ in known], [error for _, error in known]
        bits = iter(allocate(config, shapes, errors, budget))
        return tuple((config.bits_k, config.bits_v) if layer is None else next(bits) for layer in self.layers)

    def all_in_bits(self, config: CacheConfig, layer_bits: tuple[tuple[int, int], ...]) -> float:
        """Bits per value of one sequence of `config.budget_tokens` tokens with these bits."""
        known = [(layer[0], bits) for layer, bits in zip(self.layers, layer_bits, strict=True) if layer]
        return all_in_bits(config, [shape for shape, _ in known], [bits for _, bits in known])

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON."""
        layers = [
            None
            if layer is None
            else {
                **asdict(layer[0]),
                "keys": {str(width): layer[1].keys[width] for width in WIDTHS},
                "values": {str(width): layer[1].values[width] for width in WIDTHS},
            }
            for layer in self.layers
        ]
        content = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "measure": self.measure,
            "model": dict(self.model),
            "about": dict(self.about),
            "layers": layers,
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ConfigError: no such file, or not a calibration of a version that is known.
        """
        try:
            content = json.loads(Path(path).read_text("utf-8"))
            if content["format"] != FORMAT_NAME or content["version"] != FORMAT_VERSION:
                raise ConfigError(
                    f"calibration={str(path)!r} is a {content['format']!r} of version "
                    f"{content['version']!r}: allowed is {FORMAT_NAME!r} of version {FORMAT_VERSION}"
                )
            layers = tuple(_layer(entry) for entry in content["layers"])
            if not any(layers):
                raise ValueError("no layer")
            return cls(layers, content["measure"], content["model"], content["about"])
        except OSError as error:
            raise ConfigError(f"calibration={str(path)!r} cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"calibration={str(path)!r} is no calibration file: {error!r}") from error


def _layer(entry: Any) -> tuple[LayerShape, SideErrors] | None:
    if entry is None:
        return None
    sides = []
    for name in ("keys", "values"):
        errors = {width: float(entry[name][str(width)]) for width in WIDTHS}
        if not all(math.isfinite(error) for error in errors.values()):
            raise ValueError(f"errors of {name} are {errors}")
        sides.append(errors)
    window = entry["sliding_window"]
    kv_heads, key_dim, value_dim, value_bytes = (
        int(entry[name]) for name in ("kv_heads", "key_dim", "value_dim", "value_bytes")
    )
    shape = LayerShape(kv_heads, key_dim, value_dim, value_bytes, None if window is None else int(window))
    return shape, SideErrors(*sides)
