"""Named presets, the default, and what stands in for it where it is not served."""

from __future__ import annotations

import logging

import pytest

import tqai.config
from tqai.config import (
    COMPRESSION_FIELDS,
    FALLBACK_PRESET,
    NAMED_PRESETS,
    PRESETS,
    STUDY_PRESETS,
    CacheConfig,
)
from tqai.errors import ConfigError

BALANCED = CacheConfig(
    3, 2, 4, 160, codec="trellis", offsets="auto", last_layer_bits=(4, 4), balance="auto"
)  # bits_k, bits_v, sink_tokens, residual_window
OTHERS = {
    "cache_strategy": "full",
    "backend": "torch",
    "device": "cpu",
    "seed": 3,
    "check_finite": True,
    "compress_hidden": True,
    "bits_hidden": 7,
}


@pytest.fixture
def default(monkeypatch):
    """Sets the default preset."""
    return lambda name: monkeypatch.setattr(tqai.config, "DEFAULT_PRESET", name)


def test_named_presets():
    assert CacheConfig.preset("balanced") == BALANCED
    assert CacheConfig.preset("quality").last_layer_bits == (8, 4)
    assert CacheConfig.preset("small", seed=4) == CacheConfig(
        2, 1, 4, 144, codec="trellis", offsets="auto", last_layer_bits=(4, 2), balance="auto", seed=4
    )
    assert CacheConfig.preset("balanced", bits_k=4).bits_v == 2
    assert CacheConfig.preset("balanced", bits_budget=3.0).last_layer_bits is None
    assert CacheConfig.preset("balanced", layer_bits=((4, 4),)).layer_bits == ((4, 4),)
    names = ", ".join([*PRESETS, *NAMED_PRESETS, *STUDY_PRESETS])
    with pytest.raises(ConfigError, match=f"preset='best': allowed are {names.replace('+', '.')}"):
        CacheConfig.preset("best")


def test_the_last_layer_by_layer():
    config = BALANCED.by_layer(3)
    assert (config.layer_bits, config.last_layer_bits) == (((3, 2), (3, 2), (4, 4)), None)
    assert config.label == BALANCED.label == "K3/V2 last K4/V4"
    assert BALANCED.by_layer(4, last=2).layer_bits == ((3, 2), (3, 2), (4, 4), (3, 2))
    assert CacheConfig(3, 2).by_layer(7) == CacheConfig(3, 2)
    assert CacheConfig.from_dict(BALANCED.to_dict()) == BALANCED
    assert CacheConfig(3, 3, last_layer_bits=[3, 3]).by_layer(5).label == "K3/V3"


@pytest.mark.parametrize("codec", ["trellis", "trellis256"])
def test_more_bits_than_a_trellis_has_are_scalar(codec):
    config = CacheConfig(3, 3, codec=codec, last_layer_bits=(8, 8)).by_layer(3)
    assert [config.for_layer(i).codec for i in range(3)] == [codec, codec, "scalar"]
    assert (config.for_layer(2).bits_k, config.for_layer(2).bits_v) == (8, 8)
    mixed = CacheConfig(codec=codec, layer_bits=((4, 4), (4, 5), (5, 1)))
    assert [mixed.for_layer(i).codec for i in range(3)] == [codec, "scalar", "scalar"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"last_layer_bits": 4}, r"last_layer_bits=4: wanted is a pair"),
        ({"last_layer_bits": (4, 9)}, r"last_layer_bits bits_v=9: allowed are whole numbers from 1 to 8"),
        ({"last_layer_bits": (4, 4), "layer_bits": ((4, 4),)}, "beside layer_bits"),
        ({"last_layer_bits": (4, 4), "bits_budget": 3.0}, "beside bits_budget"),
    ],
)
def test_wrong_bits_of_the_last_layer(wrong, says):
    with pytest.raises(ConfigError, match=says):
        CacheConfig(**wrong)


@pytest.mark.parametrize("name", ["K4/V4", "balanced"])
def test_the_default_is_for_those_who_do_not_choose(default, name):
    default(name)
    chosen = CacheConfig.preset(name)
    assert CacheConfig.asked({}) == chosen
    assert CacheConfig.asked({"residual_window": None, "layer_bits": None}) == chosen
    assert CacheConfig.asked(OTHERS) == CacheConfig.preset(name, **OTHERS)
    for given in ({"bits_k": 4}, {"bits_v": 2}, {"sink_tokens": 0}, {"offsets": "on"}, {"codec": "scalar"}):
        assert CacheConfig.asked({**OTHERS, **given}) == CacheConfig(**OTHERS, **given)
    assert COMPRESSION_FIELDS.isdisjoint(OTHERS)


def test_a_default_that_is_not_served(default, caplog):
    default("balanced")
    with caplog.at_level(logging.WARNING, "tqai"):
        assert CacheConfig.asked(OTHERS, lambda config: None) == CacheConfig.preset("balanced", **OTHERS)
        assert not caplog.records
        got = CacheConfig.asked(OTHERS, lambda config: "no " + config.codec)
    assert got == CacheConfig.preset(FALLBACK_PRESET, **OTHERS)
    assert "default preset balanced is not served here (no trellis): K4/V2" in caplog.text
    assert CacheConfig.asked({"offsets": "on"}, lambda config: "no") == CacheConfig(offsets="on")
