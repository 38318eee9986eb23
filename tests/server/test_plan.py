"""`tqai plan`: bytes are those of the pages that the server holds; no command without an equivalent."""

import json

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig

import tqai
from tqai import demo
from tqai.cli.app import main
from tqai.config import NAMED_PRESETS, PRESETS, CacheConfig
from tqai.errors import ConfigError, UnsupportedError
from tqai.integrations.transformers import TurboQuantCache
from tqai.server.planning import CACHES, cache_layers, cache_named, commands, held, weight_bytes

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
    dtype="bfloat16",
)


def test_an_8b_model():
    (layers,) = cache_layers(LLAMA_8B)
    assert layers.bytes_per_token(None) == 131072
    assert layers.bytes_per_token(CacheConfig()) == 32 * 8 * (64 + 2 + 32 + 2)
    assert weight_bytes(LLAMA_8B) == 2 * 8_030_261_248
    rows = {row.label: row for row in held([layers], 56 << 30, 32768)}
    assert tuple(rows) == CACHES == ("bfloat16", *PRESETS, *NAMED_PRESETS)
    assert rows["bfloat16"].context_bytes == 4 << 30 and rows["bfloat16"].contexts == 14
    assert rows["bfloat16"].longest_tokens == 14 * 32768
    exact = 64 * 131072
    assert rows["K4/V2"].context_bytes == 512 * 64 * 25600 + exact
    assert rows["K4/V2"].contexts == (56 << 30) // (512 * 64 * 25600 + exact)
    assert rows["K4/V2"].contexts > 4.5 * 14


def test_bytes_are_those_of_the_server(make_engine, loaded):
    (layers,) = cache_layers(loaded[0].config)
    with make_engine() as engine:
        assert engine.store.pool.page_bytes == 64 * layers.bytes_per_token(CacheConfig())
        assert engine.bf16_bytes_per_token == layers.bytes_per_token(None)


@pytest.fixture(scope="module")
def patched():
    """A model of its own: engines have theirs attend in another way."""
    model, _ = demo.load()
    tqai.patch(model)
    return model


@pytest.mark.parametrize("name", ["K4/V2", "balanced", "small"])
@pytest.mark.parametrize("tokens", [100, 999])
def test_bytes_are_those_of_a_cache(patched, document_ids, name, tokens):
    """But for what is not full yet. The model is in float32, so its exact tokens take twice as much."""
    (layers,) = cache_layers(patched.config)
    _, settings = cache_named(name)
    cache = TurboQuantCache(patched, config=name)
    with torch.no_grad():
        patched(torch.tensor([document_ids[:tokens]]), past_key_values=cache)
    found = cache.memory()
    pages = max(tokens - settings.sink_tokens - settings.window_tokens, 0) // 64
    codes = found.codes_bytes + found.scales_bytes
    assert codes == pages * 64 * layers.bytes_per_token(settings)
    most, exact = layers.bytes_at(tokens, settings), layers.bytes_per_token(None)
    not_full = 64 * layers.bytes_per_token(settings) + 64 * exact + found.offsets_bytes
    not_full += max(settings.sink_tokens + settings.window_tokens - tokens, 0) * exact
    if not pages:
        not_full += 3 * 4 * 6 * 2 * 128  # offsets come with the first page
    assert most - not_full <= codes + found.window_bytes / 2 + found.offsets_bytes <= most


def test_sliding_layers_stop_growing():
    config = Gemma3TextConfig(
        num_hidden_layers=6, head_dim=64, num_key_value_heads=2, num_attention_heads=4, sliding_window=128
    )
    sliding, full = sorted(cache_layers(config), key=lambda layer: layer.kind, reverse=True)
    assert (sliding.kind, sliding.count, sliding.sliding_window) == ("sliding_attention", 5, 128)
    assert sliding.bytes_at(1000, None) == sliding.bytes_at(128, None) == 128 * 5 * 2 * 2 * 64 * 2
    assert full.bytes_at(1000, None) == 1000 * 1 * 2 * 2 * 64 * 2


def test_caches_of_another_kind_are_refused():
    latent = LlamaConfig()
    latent.kv_lora_rank = 512
    with pytest.raises(UnsupportedError, match="latent"):
        cache_layers(latent)


def test_commands_name_what_exists_and_nothing_else():
    known = commands("org/model", "K4/V4", 32768, gpus=8, nodes=2)
    assert "--kv-cache-dtype turboquant_4bit_nc" in known["vLLM"]
    assert "--tensor-parallel-size 8 --pipeline-parallel-size 2" in known["vLLM"] and "ray" in known["vLLM"]
    assert known["tqai"].startswith("no equivalent") and known["llama.cpp"].startswith("no equivalent")
    one = commands("org/model", "K4/V2", 32768, gpus=1, nodes=1)
    assert one["tqai"] == "tqai serve -m org/model --config K4/V2 --max-model-len 32768"
    assert [name for name, line in one.items() if line.startswith("no equivalent")] == [
        "vLLM",
        "SGLang",
        "llama.cpp",
    ]
    cpu = commands("a b", "K4/V4", 8192, gpus=0, nodes=1)
    assert cpu["vLLM"].startswith("no equivalent") and "q4_0" in cpu["llama.cpp"] and "'a b'" in cpu["tqai"]
    assert cpu["SGLang"].startswith("no equivalent") and "turboquant" in cpu["vLLM"]
    uncompressed = commands("m", "bfloat16", 8192, gpus=0, nodes=1)
    assert uncompressed["vLLM"] == "vllm serve m --max-model-len 8192"
    assert uncompressed["tqai"].endswith("--no-tqai --max-model-len 8192")
    assert uncompressed["SGLang"].endswith("--device cpu")
    assert commands("m", "K4/V2", 8192, gpus=0, nodes=2)["tqai"].startswith("no equivalent")
    named = commands("m", "balanced", 8192, gpus=1, nodes=1)
    assert named["tqai"] == "tqai serve -m m --config balanced --max-model-len 8192"
    plain = commands("m", "bfloat16", 8192, gpus=2, nodes=1)
    assert "kv-cache-dtype" not in plain["vLLM"] and "--tp 2" in plain["SGLang"]


def test_caches_by_name():
    assert cache_named("BF16") == cache_named("bfloat16") == ("bfloat16", None)
    assert cache_named("k4v2") == ("K4/V2", CacheConfig.preset("K4/V2"))
    assert cache_named("quality") == ("quality", CacheConfig.preset("quality"))
    for name in ("kv+hidden8", "nonsense"):
        with pytest.raises(ConfigError, match="allowed are"):
            cache_named(name)


def test_the_last_layer_s_bits_are_those_of_the_last_layer():
    config = Gemma3TextConfig(
        num_hidden_layers=6, head_dim=64, num_key_value_heads=2, num_attention_heads=4, sliding_window=128
    )
    cache = CacheConfig(last_layer_bits=(8, 8))
    for layers in cache_layers(config):
        plain = layers.bytes_per_token(CacheConfig())
        more = 2 * (64 + 64 - 32 - 16) if layers.kind == "full_attention" else 0
        assert layers.bytes_per_token(cache) == plain + more


def test_command(capsys):
    assert main(["plan", "--config", "balanced"]) == 0
    assert "tqai serve --config balanced" in capsys.readouterr().out
    assert main(["plan", "--config", "nonsense"]) == 2
    assert "allowed are bfloat16, K4/V2" in capsys.readouterr().err
    assert main(["plan", "--memory", "1GiB", "--context", "8192", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["weights_bytes"] == 2 * 9_793_600 and found["layers"][0]["bytes_per_token"]["bfloat16"] == 6144
    )
    assert main(["plan", "--memory", "1GiB"]) == 0
    assert "K4/V2" in capsys.readouterr().out
    assert main(["plan", "--memory", "lots"]) == 2
    assert "allowed are sizes" in capsys.readouterr().err
    assert main(["plan", "-m", "/no/such/folder"]) == 2


def test_without_torch_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("tqai.cli.models.find_spec", lambda name: None)
    assert main(["plan"]) == 1
    assert capsys.readouterr().err.endswith("needs torch and transformers: pip install 'tqai[torch]'\n")
