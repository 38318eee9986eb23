"""`--backend mlx` of run, compare, demo and benchmark."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'tqai[mlx]')")

PROMPT = "In the following examples"


@pytest.fixture
def long_file(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("The secret code for Belmor Tazin is 482913. " * 12, "utf-8")
    return str(file)


def test_run_gives_the_tokens_of_the_torch_backend(tqai_command, tiny_model, long_file):
    arguments = ("run", PROMPT, "-m", tiny_model, "--file", long_file, "--max-tokens", "12", "--json")
    here = tqai_command(*arguments, "--backend", "mlx", "--dtype", "float32", "--config", "K4/V4")
    there = tqai_command(*arguments, "--backend", "torch", "--dtype", "float32", "--config", "K4/V4")
    assert here.status == 0, here.err
    assert here.json["token_ids"] == there.json["token_ids"]
    assert here.json["text"] == there.json["text"]
    cache = here.json["cache"]
    assert cache["details"]["backend"] == "mlx"
    assert cache["details"]["codes_bytes"] == there.json["cache"]["details"]["codes_bytes"] > 0
    assert here.json["tokens_per_second"] > 0


def test_run_streams_samples_and_leaves_the_cache_alone_when_told(tqai_command, tiny_model):
    arguments = (
        "run",
        PROMPT,
        "-m",
        tiny_model,
        "--backend",
        "mlx",
        "--max-tokens",
        "6",
        "--temperature",
        "1",
    )
    first, second = (tqai_command(*arguments, "--seed", "3", "--no-tqai") for _ in range(2))
    assert first.status == 0, first.err
    assert first.out == second.out != ""
    assert "cache uncompressed" in first.err


def test_compare_shows_both_sides(tqai_command, tiny_model, long_file):
    arguments = ("compare", PROMPT, "-m", tiny_model, "--file", long_file, "--backend", "mlx", "--json")
    result = tqai_command(*arguments, "--max-tokens", "8", "--config", "K4/V4")
    assert result.status == 0, result.err
    plain, packed = result.json["uncompressed"], result.json["compressed"]
    assert packed["cache"]["held_bytes"] < plain["cache"]["held_bytes"] / 2
    # everything but the newest token; mlx-lm allocates room for 256 at a time
    assert plain["cache"]["tokens"] == result.json["prompt_tokens"] + len(plain["token_ids"]) - 1
    assert plain["cache"]["bits_per_value"] > 32


def test_demo_finds_the_code(tqai_command):
    result = tqai_command(
        "demo", "--backend", "mlx", "--tokens", "200", "--facts", "1", "--max-tokens", "8", "--json"
    )
    assert result.status == 0, result.err
    assert result.json["uncompressed"]["right"] == result.json["compressed"]["right"] == 1
    assert result.json["compressed"]["cache"]["details"]["backend"] == "mlx"


def test_benchmark_measures_without_a_model(tqai_command):
    result = tqai_command("benchmark", "--backend", "mlx", "--tokens", "128", "--json", "--n-vectors", "9000")
    assert result.status == 0, result.err
    assert result.json["backend"] == "mlx"
    assert result.json["device"].startswith("mlx ")
    assert result.json["distortion"]["keys"]["nmse"] == pytest.approx(0.0092, rel=0.05)
    assert result.json["checks"]["attention_error"] < 1e-5
    assert result.json["attention"]["ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "x", "-m", "/no/such/folder"), "no such folder; with --backend mlx a local folder"),
        (("run", "x", "--device", "cpu"), "--device cpu: MLX computes on its default device"),
        (("benchmark", "--device", "cuda"), "--device cuda: MLX computes on its default device"),
        (("run", "x", "--dtype", "int4"), "--dtype int4"),
        (("run", "x", "--use-qjl"), "use_qjl=True: with mlx-lm allowed is False"),
    ],
)
def test_what_mlx_does_not_serve_is_one_line(tqai_command, arguments, says):
    result = tqai_command(*arguments, "--backend", "mlx")
    assert result.status in (1, 2)
    assert says in result.one_line()


def test_folder_that_mlx_lm_does_not_know(tqai_command, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    result = tqai_command("run", "x", "-m", str(tmp_path), "--backend", "mlx")
    assert result.status == 1
    assert "mlx-lm does not load it" in result.one_line()


def test_mlx_backend_for_a_torch_model_is_refused():
    import torch

    import tqai
    from tqai.cache.layer import CompressedLayer
    from tqai.errors import UnsupportedError

    layer = CompressedLayer(tqai.CacheConfig(backend="mlx"))
    keys = torch.zeros(1, 1, 1, 64)
    with pytest.raises(UnsupportedError, match=r"mlx: it computes on arrays of MLX, not on torch tensors"):
        layer.append(keys, keys)
