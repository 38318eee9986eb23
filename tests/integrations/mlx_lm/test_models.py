"""Patched models of mlx-lm: attention on codes is attention on the decompressed arrays; patch and unpatch."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

import tqai
from tqai.errors import ConfigError, UnsupportedError
from tqai.integrations.mlx_lm import (
    PromptCache,
    TurboQuantKVCache,
    TurboQuantRotatingKVCache,
    attention,
)
from tqai.integrations.mlx_lm.handles import Handle
from tqai.integrations.mlx_lm.patching import compressed_form

KINDS = ["llama", "gemma3_text", "gpt_oss", "gemma2"]
CHUNKS = (70, 1, 66, 1, 1, 30, 1)


def run(model, cache, ids, chunks=CHUNKS):
    at, parts = 0, []
    for chunk in chunks:
        parts.append(np.array(model(mx.array([ids[at : at + chunk]]), cache=cache)[0]))
        at += chunk
    return np.concatenate(parts)


@pytest.mark.parametrize("codec", ["trellis", "trellis256"])
def test_attention_on_trellis_codes_is_attention_on_decompressed_arrays(tiny, ids, codec):
    model, tokens = tiny("llama"), ids(1, sum(CHUNKS))
    plain = make_prompt_cache(model)
    exact = run(model, plain, tokens)
    cache = tqai.patch(model, bits_k=4, bits_v=3, codec=codec)
    on_codes = run(model, cache, tokens)
    config = cache[0].store.config
    arrays = run(model, [compressed_form(c, config, ()) for c in plain_cache(model)], tokens)
    scalar = run(model, tqai.patch(model, bits_k=4, bits_v=3), tokens)
    scale = np.abs(exact).max()
    assert np.abs(on_codes - arrays).max() < 1e-3 * scale
    assert np.linalg.norm(on_codes - exact) < 0.95 * np.linalg.norm(scalar - exact)
    assert [c.store.counts[0] for c in cache] == [2, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_attention_on_codes_is_attention_on_decompressed_arrays(tiny, ids, kind):
    model, tokens = tiny(kind), ids(1, sum(CHUNKS))
    plain = make_prompt_cache(model)
    exact = run(model, plain, tokens)
    cache = tqai.patch(model, bits_k=8, bits_v=8)
    on_codes = run(model, cache, tokens)
    config = cache[0].store.config
    arrays = run(model, [compressed_form(c, config, ()) for c in plain_cache(model)], tokens)
    scale = np.abs(exact).max()
    # float32 rounding can move a coordinate of the second layer across a boundary of its codec
    assert np.abs(on_codes - arrays).max() < 1e-3 * scale
    assert np.linalg.norm(on_codes - exact) < 0.05 * np.linalg.norm(exact)
    assert np.abs(on_codes[70:] - exact[70:]).max() > 1e-6 * scale, "nothing was compressed"
    assert [type(c) for c in cache] == [
        TurboQuantRotatingKVCache if isinstance(c, RotatingKVCache) else TurboQuantKVCache for c in plain
    ]
    counts = [c.store.counts[0] for c in cache]
    windows = [c.store.sliding_window for c in cache]
    assert all(count == (2 if window is None else 1) for count, window in zip(counts, windows, strict=True))


def plain_cache(model):
    return model.make_cache.plain()


@pytest.mark.parametrize(("kind", "on_codes"), [("llama", True), ("gpt_oss", True), ("gemma2", False)])
def test_patch_knows_which_models_take_handles(tiny, ids, kind, on_codes, monkeypatch):
    """And decompression, where there is any, is by a model that works on keys itself."""
    decompressed = []
    monkeypatch.setattr(
        "tqai.integrations.mlx_lm.step.decode_pages",
        lambda raw, *rest: decompressed.append(raw.shape) or original(raw, *rest),
    )
    from tqai.backends.mlx.pages import decode_pages as original

    model = tiny(kind)
    cache = tqai.patch(model)
    decompressed.clear()
    run(model, cache, ids(2, 80), (70, 10))
    assert bool(decompressed) != on_codes
    assert model.make_cache.on_codes == on_codes
    one = mx.zeros((1, 2, 1, 64))
    assert isinstance(cache[0].update_and_fetch(one, one)[0], Handle) == on_codes


def test_module_is_put_back_when_its_last_model_is_unpatched(tiny):
    first, second = tiny("llama"), tiny("llama", 1)
    module = importlib.import_module("mlx_lm.models.llama")
    own = first.make_cache
    tqai.patch(first)
    tqai.patch(second, bits_k=3)
    tqai.patch(second, bits_k=2)
    assert module.scaled_dot_product_attention is not base.scaled_dot_product_attention
    assert [type(c) for c in make_prompt_cache(first)] == [TurboQuantKVCache] * 2
    assert make_prompt_cache(second)[0].store.config.bits_k == 2
    tqai.unpatch(second)
    tqai.unpatch(second)
    assert module.scaled_dot_product_attention is not base.scaled_dot_product_attention
    tqai.unpatch(first)
    assert module.scaled_dot_product_attention is base.scaled_dot_product_attention
    assert [type(c) for c in make_prompt_cache(first)] == [KVCache] * 2
    assert first.make_cache == own
    assert "make_cache" not in vars(first)
    assert not attention._ORIGINALS


def test_caches_stay_usable_after_unpatch(tiny, ids):
    model, tokens = tiny("llama"), ids(3, 72)
    cache = tqai.patch(model)
    model(mx.array([tokens[:70]]), cache=cache)
    other = [type(c).from_state(c.state) for c in cache]
    on_codes = model(mx.array([tokens[70:]]), cache=cache)
    tqai.unpatch(model)
    arrays = model(mx.array([tokens[70:]]), cache=other)
    np.testing.assert_allclose(np.array(on_codes), np.array(arrays), atol=1e-4)


def test_patched_model_serves_other_caches_and_none_as_before(tiny, ids):
    model, tokens = tiny("llama"), mx.array([ids(4, 20)])
    wanted = [model(tokens), model(tokens, cache=[KVCache(), KVCache()])]
    tqai.patch(model)
    assert mx.array_equal(model(tokens), wanted[0])
    assert mx.array_equal(model(tokens, cache=[KVCache(), KVCache()]), wanted[1])


def test_no_attribute_that_mlx_lm_would_take_for_its_own_quantization(tiny):
    for cache in tqai.patch(tiny("gemma3_text")):
        assert not hasattr(cache, "bits")
        assert not hasattr(cache, "to_quantized")


def test_patch_returns_a_prompt_cache_with_a_report(tiny, ids):
    model = tiny("llama")
    cache = tqai.patch(model, bits_k=4, bits_v=2, backend="mlx")
    assert isinstance(cache, PromptCache)
    assert cache.memory().total_bytes == 0
    run(model, cache, ids(5, 130), (130,))
    report = cache.memory()
    assert report.backend == "mlx"
    assert report.tokens == 130
    arrays = [array for layer in cache for array in layer.store.arrays()]
    assert report.total_bytes == cache.nbytes == sum(array.nbytes for array in arrays)
    assert report.values == 2 * 2 * 2 * 130 * 64


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"bits_k": 9}, ConfigError, "bits_k=9"),
        ({"nonsense": 1}, ConfigError, "'nonsense' is no setting"),
        ({"device": "cuda"}, ConfigError, "device='cuda'"),
        ({"backend": "native"}, UnsupportedError, "backend='native'"),
        ({"cache_strategy": "incremental"}, UnsupportedError, "cache_strategy='incremental'"),
        ({"offsets": "on"}, UnsupportedError, "offsets='on': with mlx-lm allowed is 'off'"),
        ({"use_qjl": True}, UnsupportedError, "use_qjl=True"),
        ({"compress_hidden": True}, UnsupportedError, "compress_hidden=True"),
        ({"config": "K4/V4", "bits_v": 3}, ConfigError, "is given beside bits_v"),
        ({"config": "K9"}, ConfigError, "preset='K9'"),
        ({"config": 3}, ConfigError, "config=3"),
    ],
)
def test_settings_that_are_not_served_are_refused_and_leave_the_model_alone(tiny, settings, error, says):
    model = tiny("llama")
    with pytest.raises(error) as caught:
        tqai.patch(model, **settings)
    assert says in str(caught.value)
    assert [type(c) for c in make_prompt_cache(model)] == [KVCache] * 2


def test_config_and_presets(tiny):
    model = tiny("llama")
    assert tqai.patch(model, config="K3/V3", backend="mlx")[0].store.config.bits_v == 3
    config = tqai.CacheConfig(sink_tokens=7)
    assert tqai.patch(model, config=config)[0].store.config == config.with_changes(backend="mlx")
    assert tqai.patch(model, 5, 6, 7)[0].store.config.bits_v == 6


def test_full_strategy_decompresses_everything(tiny, ids):
    model, tokens = tiny("llama"), ids(6, 80)
    on_codes = run(model, tqai.patch(model), tokens, (70, 10))
    cache = tqai.patch(model, cache_strategy="full")
    one = mx.zeros((1, 2, 1, 64))
    assert isinstance(model.make_cache()[0].update_and_fetch(one, one)[0], mx.array)
    np.testing.assert_allclose(run(model, cache, tokens, (70, 10)), on_codes, atol=1e-4)


def test_model_without_attention_is_refused(tiny):
    with pytest.raises(UnsupportedError, match=r"no attention layers.*ArraysCache.*leave tqai out"):
        tqai.patch(tiny("mamba"))


def test_model_that_does_not_run_is_left_as_it_was(tiny, monkeypatch):
    model = tiny("llama")

    def broken(self, *args, **kwargs):
        raise ValueError("no such thing")

    monkeypatch.setattr(type(model), "__call__", broken)
    with pytest.raises(UnsupportedError, match="does not run with a compressed cache: no such thing"):
        tqai.patch(model)
    assert "make_cache" not in vars(model)
    assert not attention._ORIGINALS


def test_model_that_touches_keys_gets_arrays(tiny, ids, monkeypatch, caplog):
    """A function of MLX does not take a handle: found by the trial run, which computes nothing."""
    model = tiny("llama")
    module = importlib.import_module("mlx_lm.models.llama")
    own = module.scaled_dot_product_attention

    class Touching(type(model.layers[0].self_attn)):
        def __call__(self, x, mask=None, cache=None):
            keys, _ = cache.update_and_fetch(*(mx.zeros((*x.shape[:1], 2, x.shape[1], 64)),) * 2)
            return self.o_proj(mx.zeros((*x.shape[:2], 256)) + mx.sum(mx.expand_dims(keys, 2)))

    model.layers[1].self_attn.__class__ = Touching
    with caplog.at_level(logging.INFO, "tqai"):
        cache = tqai.patch(model)
    assert not model.make_cache.on_codes
    assert "decompressed layer by layer" in caplog.text
    run(model, cache, ids(7, 80), (70, 10))
    tqai.unpatch(model)
    assert module.scaled_dot_product_attention is own


def test_handles_are_arrays_to_operators(tiny):
    model = tiny("llama")
    cache = tqai.patch(model)
    keys = mx.random.normal((1, 2, 70, 64))
    held, values = cache[0].update_and_fetch(keys, keys)
    assert held.shape == (1, 2, 70, 64)
    assert (held.ndim, held.dtype) == (4, mx.float32)
    assert mx.array_equal(held[..., :3], keys[..., :3])
    assert mx.array_equal(held + values, 2 * keys)
    assert mx.array_equal(mx.array(held), keys)
    assert mx.array_equal(held.swapaxes(1, 2), keys.swapaxes(1, 2))
    assert cache[0].keys.shape == keys.shape


def test_shared_keys_and_values_can_be_read_again(tiny, ids):
    """As layers that share another's cache do (Gemma 3n)."""
    model = tiny("llama")
    cache = tqai.patch(model)
    assert cache[0].keys_and_values() == (None, None)
    run(model, cache, ids(8, 130), (130,))
    keys, values = cache[0].keys_and_values()
    module = importlib.import_module("mlx_lm.models.llama")
    query = mx.random.normal((1, 4, 3, 64))
    found = module.scaled_dot_product_attention(query, keys, values, cache=None, scale=0.1, mask="causal")
    wanted = base.scaled_dot_product_attention(
        query, keys.array(), values.array(), cache=None, scale=0.1, mask="causal"
    )
    np.testing.assert_allclose(np.array(found), np.array(wanted), atol=1e-5)


def test_torch_is_not_imported():
    code = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else found(name, *rest)
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("torch is not installed here", name="torch")
sys.meta_path.insert(0, Blocked())
import mlx.core as mx, tqai
from mlx_lm.models import llama
args = dict(model_type="llama", hidden_size=8, num_hidden_layers=1, intermediate_size=8,
            num_attention_heads=2, rms_norm_eps=1e-6, vocab_size=8, head_dim=16)
model = llama.Model(llama.ModelArgs(**args))
cache = tqai.patch(model)
mx.eval(model(mx.zeros((1, 70), mx.int32), cache=cache), model(mx.zeros((1, 1), mx.int32), cache=cache))
assert cache[0].store.counts == [1], cache[0].store.counts
tqai.unpatch(model)
import tqai.integrations.mlx_lm.saving
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_a_default_that_is_not_served_is_replaced_with_a_warning(tiny, monkeypatch, caplog):
    import tqai.config

    model = tiny("llama")
    monkeypatch.setattr(tqai.config, "DEFAULT_PRESET", "balanced")
    with caplog.at_level(logging.WARNING, "tqai"):
        settings = tqai.patch(model)[0].store.config
        assert tqai.patch(model, bits_k=3)[0].store.config.bits_k == 3
    assert (settings.bits_k, settings.bits_v, settings.backend) == (4, 2, "mlx")
    assert caplog.text.count("default preset balanced is not served here") == 1
    with pytest.raises(UnsupportedError, match="offsets='auto'"):
        tqai.patch(model, config="balanced")
    tqai.unpatch(model)
