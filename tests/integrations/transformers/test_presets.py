"""Named presets and the default with real models: every layer gets what the preset says."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from steps import generate
from tiny_models import build, prompt

import tqai
import tqai.config
from tqai import backends
from tqai.config import CacheConfig
from tqai.errors import ConfigError
from tqai.integrations.transformers.default import _head_dim

Tiny = Callable[[str], Any]


def spec_of(layer: Any) -> list[tuple[str, int]]:
    page_format = layer.store.pool.page_format
    return [(codec.spec.name, codec.spec.bits) for codec in (page_format.key, page_format.value)]


def filled(cache: Any, model: Any) -> Any:
    with torch.inference_mode():
        model(prompt(500), past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("balanced", [("trellis", 3), ("trellis", 2)], [("trellis", 4), ("trellis", 4)]),
        ("quality", [("trellis", 3), ("trellis", 3)], [("scalar", 8), ("scalar", 4)]),
        ("small", [("trellis", 2), ("trellis", 1)], [("trellis", 4), ("trellis", 2)]),
    ],
)
def test_named_presets(name: str, first: list[Any], last: list[Any], tmp_path: Any) -> None:
    model = build("llama")
    cache = filled(tqai.TurboQuantCache(model, config=name), model)
    assert [spec_of(layer) for layer in cache.layers] == [first, last]
    assert cache.layer_bits == tuple((key[1], value[1]) for key, value in (first, last))
    store = cache.layers[0].store
    assert (store.sinks.keys.shape[2], store.config.offsets) == (4, "auto")
    window = cache.settings.residual_window
    assert window <= len(store.window) < window + 64
    cache.save(tmp_path / "cache")
    again = tqai.TurboQuantCache.load(tmp_path / "cache", model)
    assert again.layer_bits == cache.layer_bits
    assert torch.equal(again.layers[1].keys, cache.layers[1].keys)


def test_the_last_layer_is_the_last_that_is_compressed() -> None:
    model = build("gemma3")
    cache = tqai.TurboQuantCache(model, bits_k=3, bits_v=2, last_layer_bits=(4, 4))
    assert cache.layer_bits == ((3, 2), (4, 4))
    assert tqai.TurboQuantCache(model.config, config="balanced").layer_bits == ((3, 2), (4, 4))
    assert tqai.TurboQuantCache(build("qwen3_next"), config="balanced").layer_bits == (None, (4, 4))


def test_without_the_model_the_last_layer_is_unknown(monkeypatch: Any, caplog: Any) -> None:
    with pytest.raises(ConfigError, match=r"last_layer_bits=\(4, 4\): which layer is the last"):
        tqai.TurboQuantCache(config="balanced")
    monkeypatch.setattr(tqai.config, "DEFAULT_PRESET", "balanced")
    assert tqai.TurboQuantCache().settings == CacheConfig.preset("K4/V2")
    assert "without the model" in caplog.text


def test_no_slow_encoder_by_default(monkeypatch: Any, tiny: Tiny, caplog: Any) -> None:
    """Trellis codes are encoded slowly by torch: nobody gets them there who did not ask."""
    monkeypatch.setattr(tqai.config, "DEFAULT_PRESET", "balanced")
    model = tiny("llama")
    assert tqai.TurboQuantCache(model, backend="torch").settings == CacheConfig(4, 2, backend="torch")
    assert "backend 'torch' encodes trellis codes slowly: asked for" in caplog.text
    asked = tqai.TurboQuantCache(model, config="balanced", backend="torch")
    assert asked.settings == CacheConfig.preset("balanced", backend="torch").by_layer(2)
    monkeypatch.setattr(tqai.config, "DEFAULT_PRESET", "K4/V4")
    assert tqai.TurboQuantCache(model, backend="torch").settings == CacheConfig(4, 4, backend="torch")


@pytest.mark.parametrize("name", ["K4/V4", "balanced"])
def test_the_default(monkeypatch: Any, tiny: Tiny, name: str) -> None:
    monkeypatch.setattr(tqai.config, "DEFAULT_PRESET", name)
    model = tiny("llama")
    monkeypatch.setattr("tqai.integrations.transformers.default.SLOW_ENCODERS", ())  # wherever this runs
    wanted = CacheConfig.preset(name, seed=3).by_layer(2)
    assert tqai.patch(model, seed=3).settings == wanted
    assert generate(model).past_key_values.settings == wanted
    assert tqai.TurboQuantCache(model, seed=3).settings == wanted
    for plain in ({"bits_k": 4}, {"bits_v": 2}, {"bits_k": 4, "bits_v": 2}, {"residual_window": 0}):
        assert tqai.patch(model, **plain).settings == CacheConfig(**plain)
        assert tqai.TurboQuantCache(model, **plain).settings == CacheConfig(**plain)
    assert tqai.patch(model, bits=3).settings == CacheConfig(3, 3)
    assert tqai.patch(model, config=CacheConfig()).settings == CacheConfig()


def test_a_numbered_device_is_one_of_its_kind(monkeypatch: Any, tiny: Tiny) -> None:
    """The native encoder, which is fast enough for the default, serves "cpu:0" as it does "cpu"."""
    both = {"native": "tqai.backends.native.backend:NativeBackend", **backends.BACKENDS}
    monkeypatch.setattr(backends, "BACKENDS", both)
    model = tiny("llama")
    plain = tqai.TurboQuantCache(model, device="cpu")
    if plain.settings.codec == "scalar":
        pytest.skip("native kernels are off here")
    numbered = tqai.TurboQuantCache(model, device="cpu:0").settings
    assert numbered == plain.settings.with_changes(device="cpu:0")


def test_head_size_where_the_config_does_not_say() -> None:
    sizes = {"hidden_size": 896, "num_attention_heads": 14}
    assert _head_dim(SimpleNamespace(**sizes)) == _head_dim(SimpleNamespace(**sizes, head_dim=None)) == 64
    assert _head_dim(SimpleNamespace(**sizes, head_dim=80)) == 80
    assert _head_dim(SimpleNamespace(hidden_size=896)) is None
