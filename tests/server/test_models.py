"""Models that attend in other ways than the embedded one, and models that are refused."""

import sys
from pathlib import Path

import pytest
import torch
from engine_runs import finished, request, run, run_one

from tqai.config import CacheConfig
from tqai.errors import UnsupportedError
from tqai.server.engine.engine import Engine
from tqai.server.engine.settings import EngineSettings

TINY = Path(__file__).resolve().parents[1] / "integrations" / "transformers"


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.syspath_prepend(str(TINY))
    import tiny_models

    yield tiny_models
    sys.modules.pop("tiny_models", None)


def running(model, tokenizer, cache):
    settings = EngineSettings(cache=cache, max_running=3, chunk_tokens=128, max_kv_bytes=8 << 20)
    engine = Engine(model, tokenizer, settings)
    engine.start()
    return engine


@pytest.mark.parametrize("name", ["llama_dim80", "qwen2", "mistral", "gemma2", "gemma3", "gpt_oss"])
def test_uncompressed_pages_give_the_model_s_own_tokens(tiny, loaded, name):
    """Sliding windows of 96 tokens, soft-capping, learned sinks."""
    model = tiny.build(name)
    prompts = [tiny.prompt(tokens, seed=tokens)[0].tolist() for tokens in (30, 150, 300)]
    with torch.inference_mode():
        expected = [
            model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
            for ids in prompts
        ]
    engine = running(model, loaded[1], None)
    try:
        outcomes = run(engine, [request(ids, max_tokens=12, ignore_eos=True) for ids in prompts])
        assert [outcome.tokens for outcome in outcomes] == expected
    finally:
        engine.stop()


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_compressed_pages_stay_close_and_agree_with_themselves(tiny, loaded, name):
    model = tiny.build(name)
    prompts = [tiny.prompt(tokens, seed=tokens)[0].tolist() for tokens in (70, 300)]
    wanted = [
        request(ids, max_tokens=5, ignore_eos=True, prompt_logprobs=True, logprobs=0) for ids in prompts
    ]
    found = {}
    for label, cache in (("exact", None), ("coded", CacheConfig(bits_k=8, bits_v=8))):
        engine = running(model, loaded[1], cache)
        try:
            together = run(engine, wanted)
            assert all(finished(outcome) for outcome in together)
            assert [run_one(engine, wish).tokens for wish in wanted] == [o.tokens for o in together]
            found[label] = [item.logprob for outcome in together for item in outcome.end.prompt_chosen]
        finally:
            engine.stop()
    exact, coded = torch.tensor(found["exact"]), torch.tensor(found["coded"])
    assert not torch.equal(exact, coded)
    assert float((exact - coded).abs().mean()) < 0.02 < 0.1 * float(exact.std())


@pytest.mark.parametrize("name", ["qwen3_next", "llama4", "diffllama", "gptj", "gemma3n", "deepseek"])
def test_models_that_batching_cannot_serve_are_refused(tiny, loaded, name):
    with pytest.raises(UnsupportedError):
        Engine(tiny.build(name), loaded[1], EngineSettings(max_kv_bytes=8 << 20))
