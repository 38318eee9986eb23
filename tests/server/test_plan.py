"""`tqai plan`: bytes are those of the pages that the server holds; no command without an equivalent."""

import json

import pytest
from transformers import Gemma3TextConfig, LlamaConfig

from tqai.cli.app import main
from tqai.config import PRESETS, CacheConfig
from tqai.errors import UnsupportedError
from tqai.server.planning import cache_layers, commands, held, weight_bytes

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
    assert set(rows) == {"bfloat16", *PRESETS}
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
    plain = commands("m", "bfloat16", 8192, gpus=2, nodes=1)
    assert "kv-cache-dtype" not in plain["vLLM"] and "--tp 2" in plain["SGLang"]


def test_command(capsys):
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
