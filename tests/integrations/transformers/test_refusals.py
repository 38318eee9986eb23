"""What is refused, with which words, and that the cache is unharmed by it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from steps import generate, run
from tiny_models import prompt

import tqai
from tqai import CacheConfig
from tqai.errors import ConfigError, InputError, NonFiniteError, TqaiError, UnsupportedError

Tiny = Callable[[str], Any]
BITS = "whole numbers from 1 to 8"

WRONG_SETTINGS: list[tuple[dict[str, Any], str, str]] = [
    *(
        ({field: bits}, f"{field}={bits!r}", BITS)
        for field in ("bits_k", "bits_v")
        for bits in (0, 9, -1, True, "4", 2.5)
    ),
    ({"residual_window": -1}, "residual_window=-1", "from 0 to"),
    ({"residual_window": 1 << 21}, f"residual_window={1 << 21}", "from 0 to 1048576"),
    ({"sink_tokens": -1}, "sink_tokens=-1", "from 0 to"),
    ({"cache_strategy": "fast"}, "cache_strategy='fast'", "auto, residual, full, incremental"),
    ({"rotation": "fft"}, "rotation='fft'", "haar, hadamard"),
    ({"scale": "max"}, "scale='max'", "least_squares, norm"),
    ({"seed": -1}, "seed=-1", "from 0 to"),
    ({"check_finite": "yes"}, "check_finite='yes'", "True, False and None"),
    ({"bits_q": 4}, "'bits_q'", "bits_k, bits_v"),
    ({"config": "K9/V9"}, "'K9/V9'", "K4/V2"),
    ({"config": 4}, "config=4", "CacheConfig"),
    ({"config": "K4/V4", "bits_k": 3}, "config='K4/V4'", "one of the two"),
    # 4 is what bits_k is elsewhere, but not in this preset
    ({"config": "balanced", "bits_k": 4}, "beside bits_k", "one of the two"),
    ({"config": "balanced", "bits": "auto", "backend": "torch"}, "beside bits:", "one of the two"),
    ({"config": "balanced", "calibration": "a.json"}, "beside calibration", "one of the two"),
    ({"config": "balanced", "bits_q": 4}, "'bits_q'", "bits_k, bits_v"),
]


@pytest.mark.parametrize(("settings", "named", "allowed"), WRONG_SETTINGS, ids=str)
def test_a_wrong_setting_names_field_value_and_what_is_allowed(
    tiny: Tiny, settings: dict[str, Any], named: str, allowed: str
) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match=re.escape(allowed)) as raised:
        tqai.patch(model, **settings)
    assert named in str(raised.value)
    assert "generate" not in vars(model) and model.config._attn_implementation == "sdpa"
    if "config" not in settings:
        with pytest.raises(ConfigError, match=re.escape(allowed)):
            tqai.TurboQuantCache(model, **settings)


@pytest.mark.parametrize("field", ["bits_k", "bits_v"])
def test_none_is_no_number_of_bits_but_what_patch_takes_for_not_said(tiny: Tiny, field: str) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match=f"{field}=None.*{BITS}"):
        tqai.TurboQuantCache(model, **{field: None})
    assert tqai.patch(model, **{field: None}).settings == tqai.TurboQuantCache(model).settings


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"codec": "zip"}, "codec='zip'"),
        ({"backend": "tpu"}, "backend='tpu'"),
        ({"device": "cuda:0"}, "device='cuda:0'"),
    ],
    ids=str,
)
def test_names_that_only_the_first_tokens_can_judge(tiny: Tiny, settings: dict[str, Any], named: str) -> None:
    model = tiny("llama")
    cache = tqai.TurboQuantCache(model, **settings)
    with pytest.raises(ConfigError, match=re.escape(named)):
        model(prompt(3), past_key_values=cache)


@pytest.mark.parametrize("bits", [0, 9, -1, True, "4"])
def test_wrong_bits(bits: Any) -> None:
    with pytest.raises(ConfigError, match=rf"bits_k={bits!r}.*{BITS}"):
        tqai.TurboQuantCache(bits=bits)
    with pytest.raises(ConfigError, match="bits=4 sets bits_k and bits_v"):
        tqai.TurboQuantCache(bits=4, bits_v=2)


def test_what_is_no_model() -> None:
    with pytest.raises(ConfigError, match="model=Linear"):
        tqai.TurboQuantCache(torch.nn.Linear(2, 2))


def test_patch_wants_a_model_that_generates(tiny: Tiny) -> None:
    """And leaves alone the attention of one that does not."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = tf.BertModel(tf.BertConfig(vocab_size=50, **sizes))
    for what, name in (
        (None, "NoneType"),
        (tiny("llama").config, "LlamaConfig"),
        (tiny("llama").model, "LlamaModel"),
        (encoder, "BertModel"),
        (torch.nn.Linear(2, 2), "Linear"),
    ):
        with pytest.raises(ConfigError, match=f"model={name}: .*generate"):
            tqai.patch(what)
    assert encoder.config._attn_implementation == tiny("llama").config._attn_implementation == "sdpa"


def test_offloading(tiny: Tiny) -> None:
    for model in (None, tiny("llama")):
        with pytest.raises(UnsupportedError, match=r"offloading=True.*allowed is False"):
            tqai.TurboQuantCache(model, offloading=True)
    assert tiny("llama").config._attn_implementation == "sdpa"
    for name in ("llama", "falcon_h1"):
        layer = tqai.TurboQuantCache(tiny(name)).layers[0]
        for method in (layer.offload, layer.prefetch):
            with pytest.raises(UnsupportedError, match="not offloaded"):
                method()


def test_encoder_decoder_models() -> None:
    sizes = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=96, **sizes, **heads))
    own = dict(vars(model))
    for attempt in (
        lambda: tqai.patch(model),
        lambda: tqai.TurboQuantCache(model),
        lambda: tqai.TurboQuantCache(model.config),
    ):
        with pytest.raises(UnsupportedError, match="encoder-decoder"):
            attempt()
    assert vars(model) == own


def test_models_without_attention_to_compress() -> None:
    model = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2))
    for attempt in (lambda: tqai.patch(model), lambda: tqai.TurboQuantCache(model.config)):
        with pytest.raises(UnsupportedError, match="nothing to compress"):
            attempt()
    assert "generate" not in vars(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
@torch.no_grad()
def test_bad_numbers_name_layer_and_token(tiny: Tiny, name: str, part: str, value: float) -> None:
    """The layer that saw them keeps what it held; so it is the second layer, whose step is then undone."""
    model = copy.deepcopy(tiny(name))
    cache = tqai.TurboQuantCache(model)
    run(model, prompt(100), cache, (100,))
    layer = cache.layers[1]
    keys, before = layer.keys, layer.memory()
    bad = {"keys": torch.ones(1, keys.shape[1], 5, 64), "values": torch.ones(1, keys.shape[1], 5, 64)}
    bad[part][0, -1, 3, 10] = value
    with pytest.raises(NonFiniteError, match=rf"{part} of layer 1 .*token 103\b"):
        layer.update(bad["keys"], bad["values"])
    assert layer.memory() == before and layer.get_seq_length() == 100 and torch.equal(layer.keys, keys)
    # through the model: a token whose embedding holds the value
    model.get_input_embeddings().weight.data[50] = value
    ids = torch.tensor([[4, 50, 6]])
    with pytest.raises(NonFiniteError, match=r"layer 0 .*token 101\b"):
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 100


def test_shapes_and_dtypes_that_do_not_continue(tiny: Tiny) -> None:
    model = tiny("llama")
    cache = tqai.TurboQuantCache(model)
    generate(model, past_key_values=cache)
    layer, length = cache.layers[0], cache.get_seq_length()
    good = torch.ones(1, 2, 3, 64)
    wrong: list[tuple[torch.Tensor, torch.Tensor]] = [
        (torch.ones(2, 2, 3, 64), torch.ones(2, 2, 3, 64)),
        (torch.ones(1, 4, 3, 64), torch.ones(1, 4, 3, 64)),
        (torch.ones(1, 2, 3, 32), good),
        (good, torch.ones(1, 2, 3, 32)),
        (good, torch.ones(1, 2, 4, 64)),
        (good.half(), good.half()),
        (good, good.double()),
        (good.long(), good.long()),
        (good[0], good[0]),
    ]
    for keys, values in wrong:
        with pytest.raises(InputError):
            layer.update(keys, values)
        assert layer.get_seq_length() == length
    with pytest.raises(InputError, match=r"\[2, 2, 1, 64\].*layer 0"):
        model(prompt(1, 2), past_key_values=cache)
    assert issubclass(InputError, ValueError) and issubclass(ConfigError, TqaiError)
    assert CacheConfig().label == "K4/V2"
