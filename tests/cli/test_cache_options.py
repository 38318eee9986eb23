"""The options of the cache, shared by `run`, `compare` and `demo`: every one reaches the cache."""

import pytest

import tqai.config
from tqai.cli.cache_options import NO_OPTIONS, CacheOptions
from tqai.config import STUDY_PRESETS, CacheConfig
from tqai.errors import ConfigError

PROMPT = "In the following examples"


@pytest.fixture
def made(tqai_command, tiny_model, monkeypatch):
    """Runs a command up to where it would make the cache; returns the configuration it would take."""
    import tqai.cli.compare
    import tqai.cli.run

    class Stop(Exception):
        pass

    def settings_of(*arguments):
        seen = []

        def stop(model, config):
            seen.append(config)
            raise Stop

        monkeypatch.setattr(tqai.cli.run, "compressed_cache", stop)
        monkeypatch.setattr(tqai.cli.compare, "compressed_cache", stop)
        result = tqai_command(*arguments, PROMPT, "-m", tiny_model, "--max-tokens", "2")
        assert len(seen) == 1, result.err
        return seen[0]

    return settings_of


@pytest.mark.parametrize("command", ["run", "compare"])
def test_every_option_arrives(made, command):
    given = made(
        command,
        *("--bits-k", "3", "--bits-v", "5", "--sink-tokens", "4", "--residual-window", "70"),
        *("--use-qjl", "--qjl-sketch-size", "48", "--backend", "torch"),
        *("--compress-hidden", "--bits-hidden", "7", "--compress-ffn", "--bits-ffn", "6"),
        *("--compress-attn-logits", "--bits-attn", "5"),
    )
    assert given == CacheConfig(
        bits_k=3,
        bits_v=5,
        sink_tokens=4,
        residual_window=70,
        use_qjl=True,
        qjl_sketch_size=48,
        backend="torch",
        compress_hidden=True,
        bits_hidden=7,
        compress_ffn=True,
        bits_ffn=6,
        compress_attn_logits=True,
        bits_attn=5,
    )


@pytest.mark.parametrize("name", STUDY_PRESETS)
def test_every_named_config(made, name):
    assert made("run", "--config", name) == CacheConfig.preset(name)
    assert CacheOptions(config=name, bits_k=5).settings() == CacheConfig.preset(name, bits_k=5)


def test_the_named_configs_are_the_documented_ones():
    def short(name):
        settings = CacheConfig.preset(name)
        hidden = settings.bits_hidden if settings.compress_hidden else None
        return settings.bits_k, settings.bits_v, hidden, settings.bits_ffn if settings.compress_ffn else None

    assert {name: short(name) for name in STUDY_PRESETS} == {
        "kv-only": (4, 2, None, None),
        "kv+hidden8": (4, 2, 8, None),
        "kv+hidden6": (4, 2, 6, None),
        "kv+ffn8": (4, 2, None, 8),
        "all8": (4, 2, 8, 8),
        "all6": (4, 2, 6, 6),
        "aggressive": (3, 2, 6, 6),
    }


def test_compress_all_is_both():
    settings = CacheOptions(compress_all=True, bits_ffn=4).settings()
    assert (settings.compress_hidden, settings.compress_ffn, settings.bits_ffn) == (True, True, 4)
    assert NO_OPTIONS.settings() == CacheConfig.preset(tqai.config.DEFAULT_PRESET)


@pytest.mark.parametrize(
    ("field", "value"),
    [("bits_k", 0), ("bits_v", 9), ("bits_k", -1), ("residual_window", -1), ("bits_attn", 0)],
)
def test_zero_is_not_nothing(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        CacheOptions(**{field: value}).settings()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--bits-k", "0"),
        ("--bits-v", "9"),
        ("--bits-k", "-1"),
        ("--residual-window", "-1"),
        ("--use-qjl", "--qjl-sketch-size", "0"),
        ("--config", "kv+hidden9"),
        ("--config", "all8", "--tqai-config", "somewhere"),
    ],
)
def test_wrong_use_is_one_line_before_anything_is_loaded(tqai_command, arguments):
    result = tqai_command("run", PROMPT, "-m", "./no-such-folder", *arguments)
    assert result.status == 2
    assert "no-such-folder" not in result.one_line()


def test_study_flags_change_the_answer_and_leave_no_trace(tqai_command, tiny_model):
    base = ("run", PROMPT, "-m", tiny_model, "--max-tokens", "12", "--json", "--bits-k", "4")
    plain = tqai_command(*base).json
    coarse = tqai_command(*base, "--compress-hidden", "--bits-hidden", "1").json
    assert coarse["token_ids"] != plain["token_ids"]
    assert coarse["cache"]["label"] == "K4/V2 hidden1"
    assert tqai_command(*base).json["token_ids"] == plain["token_ids"]


def test_qjl_holds_the_bytes_of_its_signs(tqai_command, tiny_model, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("The secret code for Belmor Tazin is 482913. " * 20, "utf-8")
    base = ("run", PROMPT, "-m", tiny_model, "--max-tokens", "2", "--json", "--file", str(file))
    base += ("--config", "K4/V2")
    plain = tqai_command(*base).json["cache"]["details"]
    sketched = tqai_command(*base, "--use-qjl", "--qjl-sketch-size", "32").json["cache"]["details"]
    assert sketched["codes_bytes"] > plain["codes_bytes"]
    vectors = plain["scales_bytes"] / 2 / 2
    assert sketched["codes_bytes"] - plain["codes_bytes"] == vectors * (32 // 8 + 2)
    assert sketched["backend"] == "torch"


def test_a_gpu_is_used_when_there_is_one(monkeypatch):
    import torch

    from tqai.cli.models import find_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device(None).type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device(None).type == "cpu"


@pytest.mark.parametrize("command", ["run", "compare"])
def test_options_of_the_newer_codecs(made, command):
    given = made(
        command,
        *("--codec", "trellis", "--window", "100", "--sinks", "3", "--offsets", "auto"),
        *("--last-layer-bits", "K8/V7", "--scale-format", "log8", "--bits-k", "3"),
    )
    assert given == CacheConfig(
        bits_k=3,
        codec="trellis",
        residual_window=100,
        sink_tokens=3,
        offsets="auto",
        scale_format="log8",
        last_layer_bits=(8, 7),
    )
    assert made(command, "--bits-budget", "3.5") == CacheConfig(bits_budget=3.5)
    assert made(command, "--config", "balanced") == CacheConfig.preset("balanced")
    assert made(command, "--config", "balanced", "--bits-budget", "4") == CacheConfig.preset(
        "balanced", bits_budget=4.0
    )


def test_the_default_of_commands(made, monkeypatch):
    monkeypatch.setattr(tqai.config, "DEFAULT_PRESET", "balanced")
    monkeypatch.setattr("tqai.integrations.transformers.default.SLOW_ENCODERS", ())  # wherever this runs
    assert made("run") == CacheConfig.preset("balanced")
    monkeypatch.setattr("tqai.integrations.transformers.default.SLOW_ENCODERS", ("torch",))
    assert made("run", "--backend", "torch") == CacheConfig.preset("K4/V2", backend="torch")
    assert made("run", "--bits-k", "4") == CacheConfig()


def test_a_last_layer_that_is_no_pair():
    with pytest.raises(ConfigError, match="last_layer_bits='4': wanted is such as K4/V4"):
        CacheOptions(last_layer_bits="4").settings()
