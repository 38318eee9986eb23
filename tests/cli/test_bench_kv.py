"""`tqai bench-kv`: figures of every branch, files, and that no branch is favoured."""

import json

import pytest

from tqai.config import DEFAULT_PRESET, PRESETS
from tqai.evaluation import context_sweep
from tqai.evaluation.peak_memory import PeakMemory

ARGUMENTS = ("--context", "256,128", "--new-tokens", "4", "--configs", "K4/V2")


def test_json_files_and_plot(tqai_command, tiny_model, tmp_path):
    result = tqai_command("bench-kv", "-m", tiny_model, *ARGUMENTS, "-o", str(tmp_path), "--json")
    assert result.status == 0, result.err
    branches = result.json["branches"]
    order = [(branch["context_tokens"], branch["cache"]) for branch in branches]
    assert order == [(128, "dynamic"), (128, "K4/V2"), (256, "dynamic"), (256, "K4/V2")]
    per_token = 2 * 2 * 2 * 64 * 4  # keys and values, layers, heads, head_dim, float32
    for branch in branches:
        tokens = branch["context_tokens"] + 4
        assert branch["tokens_per_second"] > 0 and branch["decoded_tokens"] == 4
        if branch["cache"] == "dynamic":
            assert branch["held_bytes"] == tokens * per_token
            assert (branch["kl_mean"], branch["top1_agreement"]) == (0, 1)
            assert branch["bits_per_value"] == 32
        else:
            assert branch["held_bytes"] < tokens * per_token
            assert branch["kl_mean"] > 0
    plain = next(tmp_path.glob("bench_kv_*.json"))
    assert json.loads(plain.read_text("utf-8"))["branches"] == branches
    assert plain.with_suffix(".svg").is_file()
    combined = json.loads((tmp_path / "bench_kv.json").read_text("utf-8"))
    assert list(combined["models"]) == [tiny_model]


def test_combined_file_keeps_other_models(tqai_command, tiny_model, tmp_path, monkeypatch):
    (tmp_path / "bench_kv.json").write_text(json.dumps({"models": {"other": {"branches": []}}}))
    monkeypatch.setattr(context_sweep, "_branch", one_branch)
    result = tqai_command("bench-kv", "-m", tiny_model, *ARGUMENTS, "-o", str(tmp_path))
    assert result.status == 0, result.err
    combined = json.loads((tmp_path / "bench_kv.json").read_text("utf-8"))
    assert list(combined["models"]) == ["other", tiny_model]
    for words in ("uncompressed", "K4/V2", "peak memory", "tokens/s"):
        assert words in result.out


def one_branch(model, batch, maker, context, new_tokens):
    import numpy as np

    figures = {"decoded_tokens": new_tokens, "peak_bytes": None, "held_bytes": 1, "bits_per_value": 1.0}
    figures |= {"prefill_seconds": 1.0, "tokens_per_second": 1.0}
    return figures, np.zeros((new_tokens, 384), np.float32)


def test_every_branch_does_the_same_and_leaves_nothing(tiny_model, monkeypatch):
    """Same calls in the same order for each cache, own attention for the uncompressed one, no cache alive."""
    import gc

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import Cache

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    own = model.config._attn_implementation
    calls, alive = [], []
    run_tokens = context_sweep.run_tokens

    def watched(model, input_ids, cache, last_only=False):
        calls.append((input_ids.shape[1], cache.get_seq_length(), model.config._attn_implementation == own))
        if cache.get_seq_length() == 0:
            gc.collect()
            alive.append(sum(issubclass(type(thing), Cache) for thing in gc.get_objects()))
        return run_tokens(model, input_ids, cache, last_only)

    monkeypatch.setattr(context_sweep, "run_tokens", watched)
    ids = torch.randint(384, (300,), generator=torch.Generator().manual_seed(0))
    context_sweep.sweep_contexts(model, ids, [100, 200], ["K4/V2", "K3/V2"], 3)
    branches = [calls[start : start + 8] for start in range(0, len(calls), 8)]
    assert len(branches) == 6
    for first in (0, 3):
        shapes = [[call[:2] for call in branch] for branch in branches[first : first + 3]]
        assert shapes[0] == shapes[1] == shapes[2]
        assert shapes[0][4][0] in (100, 200) and all(call[0] == 1 for call in shapes[0][5:])
        assert all(call[2] for call in branches[first])
        assert not any(call[2] for branch in branches[first + 1 : first + 3] for call in branch)
    # one is alive in a warm-up and one in a measurement: the warm-up's is gone by then
    assert set(alive) == {1}
    assert model.config._attn_implementation == own


def test_a_cache_that_stays_alive_is_noticed(tiny_model, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    kept = []
    held_bytes = context_sweep.held_bytes
    monkeypatch.setattr(context_sweep, "held_bytes", lambda cache: kept.append(cache) or held_bytes(cache))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(AssertionError, match="keeps a measured cache alive"):
        context_sweep.sweep_contexts(model, torch.zeros(40, dtype=torch.long), [20], ["K4/V2"], 2)


def test_peak_memory_sees_what_is_freed_again():
    import torch

    with PeakMemory(torch.device("cpu")) as memory:
        block = torch.ones(64 << 20, dtype=torch.uint8)
        del block
    if memory.peak_bytes is None:
        pytest.skip("this system does not reset its high-water mark")
    assert 60 << 20 < memory.peak_bytes < 160 << 20
    with PeakMemory(torch.device("cpu")) as memory:
        pass
    assert memory.peak_bytes < 32 << 20


def test_named_presets_and_what_quick_takes(tqai_command, tiny_model, monkeypatch):
    monkeypatch.setattr(context_sweep, "_branch", one_branch)
    result = tqai_command("bench-kv", "-m", tiny_model, "--quick", "--json")
    assert result.status == 0, result.err
    assert [branch["cache"] for branch in result.json["branches"]] == ["dynamic", DEFAULT_PRESET] * 2
    assert result.json["new_tokens"] == 16
    asked = ("--configs", " k4v2,small", "--context", "64")
    result = tqai_command("bench-kv", "-m", tiny_model, *asked, "--json")
    assert [branch["cache"] for branch in result.json["branches"]] == ["dynamic", "K4/V2", "small"]
    result = tqai_command("bench-kv", "-m", tiny_model, "--context", "64", "--json")
    assert {branch["cache"] for branch in result.json["branches"]} == {"dynamic", DEFAULT_PRESET, *PRESETS}
    result = tqai_command("bench-kv", "-m", tiny_model, "--context", "64", "--configs", "all8")
    assert result.status == 2 and "'all8'" in result.one_line()


def test_a_named_preset_is_measured(tqai_command, tiny_model):
    sizes = ("--context", "320", "--new-tokens", "2", "--configs", "balanced")
    result = tqai_command("bench-kv", "-m", tiny_model, *sizes, "--json")
    assert result.status == 0, result.err
    exact, ours = result.json["branches"]
    assert ours["held_bytes"] < exact["held_bytes"] and 0 < ours["kl_mean"] < 0.5


@pytest.mark.parametrize(
    "arguments",
    [
        ("--context", "x"),
        ("--context", "0"),
        ("--configs", "K9/V9"),
        ("--new-tokens", "1"),
        ("--context", "4096"),
    ],
)
def test_wrong_use_is_one_line(tqai_command, tiny_model, arguments):
    result = tqai_command("bench-kv", "-m", tiny_model, *arguments)
    assert result.status == 2
    result.one_line()
