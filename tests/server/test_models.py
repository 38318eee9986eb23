"""Models that attend in other ways than the embedded one, and models that are refused."""

import sys
from pathlib import Path

import pytest
import torch
from engine_runs import finished, request, run, run_one

from tqai.config import CacheConfig
from tqai.errors import UnsupportedError
from tqai.server.engine import engine as engine_module
from tqai.server.engine.engine import Engine, PromptTooLong
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


@pytest.fixture
def small(monkeypatch):
    """`small(model, tokenizer, pages, ...)`: an engine with so many pages of each kind of layer."""

    def make(model, tokenizer, pages, **settings):
        monkeypatch.setattr(engine_module, "_pool_pages", lambda *given: pages)
        engine = Engine(model, tokenizer, EngineSettings(max_running=3, chunk_tokens=128, **settings))
        engine.start()
        return engine

    return make


@pytest.mark.parametrize("cache", [None, CacheConfig(sink_tokens=3, residual_window=20, offsets="on")])
def test_pages_that_no_token_will_see_are_given_back(tiny, loaded, small, cache):
    """Every layer of this model sees 96 tokens: 6 pages serve prompts of 14 pages, one after the other and
    together, to the same tokens as a pool that never runs out."""
    model = tiny.build("mistral")
    lengths = (900, 300, 40, 700)
    wanted = [
        request(tiny.prompt(tokens, seed=tokens)[0].tolist(), max_tokens=90, ignore_eos=True)
        for tokens in lengths
    ]
    settings = {"cache": cache, "prefix_caching": False}
    outcomes = []
    for pages in (50, 6):
        engine = small(model, loaded[1], [pages], **settings)
        try:
            outcomes.append([run_one(engine, wish).tokens for wish in wanted])
            outcomes.append([outcome.tokens for outcome in run(engine, wanted)])
            assert all(pool.free == pool.pages == pages for pool in engine.store.pools)
        finally:
            engine.stop()
    assert outcomes[1:] == outcomes[:1] * 3 and all(len(tokens) == 90 for tokens in outcomes[0])
    if cache is None:
        ids = torch.tensor([wanted[0].prompt])
        with torch.inference_mode():
            own = model.generate(ids, max_new_tokens=90, do_sample=False)[0, ids.shape[1] :].tolist()
        assert outcomes[0][0] == own


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_sliding_layers_take_few_pages_beside_layers_that_see_everything(tiny, loaded, small, name):
    """Prefixes, preemption and requests that are refused, with kinds of layers that fill differently."""
    model = tiny.build(name)
    prompt = tiny.prompt(600, seed=1)[0].tolist()
    prompts = [prompt, prompt[:560] + prompt[:30], prompt, prompt[:300], prompt[:280] + prompt[:100]]
    wanted = [request(ids, max_tokens=70, ignore_eos=True) for ids in prompts]
    cache = CacheConfig(sink_tokens=2)
    found = []
    for pages, sharing in (([60, 30], False), ([60, 30], True), ([14, 7], True)):
        engine = small(model, loaded[1], pages, cache=cache, prefix_caching=sharing)
        full, sliding = engine.store.pools
        most = []
        give_back = engine.scheduler.pages.give_back_unseen

        def watched(sequence, give_back=give_back, most=most):
            give_back(sequence)
            most.append([len(held.live) for held in sequence.held])

        engine.scheduler.pages.give_back_unseen = watched
        try:
            found.append([run_one(engine, wish).tokens for wish in wanted])
            found.append([outcome.tokens for outcome in run(engine, wanted)])
            counters, prefixes = engine.scheduler.counters, engine.scheduler.prefixes
            assert max(row[0] for row in most) == (600 + 69 - 2) // 64
            assert max(row[1] for row in most) <= 96 // 64 + 1
            assert (counters.prefix_hit_tokens > 1000) == sharing
            assert full.used == prefixes.pages == prefixes.evictable(0)
            assert sliding.used == prefixes.evictable(1)
            prefixes.clear()
            assert full.free == full.pages and sliding.free == sliding.pages
        finally:
            engine.stop()
    assert found[1:] == found[:1] * 5
    for pages, needed in (([9, 7], 10), ([10, 4], 5)):
        engine = small(model, loaded[1], pages, cache=cache)
        engine.stop()
        with pytest.raises(PromptTooLong, match=f"need {needed} pages of the cache, which has {needed - 1}"):
            engine.check(wanted[0])


@pytest.mark.parametrize("name", ["qwen3_next", "llama4", "diffllama", "gptj", "gemma3n", "deepseek"])
def test_models_that_batching_cannot_serve_are_refused(tiny, loaded, name):
    with pytest.raises(UnsupportedError):
        Engine(tiny.build(name), loaded[1], EngineSettings(max_kv_bytes=8 << 20))
