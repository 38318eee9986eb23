"""docs/migration.md: every line of its tables works as it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "migration.md"
# So that the test is short; nothing else of a line is changed.
SHORTER = {
    "run": ["--max-tokens", "3"],
    "compare": ["--max-tokens", "3"],
    "benchmark": ["--tokens", "128"],
    "bench-kv": ["--new-tokens", "2", "--configs", "K4/V2"],
}


def rows() -> list[str]:
    """The middle column of every table, without its quotes."""
    found = []
    for line in PAGE.read_text("utf-8").splitlines():
        if line.startswith("|") and not line.startswith(("|---", "| before")):
            before, here, changed = (cell.strip() for cell in line.strip("|").split(" | "))
            assert changed and before
            code = re.fullmatch(r"`(.+)`", here)
            assert code is not None, line
            found.append(code[1])
    return found


ROWS = rows()
COMMANDS = [row for row in ROWS if re.match(r"(tqai|python -m tqai) ", row)]
PYTHON = [row for row in ROWS if row not in COMMANDS]


def test_the_page_has_all_its_lines() -> None:
    assert len(PYTHON) >= 40 and len(COMMANDS) >= 25


def save_model(folder: Path) -> Path:
    sys.path.insert(0, str(ROOT / "tests" / "cli"))
    try:
        import importlib.util

        spec = importlib.util.spec_from_file_location("cli_conftest", ROOT / "tests" / "cli" / "conftest.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["cli_conftest"] = module
        spec.loader.exec_module(module)
        saved: Path = module.save_tiny_model(folder)
        return saved
    finally:
        sys.path.remove(str(ROOT / "tests" / "cli"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return save_model(tmp_path_factory.mktemp("migration") / "model")


@pytest.fixture(scope="module")
def converted_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import tqai

    folder = tmp_path_factory.mktemp("migration") / "converted"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tqai.convert(AutoModelForCausalLM.from_pretrained(model_folder), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def names(model_folder: Path) -> dict[str, Any]:
    """What the page's lines use; later lines use what earlier ones made."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import tqai
    from tqai.integrations.transformers.activations import ActivationStudy

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return {
        "tqai": tqai,
        "ActivationStudy": ActivationStudy,
        "model": AutoModelForCausalLM.from_pretrained(model_folder),
        "tokenizer": tokenizer,
        "inputs": {"input_ids": torch.arange(100)[None] % 300},
        "vectors": torch.randn(5, 128, generator=torch.Generator().manual_seed(0)),
    }


@pytest.mark.parametrize("line", [row for row in PYTHON if "mlx" not in row])
def test_python_line(
    line: str, names: dict[str, Any], model_folder: Path, converted_folder: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import tqai

    if "cmaes" in line:
        pytest.importorskip("cma")
    names["DIR"] = str(converted_folder) if "config_path" in line else str(tmp_path / "new")
    if "converted" in line:
        names["converted"] = AutoModelForCausalLM.from_pretrained(converted_folder)
    if "fresh" in line:
        names["fresh"] = AutoModelForCausalLM.from_pretrained(model_folder)
    if line.startswith("model(**inputs"):  # a cache that has seen nothing
        names["cache"] = tqai.TurboQuantCache(bits=4)
    try:
        with torch.no_grad():
            exec(line, names)  # a line of our own page
            if line.startswith("tqai.patch"):  # the patched model generates with those settings
                model = names["converted" if "converted" in line else "model"]
                out = model.generate(
                    **names["inputs"], max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True
                )
                assert isinstance(out.past_key_values, tqai.TurboQuantCache)
    finally:
        if "cache = tqai.patch" not in line and not line.startswith("model.generate"):
            tqai.unpatch(names["model"])


def test_results_of_the_lines(names: dict[str, Any]) -> None:
    """What the lines give is what the page says."""
    import torch

    vectors = names["vectors"]
    for line in PYTHON:
        if line.startswith(("tq =", "indices,", "vectors_hat", "ip =", "parts =", "codes,", "from tqai")):
            exec(line, names)
    assert names["indices"].shape == (5, 128) and names["norms"].shape == (5,)
    assert (names["vectors_hat"] - vectors).norm() < 0.12 * vectors.norm()
    assert names["codes"].shape == (5, 64) and names["scales"].dtype == torch.bfloat16
    assert torch.equal(names["ip"].dequantize(*names["parts"]), names["ip"].dequantize(names["parts"]))
    memory = names["compute_memory_bytes"]
    codes, scales = names["codes"], names["scales"]
    assert memory(128, 4, 5)["total_bytes"] == codes.nbytes + scales.nbytes
    two = memory(128, 3, 5, two_stage=True)
    assert two["index_bytes"] == names["parts"].codes.nbytes
    assert two["qjl_bytes"] == names["parts"].signs.nbytes
    from tqai.core.codec import CodecSpec, make_codec

    row_bytes = make_codec(CodecSpec("qjl", 128, 2, sketch=128)).row_bytes
    assert two["total_bytes"] == 5 * (row_bytes + 2)
    assert two["bits_per_element"] == 8 * (row_bytes + 2) / 128


@pytest.mark.parametrize("bad", [(0, 4, 1), (8, 0, 1), (8, 9, 1), (8, 4, 0), (8, True, 1), (8, 4, 1.5)])
def test_memory_of_nothing(bad: tuple[Any, ...]) -> None:
    import tqai

    with pytest.raises(tqai.errors.ConfigError, match="allowed are whole numbers"):
        tqai.compute_memory_bytes(*bad)


def test_mlx_lines() -> None:
    pytest.importorskip("mlx.core")
    llama = pytest.importorskip("mlx_lm.models.llama")
    import tqai

    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=1,
        intermediate_size=64,
        num_attention_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=32,
        num_key_value_heads=1,
        head_dim=64,
    )
    names = {"tqai": tqai, "mlx_model": llama.Model(arguments)}
    lines = [row for row in PYTHON if "mlx" in row]
    assert len(lines) == 2
    for line in lines:
        exec(line, names)


@pytest.mark.parametrize("line", COMMANDS)
def test_command_line(
    line: str,
    model_folder: Path,
    converted_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tqai.cli.kernel_speed
    from tqai.cli.app import main

    monkeypatch.setattr(tqai.cli.kernel_speed, "MIN_SECONDS", 0.0)
    folder = converted_folder if "--tqai-config" in line else tmp_path / "new"
    words = [{"MODEL": str(model_folder), "DIR": str(folder)}.get(word, word) for word in shlex.split(line)]
    if words[0] == "python":
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return
    if words[1] == "serve":  # it would serve until it is stopped; tests/server stops it
        words = [*words, "--help"]
    assert main([*words[1:], *SHORTER.get(words[1], [])]) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert printed.out
    if "--config" in words:
        wanted = {"kv-only": "K4/V2:", "kv+hidden8": "K4/V2 hidden8:", "kv+hidden6": "K4/V2 hidden6:"}
        wanted |= {"kv+ffn8": "K4/V2 ffn8:", "all8": "K4/V2 hidden8 ffn8:", "all6": "K4/V2 hidden6 ffn6:"}
        wanted["aggressive"] = "K3/V2 hidden6 ffn6:"
        assert f"cache {wanted[words[words.index('--config') + 1]]}" in printed.err
