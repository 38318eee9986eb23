"""The generated parts of the documentation are what the code and the benchmark results say."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def generate_docs():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "scripts" / "generate_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path):
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    for page in sorted((ROOT / "docs").glob("*.md")):
        shutil.copy(page, tmp_path / "docs")
    if (ROOT / "docs" / "images").is_dir():
        shutil.copytree(ROOT / "docs" / "images", tmp_path / "docs" / "images")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for result in (ROOT / "benchmarks" / "results").glob("*.json"):
        shutil.copy(result, tmp_path / "benchmarks" / "results")
    return tmp_path


def test_documentation_is_current(generate_docs):
    names = [str(path.relative_to(ROOT)) for path in generate_docs.drifted(ROOT)]
    assert names == [], "run `make docs`"


def test_a_changed_option_is_drift(generate_docs, copy):
    page = copy / "docs" / "cli.md"
    page.write_text(page.read_text("utf-8").replace("--max-tokens", "--most-tokens"), "utf-8")
    assert list(generate_docs.drifted(copy)) == [page]


def test_a_changed_figure_is_drift(generate_docs, copy):
    (copy / "benchmarks" / "results" / "demo_model.json").write_text(json.dumps(RESULT), "utf-8")
    drifted = generate_docs.drifted(copy)
    assert list(drifted) == [copy / "README.md"]
    text = drifted[copy / "README.md"]
    assert "| tqai K4/V2 | 1.50 | 3.25 | 0.0123 | 7.100 | 49 |" in text
    assert "| uncompressed (DynamicCache) | 8.00 | 32.00 | - | 7.000 | 50 |" in text
    assert "| tqai K4/V2 | 20.0 (0.50x) | withheld |" in text
    assert "## Command line" in text
    (copy / "README.md").write_text(text, "utf-8")
    assert generate_docs.drifted(copy) == {}


def test_every_marker_is_known(generate_docs):
    import re

    text = "".join((ROOT / name).read_text("utf-8") for name in generate_docs.DOCUMENTS)
    names = re.findall(r"<!-- generated: ([\w-]+) -->", text)
    assert sorted(names) == sorted(generate_docs.PARTS)
    assert text.count("<!-- end of generated: ") == len(names)


def test_script_exits_with_1_on_drift(generate_docs, copy, monkeypatch, capsys):
    monkeypatch.setattr(generate_docs, "ROOT", copy)
    monkeypatch.setattr(sys, "argv", ["generate_docs.py", "--check"])
    (copy / "docs" / "cli.md").unlink()
    assert generate_docs.main() == 1
    assert "docs/cli.md differs" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["generate_docs.py"])
    assert generate_docs.main() == 0
    assert (copy / "docs" / "cli.md").read_text("utf-8") == (ROOT / "docs" / "cli.md").read_text("utf-8")


def _quality(kl: float, perplexity: float) -> dict:
    return {"kl_mean": {"value": kl, "low": kl, "high": kl}, "perplexity": {"value": perplexity}}


RESULT = {
    "settings": {
        "questions": 50,
        "memory_tokens": 8192,
        "documents": 8,
        "document_tokens": 2048,
        "chunk_tokens": 32,
        "retrieval_tokens": 4096,
    },
    "model": {"parameters": 1.0e7, "dtype": "float32", "device": "cpu"},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "cpu": "a processor",
    "cpus": 2,
    "date": "2026-01-01T00:00:00+00:00",
    "memory": {
        "dynamic": {"held_bytes": 8_000_000, "bits_per_value": 32.0},
        "K4/V2": {"held_bytes": 1_500_000, "bits_per_value": 3.25},
    },
    "quality": {"dynamic": _quality(0.0, 7.0), "K4/V2": _quality(0.0123, 7.1)},
    "retrieval": {"dynamic": {"correct": 50}, "K4/V2": {"correct": 49}},
    "speed": {
        "1024": {
            "dynamic": {"tokens_per_second": 40.0},
            "K4/V2": {"tokens_per_second": 20.0},
        },
        "8192": {"dynamic": {"tokens_per_second": 30.0}, "K4/V2": {"withheld": "differs"}},
    },
}
