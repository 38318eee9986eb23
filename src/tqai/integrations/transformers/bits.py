"""`bits="auto"`: which bits a cache is made with, and where the decision can be read."""

from __future__ import annotations

from os import PathLike
from typing import Any

from tqai.cache.calibration import Calibration
from tqai.cache.first_prefill import BitPlan
from tqai.config import CacheConfig
from tqai.errors import ConfigError, ModelMismatchError

__all__ = ["AUTO", "plan_bits", "with_bits", "with_calibration"]

AUTO = "auto"


def with_bits(bits: Any, changes: dict[str, Any], beside_config: bool) -> dict[str, Any]:
    """`changes` with what `bits` (a number, "auto" or None) stands for.

    Raises:
        ConfigError: `bits` beside the fields that it sets, or "auto" without a budget.
    """
    if bits is None:
        return changes
    if "bits_k" in changes or "bits_v" in changes or (beside_config and bits != AUTO):
        raise ConfigError(f"bits={bits!r} sets bits_k and bits_v: give either it or them (or config)")
    if bits != AUTO:
        return {**changes, "bits_k": bits, "bits_v": bits}
    if changes.get("bits_budget") is None:
        raise ConfigError(
            "bits='auto' needs bits_budget=, the bits per value that everything together may take "
            "(for example 3.0)"
        )
    return changes


def with_calibration(
    settings: CacheConfig, calibration: str | PathLike[str] | Calibration, fingerprint: dict[str, Any] | None
) -> CacheConfig:
    """`settings` with its budget spent by a calibration (or the file of one): `layer_bits` set.

    Raises:
        ConfigError: no budget, or no such file.
        ModelMismatchError: the calibration is of another model.
    """
    if settings.bits_budget is None:
        raise ConfigError(f"calibration={str(calibration)!r} is given without bits_budget=")
    found = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
    wanted = found.model.get("config")
    if fingerprint is not None and wanted is not None and wanted != fingerprint["config"]:
        raise ModelMismatchError("the calibration is of a model of another configuration")
    layer_bits = found.layer_bits(settings, settings.bits_budget)
    return settings.with_changes(bits_budget=None, layer_bits=layer_bits)


def plan_bits(settings: CacheConfig, layers: list[Any]) -> BitPlan | None:
    """The plan of a cache's layers where its settings leave the bits open, else None.

    Raises:
        ConfigError: `layer_bits` for another number of layers, or a budget for layers that are not
            known yet.
    """
    stores = [layer.store for layer in layers if hasattr(layer, "store")]
    if settings.layer_bits is not None and layers and len(layers) != len(settings.layer_bits):
        raise ConfigError(
            f"layer_bits is of {len(settings.layer_bits)} layers: the cache of this model has {len(layers)}"
        )
    if settings.bits_budget is None:
        return None
    if not stores:
        raise ConfigError(
            f"bits_budget={settings.bits_budget!r}: bits are allocated over the layers of a model, so the "
            "cache must be made with the model or its config"
        )
    with_queries = all(layer.on_codes for layer in layers if hasattr(layer, "store"))
    return BitPlan(settings, stores, with_queries)
