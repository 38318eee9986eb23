"""Caches to and from files: generation goes on where it stopped, and only with the right model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import prompt

from tqai import CacheConfig, TurboQuantCache
from tqai.backends.torch_ops.backend import TorchBackend
from tqai.errors import CorruptFileError, ModelMismatchError, UnsupportedError

Tiny = Callable[[str], Any]


@torch.no_grad()
def filled(model: Any, **settings: Any) -> TurboQuantCache:
    cache = TurboQuantCache(model, **settings)
    model(prompt(200), past_key_values=cache)
    return cache


@torch.no_grad()
def continued(model: Any, cache: TurboQuantCache) -> torch.Tensor:
    first = model(prompt(220)[:, 200:], past_key_values=cache).logits
    return torch.cat([first, model(prompt(221)[:, 220:], past_key_values=cache).logits], 1)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma2"])
@pytest.mark.parametrize("settings", [{}, {"bits": 3, "sink_tokens": 4}, {"residual_window": 70}], ids=str)
def test_a_loaded_cache_goes_on_exactly(
    tiny: Tiny, tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    model = tiny(name)
    cache = filled(model, **settings)
    cache.save(tmp_path / "cache")
    twin = TurboQuantCache.load(tmp_path / "cache", model)
    assert twin.settings == cache.settings
    assert twin.get_seq_length() == 200
    assert torch.equal(continued(model, twin), continued(model, cache))


def test_without_a_model_it_decompresses(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    cache = filled(model)
    cache.save(tmp_path / "cache")
    twin = TurboQuantCache.load(tmp_path / "cache")
    assert not twin.on_codes
    twin.save(tmp_path / "again")
    again = TurboQuantCache.load(tmp_path / "again", model)
    wanted = continued(model, cache)
    torch.testing.assert_close(continued(model, twin), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(continued(model, again), wanted)


def test_another_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    filled(model).save(tmp_path / "cache")
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1.0
    with pytest.raises(ModelMismatchError, match="weights"):
        TurboQuantCache.load(tmp_path / "cache", other)
    with pytest.raises(ModelMismatchError, match="config"):
        TurboQuantCache.load(tmp_path / "cache", tiny("qwen2"))
    with pytest.raises(ModelMismatchError, match="config"):
        TurboQuantCache.load(tmp_path / "cache", tiny("qwen2").config)
    assert TurboQuantCache.load(tmp_path / "cache", model.config).get_seq_length() == 200
    half = copy.deepcopy(model).bfloat16().float()
    assert TurboQuantCache.load(tmp_path / "cache", half).get_seq_length() == 200


@pytest.mark.parametrize("at", [0, -1])
def test_other_weights_at_either_end_are_another_model(tiny: Tiny, tmp_path: Path, at: int) -> None:
    """A fine-tuned head, say, under the same config."""
    model = tiny("llama")
    filled(model).save(tmp_path / "cache")
    other = copy.deepcopy(model)
    list(other.parameters())[at].data += 0.1
    with pytest.raises(ModelMismatchError, match="its weights differs"):
        TurboQuantCache.load(tmp_path / "cache", other)


def test_a_file_is_of_no_backend_and_stays_that_of_its_model(tiny: Tiny, tmp_path: Path) -> None:
    """Also when it went through a process that had no model."""
    model = tiny("llama")
    filled(model, backend="torch", device="cpu").save(tmp_path / "first")
    between = TurboQuantCache.load(tmp_path / "first")
    assert between.settings.backend is None and between.settings.device is None
    between.save(tmp_path / "second")
    assert TurboQuantCache.load(tmp_path / "second", model).get_seq_length() == 200
    other = copy.deepcopy(model)
    next(iter(other.parameters())).data += 0.1
    with pytest.raises(ModelMismatchError, match="its weights differs"):
        TurboQuantCache.load(tmp_path / "second", other)


def test_an_altered_file_gives_no_cache(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    path = tmp_path / "cache"
    filled(model).save(path)
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match="checksum"):
        TurboQuantCache.load(path, model)


def test_recurrent_states_are_not_saved_in_silence(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("qwen3_next")
    with pytest.raises(UnsupportedError, match="is not saved"):
        filled(model).save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_attention_never_decompresses_a_page(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a page was decompressed")

    monkeypatch.setattr(TorchBackend, "decode", refuse)
    model = tiny(name)
    cache = TurboQuantCache(model, config=CacheConfig())
    out = model.generate(
        prompt(150), past_key_values=cache, max_new_tokens=70, do_sample=False, pad_token_id=0
    )
    assert out.shape[1] == 220
    with pytest.raises(AssertionError, match="decompressed"):
        _ = cache.layers[-1].keys
