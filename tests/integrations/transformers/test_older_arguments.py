"""Every argument of the older libraries' calls, and the bad values that they took without a word."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from steps import generate
from tiny_models import prompt

import tqai
from tqai.errors import ConfigError, InputError
from tqai.integrations.transformers import patch as transformers_patch

Tiny = Callable[[str], Any]
ORDER = [
    *("model", "bits_k", "bits_v", "sink_tokens", "backend", "device", "config_path"),
    *("compress_hidden", "bits_hidden", "compress_ffn", "bits_ffn", "compress_attn_logits", "bits_attn"),
    *("use_qjl", "qjl_sketch_size", "cache_strategy", "residual_window"),
]


def test_patch_takes_the_older_arguments_in_their_order(tiny: Tiny) -> None:
    parameters = inspect.signature(transformers_patch).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == ORDER
    model = tiny("llama")
    given = (3, 5, 2, "torch", "cpu", None, True, 7, True, 6, True, 5, True, 48, "residual", 64)
    settings = tqai.patch(model, *given).settings
    named = dict(zip(ORDER[1:], given, strict=True))
    del named["config_path"]
    assert settings == tqai.TurboQuantConfig(**named)
    assert all(getattr(settings, name) == value for name, value in named.items())


def test_turboquant_config_is_the_config(tiny: Tiny) -> None:
    assert tqai.TurboQuantConfig is tqai.CacheConfig
    config = tqai.TurboQuantConfig(bits_k=3, use_qjl=True, compress_hidden=True)
    assert tqai.patch(tiny("llama"), config=config).settings == config


@pytest.mark.parametrize("bits", [4, 3])
def test_cache_before_the_model_is_known(tiny: Tiny, bits: int) -> None:
    """`TurboQuantCache(bits=4)`: any model, no patch, its sliding layers included."""
    for name in ("llama", "deepseek"):
        model = tiny(name)
        cache = tqai.TurboQuantCache(bits=bits)
        out = generate(model, past_key_values=cache)
        assert out.past_key_values is cache
        assert cache.get_seq_length() == 70 + 7
        assert (cache.settings.bits_k, cache.settings.bits_v) == (bits, bits)
        assert cache.memory().codes_bytes > 0
        assert "generate" not in vars(model)


def test_two_models_at_once(tiny: Tiny) -> None:
    """The older library replaced functions of other packages: the second patch undid or doubled the first."""
    first, second = copy.deepcopy(tiny("llama")), copy.deepcopy(tiny("qwen2"))
    alone = []
    for model, given in (
        (first, {"bits_k": 8}),
        (second, {"bits_k": 2, "compress_ffn": True, "bits_ffn": 3}),
    ):
        tqai.patch(model, **given)
        alone.append(generate(model).sequences)
        tqai.unpatch(model)
    tqai.patch(first, bits_k=8)
    tqai.patch(second, bits_k=2, compress_ffn=True, bits_ffn=3)
    one, two = generate(first), generate(second)
    assert torch.equal(one.sequences, alone[0]) and torch.equal(two.sequences, alone[1])
    assert one.past_key_values.settings.bits_k == 8 and two.past_key_values.settings.bits_k == 2
    tqai.unpatch(first)
    assert torch.equal(generate(second).sequences, alone[1])
    tqai.unpatch(second)
    assert type(generate(second).past_key_values).__name__ == "DynamicCache"


def test_keys_and_values_of_different_head_dim(tiny: Tiny) -> None:
    cache = tqai.patch(tiny("deepseek"), bits_k=8, bits_v=8, residual_window=0)
    out = generate(tiny("deepseek"), past_key_values=cache)
    page_format = cache.layers[0].store.pool.page_format
    assert page_format.key.spec.head_dim != page_format.value.spec.head_dim
    assert out.sequences.shape[1] == 78


@torch.no_grad()
def test_use_qjl_holds_real_bits_and_is_off_by_default(tiny: Tiny) -> None:
    model, held = tiny("llama"), {}
    for size in (None, 32, 64):
        given = {"bits_k": 4} if size is None else {"use_qjl": True, "qjl_sketch_size": size}
        cache = tqai.patch(model, **given)
        model(prompt(256), past_key_values=cache)
        held[size] = cache.memory().codes_bytes
        vectors = 2 * 2 * 4 * 64  # layers, heads, pages, tokens
        if size is not None:
            # a bit per projection and a 16-bit norm per key; the values take none
            assert held[size] - held[None] == vectors * (size // 8 + 2)
            spec = cache.layers[0].store.pool.page_format.key.spec
            assert (spec.name, spec.sketch) == ("qjl", size)
    assert not tqai.CacheConfig().use_qjl


@torch.no_grad()
def test_use_qjl_saves_and_loads(tiny: Tiny, tmp_path: Any) -> None:
    model = tiny("llama")
    cache = tqai.patch(model, use_qjl=True, qjl_sketch_size=24)
    model(prompt(200), past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = tqai.TurboQuantCache.load(tmp_path / "cache.safetensors", model)
    step = [model(prompt(1), past_key_values=held).logits for held in (cache, loaded)]
    assert torch.equal(step[0], step[1])
    assert loaded.settings.qjl_sketch_size == 24


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits_k": 0}, "bits_k=0"),
        ({"bits_v": 9}, "bits_v=9"),
        ({"bits_k": -1}, "bits_k=-1"),
        ({"bits_k": 4.0}, "bits_k=4.0"),
        ({"bits_v": True}, "bits_v=True"),
        ({"bits_hidden": 0}, "bits_hidden=0"),
        ({"bits_ffn": 9}, "bits_ffn=9"),
        ({"bits_attn": -1}, "bits_attn=-1"),
        ({"residual_window": -1}, "residual_window=-1"),
        ({"sink_tokens": -1}, "sink_tokens=-1"),
        ({"qjl_sketch_size": 0}, "qjl_sketch_size=0"),
        ({"use_qjl": "yes"}, "use_qjl='yes'"),
        ({"use_qjl": True, "codec": "other"}, "codec='other'"),
        ({"compress_hidden": 1}, "compress_hidden=1"),
        ({"cache_strategy": "fast"}, "cache_strategy='fast'"),
        ({"rotation_v": "fft"}, "rotation_v='fft'"),
        ({"backend": "numpy"}, "backend='numpy'"),
    ],
    ids=str,
)
def test_bad_values_name_themselves(tiny: Tiny, settings: dict[str, Any], words: str) -> None:
    model = tiny("llama")
    own = dict(vars(model))
    with pytest.raises(ConfigError) as caught:
        cache = tqai.patch(model, **settings)
        model(prompt(80), past_key_values=cache)
    assert words in str(caught.value)
    tqai.unpatch(model)
    assert vars(model) == own


def test_auto_bits_without_a_budget(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="bits"):
        tqai.patch(tiny("llama"), bits_k="auto")


@pytest.mark.parametrize("dim", [0, -1, 2.5])
def test_head_dim_0(dim: Any) -> None:
    for quantizer in (tqai.TurboQuantMSE, tqai.TurboQuantIP, tqai.PolarQuantizer):
        with pytest.raises((ConfigError, InputError), match="dim"):
            quantizer(dim, 4)


@torch.no_grad()
def test_float16_keys_whose_norm_overflows(tiny: Tiny) -> None:
    """Coordinates within float16, the vector's length beyond its 65504: a norm kept in float16 is inf."""
    layer = tqai.TurboQuantCache(bits=8)
    keys = torch.randn(1, 2, 128, 64, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) * 20000
    keys = keys.to(torch.float16)
    assert keys.double().norm(dim=-1).min() > 65504
    layer.update(keys, keys, 0)
    held = layer.layers[0].keys.double()
    assert ((held - keys.double()).norm(dim=-1) / keys.double().norm(dim=-1)).max() < 0.02
