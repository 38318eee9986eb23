"""Caches written as one line of text, for command lines and studies.

    K3/V3,codec=trellis,residual_window=128,sink_tokens=4,offsets=auto
    K2/V4,seed=7,label=mine
    quanto-4,residual_length=64
    dynamic

A name that `cache_maker` knows (any bits, not only those of presets), then settings, separated by commas.
`window` and `sinks` stand for `residual_window` and `sink_tokens`; `label` is what tables call the cache.
"""

from __future__ import annotations

from typing import Any

from tqai.errors import ConfigError
from tqai.evaluation.caches import CacheMaker, cache_maker

__all__ = ["maker_from_spec", "parse_spec"]

_SHORT = {"window": "residual_window", "sinks": "sink_tokens"}
_WORDS = {"true": True, "false": False, "none": None}


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of a line of text; whole numbers, true, false and none are what they look like.

    Raises:
        ConfigError: no name, a setting without a value, or one that is given twice.
    """
    name, *parts = (part.strip() for part in text.split(","))
    if not name or "=" in name:
        raise ConfigError(f"cache {text!r}: wanted a name first, such as K4/V2 or quanto-4")
    settings: dict[str, Any] = {}
    for part in parts:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        key = _SHORT.get(key, key)
        if not key or not equals or not value:
            raise ConfigError(f"cache {text!r}: {part!r} is no setting; wanted name=value")
        if key in settings:
            raise ConfigError(f"cache {text!r}: {key} is given twice")
        settings[key] = _value(value) if key != "label" else value
    return name, settings


def maker_from_spec(text: str, model: Any, **more: Any) -> CacheMaker:
    """The maker of the cache that `text` describes, called by its label or by `text`.

    `more` are settings that `text` does not give.

    Raises:
        ConfigError: see `parse_spec` and `cache_maker`.
        UnsupportedError: see `cache_maker`.
    """
    name, settings = parse_spec(text)
    settings = {**more, **settings}
    label = settings.pop("label", None) or text.replace(" ", "")
    return cache_maker(name, model, label=label, **settings)


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    return int(text) if text.lstrip("-").isdigit() else text
