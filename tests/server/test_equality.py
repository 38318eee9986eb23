"""What a request gets does not depend on what else is served, on preemption, or on the prefix cache."""

from itertools import count, pairwise

import pytest
import torch
from engine_runs import finished, request, run, run_one

import tqai.cache.balance
from tqai.config import CacheConfig
from tqai.integrations.transformers import TurboQuantCache

MEASURED = {"sink_tokens": 4, "residual_window": 70, "offsets": "on", "balance": "auto"}
"""As the named presets have it, with a window that fits short prompts."""
TRELLIS = CacheConfig(codec="trellis", bits_k=3, bits_v=2, last_layer_bits=(4, 4), **MEASURED)
LENGTHS = (1, 5, 63, 64, 65, 100, 128, 129, 200, 255, 256, 257, 300, 320, 400, 513)


@pytest.fixture
def balanced(monkeypatch):
    """Every head's keys are balanced, whether that gains much or little."""
    monkeypatch.setattr(tqai.cache.balance, "MOST_LEFT", 2.0)


def requests_of(document_ids, number, new_tokens=(8, 10)):
    """Half of them greedy, half seeded; every third one begins like the others of these."""
    wanted = []
    for index in range(number):
        start, length = 37 * index if index % 3 else 0, LENGTHS[index % len(LENGTHS)]
        tokens = new_tokens[index // len(LENGTHS) % 2]
        sampling = {} if index % 2 == 0 else {"temperature": 1.0, "seed": index, "top_p": 0.9}
        wanted.append(request(document_ids[start : start + length], max_tokens=tokens, **sampling))
    return wanted


def test_32_concurrent_requests_get_what_each_gets_alone(make_engine, document_ids):
    """Also when prefixes are found, and when now and then a request loses its pages."""
    wanted = requests_of(document_ids, 32)
    with make_engine(max_running=32, chunk_tokens=128) as engine:
        together = run(engine, wanted)
        counters = engine.scheduler.counters
        assert counters.decode_steps < sum(w.params.max_tokens for w in wanted) / 4
        assert counters.prefix_hit_tokens > 500 and counters.preemptions == 0
        assert all(finished(outcome) for outcome in together)
        disturb(engine.scheduler)
        disturbed = run(engine, wanted)
        assert counters.preemptions > 5 and counters.replayed_tokens > 5
    with make_engine(max_running=32, chunk_tokens=128, prefix_caching=False) as engine:
        for wish, outcome, other in zip(wanted, together, disturbed, strict=True):
            assert run_one(engine, wish).tokens == outcome.tokens == other.tokens, len(wish.prompt)


@pytest.mark.parametrize(
    "cache",
    [TRELLIS, CacheConfig(backend="torch", offsets="on", balance="auto")],
    ids=["as presets", "offsets alone"],
)
def test_offsets_and_windows_are_a_request_s_own(make_engine, document_ids, balanced, cache):
    """Found prefixes, preemption and slots that change hands; prompts from other places, whose offsets are
    others. Some freeze theirs in a chunk, some while they decode."""
    wanted = requests_of(document_ids, 16, new_tokens=(6, 6))[1::2]
    wanted += [request(document_ids[:490], max_tokens=3), request(document_ids[900:1000], max_tokens=50)]
    with make_engine(cache=cache, max_running=10, chunk_tokens=128) as engine:
        run(engine, wanted[6:8])
        disturb(engine.scheduler)
        disturbed = run(engine, wanted)
        counters = engine.scheduler.counters
        assert counters.preemptions > 5 and counters.prefix_hit_tokens > 500
        assert any(state.keys.any() and (state.factors != 1).any() for state in engine.store.offsets)
    with make_engine(cache=cache, max_running=10, chunk_tokens=128, prefix_caching=False) as engine:
        for wish, outcome in zip(wanted, disturbed, strict=True):
            assert run_one(engine, wish).tokens == outcome.tokens, len(wish.prompt)


def disturb(scheduler):
    """Preempt ten requests, in prefill or decode, one at every fourth step."""
    pages_for_step, steps = scheduler._pages_for_step, count()

    def disturbed():
        step, active = next(steps), scheduler._active()
        if step % 4 == 3 and step < 40 and len(active) > 1:
            scheduler._preempt(active[step % len(active)])
        return pages_for_step()

    scheduler._pages_for_step = disturbed


@pytest.mark.parametrize(
    "cache",
    [
        None,
        CacheConfig(sink_tokens=3, residual_window=70),
        CacheConfig(sink_tokens=4),
        CacheConfig(backend="torch"),
        CacheConfig.preset("balanced"),
    ],
    ids=["uncompressed", "window", "sinks", "torch", "balanced"],
)
def test_other_caches_agree_too(make_engine, document_ids, cache):
    wanted = [request(document_ids[n : n + n], max_tokens=6) for n in (2, 64, 68, 300)]
    with make_engine(cache=cache) as engine:
        together = run(engine, wanted)
        alone = [run_one(engine, wish) for wish in wanted]
    assert [outcome.tokens for outcome in together] == [outcome.tokens for outcome in alone]


def test_preempted_requests_continue_as_if_nothing_had_happened(make_engine, document_ids):
    wanted = [
        request(document_ids[300 * n : 300 * n + 50 + 2 * n], max_tokens=20, temperature=float(n % 2), seed=n)
        for n in range(5)
    ]
    with make_engine(pages=100) as engine:
        undisturbed = run(engine, wanted)
        assert engine.scheduler.counters.preemptions == 0
    with make_engine(pages=3) as engine:
        preempted = run(engine, wanted)
        assert engine.scheduler.counters.preemptions > 0
        assert engine.scheduler.counters.replayed_tokens > 0
    assert [outcome.tokens for outcome in preempted] == [outcome.tokens for outcome in undisturbed]
    assert all(finished(outcome) for outcome in preempted)


PREFIXES = {
    "plain": (CacheConfig(), [0, 512, 512, 512]),
    "sinks": (CacheConfig(sink_tokens=4), [0, 516, 516, 516]),
    # the state after the first chunk is kept when a prompt differs after it
    "window": (CacheConfig(residual_window=70), [0, 582, 0, 326]),
    "as presets": (TRELLIS, [0, 586, 0, 330]),
    "offsets": (CacheConfig(offsets="on", balance="auto"), [0, 512, 512, 512]),
    "uncompressed": (None, [0, 512, 512, 512]),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_cached_prefix_changes_no_number(make_engine, document_ids, balanced, name):
    cache, expected = PREFIXES[name]
    other = document_ids[1000:1100]
    prompts = [document_ids[:600], document_ids[:600], document_ids[:550] + other, document_ids[:540] + other]
    wanted = [request(prompt, max_tokens=4, logprobs=3) for prompt in prompts]
    with make_engine(cache=cache) as engine:
        outcomes = [run_one(engine, wish) for wish in wanted]
        assert [outcome.end.cached_tokens for outcome in outcomes] == expected
    with make_engine(cache=cache, prefix_caching=False) as engine:
        fresh = [run_one(engine, wish) for wish in wanted]
        assert [outcome.end.cached_tokens for outcome in fresh] == [0, 0, 0, 0]
    assert [outcome.chosen for outcome in outcomes] == [outcome.chosen for outcome in fresh]


def test_whole_prompt_in_the_cache_leaves_a_chunk_to_compute(make_engine, document_ids):
    with make_engine() as engine:
        first, second = (run_one(engine, request(document_ids[:512], max_tokens=4)) for _ in range(2))
        assert (first.end.cached_tokens, second.end.cached_tokens) == (0, 256)
        assert first.tokens == second.tokens


def test_prefixes_are_evicted_for_requests_and_least_recently_used_first(make_engine, document_ids):
    with make_engine(pages=12) as engine:
        old, kept = document_ids[:300], document_ids[1000:1300]
        for prompt in (old, kept, old, kept):
            run_one(engine, request(prompt, max_tokens=2))
        assert engine.figures().cached_pages == 8
        run_one(engine, request(document_ids[2000:2500], max_tokens=2))
        assert run_one(engine, request(kept, max_tokens=2)).end.cached_tokens == 256
        assert run_one(engine, request(old, max_tokens=2)).end.cached_tokens == 0


def test_uncompressed_pages_give_the_model_s_own_greedy_tokens(make_engine, loaded, document_ids):
    model, _ = loaded
    prompt = document_ids[:330]
    with make_engine(cache=None) as engine:
        served = run_one(engine, request(prompt, max_tokens=12)).tokens
    with torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert served == out[0, 330:].tolist()


@pytest.mark.parametrize("prompt_tokens", [316, 100])
@pytest.mark.parametrize(
    "config",
    [
        CacheConfig(backend="torch"),
        CacheConfig(sink_tokens=3, residual_window=70, backend="torch"),
        CacheConfig(**MEASURED),
        CacheConfig(bits_k=3, bits_v=3, sink_tokens=2, offsets="on", backend="torch"),
    ],
    ids=["plain", "window", "as presets", "offsets"],
)
def test_tokens_see_what_the_cache_of_one_sequence_shows_them(
    make_engine, loaded, document_ids, balanced, config, prompt_tokens
):
    """Log-probabilities of a prompt and more tokens, among which a page is completed, the first of all in
    one case: those of a `TurboQuantCache` that is fed the prompt 64 tokens at a time and the rest one by
    one. (On torch where that is fast enough: a kernel's error of 1e-3 can move a log-probability by 0.05.)
    The engine freezes offsets from whole chunks, so they are of 64 tokens here. Where the first page
    comes while it decodes it balances by the prompt's queries, the cache by that token's."""
    model, _ = loaded
    if prompt_tokens == 100:
        config = config.with_changes(balance="off")
    prompt, new = document_ids[:prompt_tokens], 16 if prompt_tokens == 316 else 50
    stop_at = prompt_tokens + new
    with make_engine(cache=config, chunk_tokens=64) as engine:
        wish = request(prompt, max_tokens=new, logprobs=0, ignore_eos=True)
        chosen = run_one(engine, wish).chosen
    cache = TurboQuantCache(model, config=config)
    tokens = prompt + [item.token for item in chosen]
    first = config.sink_tokens + config.window_tokens
    starts = [*([0] if first else []), *range(first, prompt_tokens, 64), *range(prompt_tokens, stop_at)]
    compared = 0
    with torch.inference_mode():
        for start, stop in pairwise([*dict.fromkeys(starts), stop_at]):
            ids = torch.tensor([tokens[start:stop]])
            positions = torch.arange(start, stop)[None]
            logits = model(ids, position_ids=positions, past_key_values=cache).logits[0, -1]
            if prompt_tokens <= stop < stop_at:
                found = float(torch.log_softmax(logits, -1)[tokens[stop]])
                tolerance = 5e-4 if config.backend == "torch" else 5e-3
                assert abs(found - chosen[stop - prompt_tokens].logprob) < tolerance, stop
                compared += 1
    assert compared == new
    for asked, part in ((config.offsets, 0), (config.balance, 2)):
        assert asked == "off" or cache.layers[1].store.offsets.parts()[part] is not None


@pytest.mark.parametrize("threads", [2])
def test_several_threads_change_nothing(make_engine, document_ids, threads):
    wanted = [request(document_ids[n : 2 * n], max_tokens=6) for n in (3, 64, 200)]
    with make_engine() as engine:
        alone = [run_one(engine, wish).tokens for wish in wanted]
    with make_engine(torch_threads=threads) as engine:
        together = [outcome.tokens for outcome in run(engine, wanted)]
        assert together == [run_one(engine, wish).tokens for wish in wanted]
    assert together == alone
