"""Parts of the engine by themselves: sampling, stop strings, text, tools, pages, prefixes, settings."""

import itertools
import json
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from tqai.config import CacheConfig
from tqai.core.page import PAGE_TOKENS
from tqai.errors import ConfigError
from tqai.server.api.tools import FORMATS, ToolReader, tool_format_of
from tqai.server.engine.kinds import PageKind, kinds_of, pool_sizes
from tqai.server.engine.model import LayerShape
from tqai.server.engine.page_codes import ExactPages, PageTable, page_codes_for
from tqai.server.engine.page_table import HeldPages
from tqai.server.engine.pages import PagePool
from tqai.server.engine.prefix import Chunk, Found, PrefixCache
from tqai.server.engine.sampling import Sampler, SamplingParams
from tqai.server.engine.settings import EngineSettings
from tqai.server.engine.snapshots import Snapshot
from tqai.server.engine.text import Detokenizer, StopStrings

LOGITS = torch.tensor([0.0, math.log(2), math.log(3), math.log(4)])  # 0.1, 0.2, 0.3, 0.4


def draws(count=4000, logits=LOGITS, **params):
    """Share of each token among `count` draws."""
    sampler = Sampler(SamplingParams(seed=1, **params), [], 0)
    found = torch.zeros(len(logits))
    for _ in range(count):
        found[sampler.choose(logits).token] += 1
    return (found / count).tolist()


@pytest.mark.parametrize(
    ("params", "shares"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.7}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.71}, [0, 2 / 9, 3 / 9, 4 / 9]),
        ({"min_p": 0.6}, [0, 0, 3 / 7, 4 / 7]),
        ({"logit_bias": {0: math.log(4), 3: -100.0}}, [4 / 9, 2 / 9, 3 / 9, 0]),
        ({"temperature": 0.0}, [0, 0, 0, 1]),
        ({"temperature": 1e-155}, [0, 0, 0, 1]),
        ({"temperature": 5e-324, "logit_bias": {1: 5.0}}, [0, 1, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(params, shares):
    for found, share in zip(draws(**params), shares, strict=True):
        assert abs(found - share) < 4 * math.sqrt(max(share * (1 - share), 0) / 4000) + 1e-9


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1.0])
def test_what_a_constraint_forbids_is_never_drawn(temperature):
    allowed = torch.tensor([True, False, True, False])
    sampler = Sampler(SamplingParams(seed=1, temperature=temperature), [], 0)
    found = {sampler.choose(LOGITS, allowed).token for _ in range(50)}
    assert found == ({0, 2} if temperature == 1.0 else {2})


def test_penalties():
    logits = torch.tensor([3.0, 2.5, -1.0])
    assert Sampler(SamplingParams(temperature=0, repetition_penalty=1.5), [0], 0).choose(logits).token == 1
    sampler = Sampler(SamplingParams(temperature=0, frequency_penalty=0.3), [0, 0, 0], 0)
    assert [sampler.choose(logits).token for _ in range(4)] == [0, 0, 1, 0]
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=0.6), [], 0)
    assert [sampler.choose(logits).token for _ in range(3)] == [0, 1, 0]
    negative = torch.tensor([-1.0, -1.2])
    assert Sampler(SamplingParams(temperature=0, repetition_penalty=1.5), [0], 0).choose(negative).token == 1


def test_seed_and_choice_tell_draws_apart_and_logprobs_are_of_the_raw_logits():
    def tokens(seed, choice):
        sampler = Sampler(SamplingParams(seed=seed), [], 0, choice)
        return [sampler.choose(LOGITS).token for _ in range(40)]

    assert tokens(1, 0) == tokens(1, 0)
    assert len({tuple(tokens(seed, choice)) for seed in (1, 2) for choice in (0, 1)}) == 4
    chosen = Sampler(SamplingParams(temperature=0.1, logprobs=2, seed=0), [], 0).choose(LOGITS)
    assert [token for token, _ in chosen.top] == [3, 2]
    assert math.isclose(chosen.top[0][1], math.log(0.4), abs_tol=1e-6)


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "max_tokens"])
def test_parameters_out_of_range(field):
    with pytest.raises(ConfigError, match=field):
        SamplingParams(**{field: -3})


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3),
    st.data(),
)
def test_stop_strings_cut_where_the_whole_text_would_be_cut(text, stops, data):
    stop = StopStrings(tuple(stops))
    shown, found, rest = "", False, text
    while rest and not found:
        size = data.draw(st.integers(1, len(rest)))
        piece, rest = rest[:size], rest[size:]
        more, found = stop.add(piece)
        shown += more
    if not found:
        shown += stop.rest()
    seen = text[: len(text) - len(rest)]
    places = [seen.find(item) for item in stops if item in seen]
    assert found == bool(places)
    assert shown == (seen[: min(places)] if places else text)


def test_text_comes_in_whole_characters(loaded):
    tokenizer = loaded[1]
    text = "naïve café — 日本語 🙂 done"
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer, [])
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) + detokenizer.rest() == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
@given(cut=st.lists(st.integers(0, 120), max_size=6))
def test_tool_calls_are_read_however_the_text_is_cut(known, cut):
    call = {"name": "f", known.arguments: {"x": [1, "<"]}}
    body = json.dumps([call] if known.is_list else call)
    before = "Let me see. " if known.start else ""
    text = f"{before}{known.start}{body}{known.end}"
    reader, shown = ToolReader(known), ""
    places = sorted({0, *(place for place in cut if place < len(text)), len(text)})
    for start, stop in itertools.pairwise(places):
        shown += reader.add(text[start:stop])
    rest, calls = reader.rest()
    assert shown + rest == before
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("f", {"x": [1, "<"]})]
    assert known.read(text) == (before.strip(), calls)


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_text_that_is_no_call_stays_text(known):
    for text in (
        "Nothing to call.",
        f"{known.start}broken{known.end}",
        f'{known.start}{{"x": 1}}{known.end}',
        "<tool",
        "",
    ):
        reader = ToolReader(known)
        shown = "".join(reader.add(letter) for letter in text)
        rest, calls = reader.rest()
        assert (shown + rest, calls) == (text, [])
        assert known.read(text) is None


def test_formats_are_told_by_the_template():
    assert tool_format_of("{{ tools }} <tool_call>").name == "hermes"
    assert tool_format_of("{{ tools }} [TOOL_CALLS]").name == "mistral"
    assert tool_format_of('<|start_header_id|> {{ tools }} {"name": x, "parameters": y}').name == "llama3"
    assert tool_format_of("{{ messages }}") is None and tool_format_of(None) is None


SHAPE = LayerShape(2, 64, 96, None)


def pool_of(pages):
    codes = page_codes_for(CacheConfig(), SHAPE, torch.float32, torch.device("cpu"))
    return PagePool([codes], (SHAPE,), pages, torch.device("cpu"))


@given(st.lists(st.tuples(st.sampled_from(["take", "hold", "release"]), st.integers(0, 30)), max_size=40))
def test_pages_are_free_exactly_when_nobody_holds_them(steps):
    pool = pool_of(7)
    holds: list[list[int]] = []
    for action, number in steps:
        if action == "take" and pool.free >= number % 4:
            holds.append(pool.take(number % 4))
        elif action == "hold" and holds:
            pages = holds[number % len(holds)]
            pool.hold(pages)
            holds.append(list(pages))
        elif action == "release" and holds:
            pool.release(holds.pop(number % len(holds)))
        held = [page for pages in holds for page in pages]
        assert pool.used == len(set(held)) and pool.free == 7 - pool.used
        assert pool.references == [held.count(page) for page in range(7)]


def test_misuse_of_pages_is_found():
    pool = pool_of(2)
    with pytest.raises(RuntimeError, match="3 pages wanted"):
        pool.take(3)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(RuntimeError, match="more often"):
        pool.release(pages)
    with pytest.raises(RuntimeError, match="free"):
        pool.hold(pages)


def chunks_of(cache, tokens, pages):
    """Chunks of two pages for `PrefixCache.add`."""
    keys = cache.keys(tokens, len(tokens))
    size = cache.chunk_tokens // PAGE_TOKENS
    return [Chunk(key, pages[size * n : size * (n + 1)]) for n, key in enumerate(keys)]


def test_a_prefix_is_its_tokens_and_all_before_them():
    pool = pool_of(20)
    cache = PrefixCache([pool], 2, 2 * PAGE_TOKENS, "K4/V2")
    tokens = list(range(2 + 4 * PAGE_TOKENS))
    pages = pool.take(4)
    cache.add(chunks_of(cache, tokens, pages))
    assert cache.find(tokens).pages == pages[:2]  # one token at least is left to compute
    assert cache.find([*tokens, 5]).pages == pages
    assert cache.find([*tokens[:200], 9999, *tokens[201:], 5]).pages == pages[:2]
    assert cache.find([7, *tokens[1:], 5]) == Found()
    assert cache.find(tokens[: 2 + 2 * PAGE_TOKENS]) == Found()
    assert PrefixCache([pool], 2, 2 * PAGE_TOKENS, "K3/V2").find(tokens) == Found()
    for held in (pages[:2], pages, pages[:2], pages):
        pool.release(held)
    assert cache.pages == cache.evictable() == 4
    assert cache.evict(1) == 2 and cache.find([*tokens, 5]).pages == pages[:2], "the later chunk goes first"


def test_a_prefix_s_chunk_belongs_to_the_chunks_before_it_and_use_keeps_it():
    pool = pool_of(8)
    cache = PrefixCache([pool], 0, PAGE_TOKENS, "K4/V2")
    a, b, c, d = ([n] * PAGE_TOKENS for n in (1, 2, 3, 4))
    for tokens in (a + b, c + d):
        pages = pool.take(2)
        cache.add(chunks_of(cache, tokens, pages))
        pool.release(pages)
    mixed = cache.find([*c, *b, 5]).pages
    assert mixed == cache.find([*c, 5]).pages and len(mixed) == 1, "b after c is another prefix"
    used = cache.find([*a, *b, 5]).pages
    for held in (mixed, mixed, used):
        pool.release(held)
    assert cache.evict(2) == 2
    assert cache.find([*a, *b, 5]).pages == used, "what was used last stays"


def test_a_prefix_goes_on_from_where_its_state_was_kept():
    pool, sliding = pool_of(12), pool_of(6)
    cache = PrefixCache([pool, sliding], 0, PAGE_TOKENS, "K4/V2", needs_state=True)
    tokens = list(range(3 * PAGE_TOKENS))
    pages, window, stored = pool.take(3), sliding.take(2), pool.take(1)
    chunks = chunks_of(cache, tokens, pages)
    chunks[1].snapshot = Snapshot([stored, []], [None, HeldPages([0, *window], 1)])
    cache.add(chunks)
    pool.release(pages)
    assert chunks[1].snapshot is None, "its pages are the cache's now"
    assert cache.pages == 4 and cache.evictable(0) == 4 and cache.evictable(1) == 2
    found = cache.find([*tokens, 5])
    assert (found.chunks, found.known, found.pages) == (2, 3, pages[:2])
    assert pool.references[stored[0]] == 2 and [sliding.references[page] for page in window] == [2, 2]
    assert cache.evictable(0) == 1 and cache.evictable(1) == 0
    assert cache.find(tokens[:65]) == Found(0, 1, [], None)
    for held, free in ((found.pages, pool), (stored, pool), (window, sliding)):
        free.release(held)
    assert cache.evict(1, 1) == 2 and cache.find([*tokens, 5]) == Found(0, 1, [], None)
    cache.clear()
    assert pool.free == 12 and sliding.free == 6


KINDS = [
    PageKind(None, (0, 2), 100, (4, 70)),
    PageKind(256, (1,), 50, (4, 70)),
]


def test_pages_that_no_token_sees_are_counted():
    """Against a search through all tokens: page k is sinks + 64 k to sinks + 64 k + 63."""
    for window, sinks in ((1, 0), (64, 0), (96, 3), (256, 4)):
        kind = PageKind(window, (0,), 1, (sinks, 0))
        for position in range(600):
            seen = [max(t - sinks, 0) // 64 for t in range(max(position - window + 1, 0), position + 1)]
            assert kind.gone(position) == min(seen), (window, position)
    assert KINDS[0].gone(10**6) == 0
    assert KINDS[0].most_pages(4 + 70 + 64 * 9, 128) == 9
    assert [KINDS[1].most_pages(4 + 70 + 64 * n, 128) for n in (3, 100)] == [3, 2 + 2 + 2]


def test_a_sliding_kind_gets_no_more_pages_than_can_be_in_use():
    assert pool_sizes(KINDS, 150 * 7, None, 4, 128) == [7, 7]
    assert pool_sizes(KINDS, 10_000, None, 4, 128) == [(10_000 - 50 * 36) // 100, 2 * (4 * 4 + 2)]
    assert pool_sizes(KINDS, 10_000, 20, 4, 128) == [20, 20]
    assert pool_sizes(KINDS[:1], 10_050, None, 4, 128) == [100]
    with pytest.raises(ConfigError, match="takes 150 bytes"):
        pool_sizes(KINDS, 149, None, 4, 128)


def test_kinds_are_told_by_their_windows_those_that_see_farthest_first():
    shapes = [LayerShape(2, 64, 64, window) for window in (128, None, 512, 128)]
    found = kinds_of(shapes, [10, 20, 30, 40], (0, 0))
    assert [(kind.sliding_window, kind.layers, kind.page_bytes) for kind in found] == [
        (None, (1,), 40),
        (512, (2,), 60),
        (128, (0, 3), 100),
    ]


@pytest.mark.parametrize("dims", [(64, 96), (128, 128)])
def test_exact_pages_attend_as_plain_attention_does(dims):
    torch.manual_seed(0)
    shape = LayerShape(2, *dims, None)
    codes = ExactPages(shape, torch.float32)
    keys, values = torch.randn(3, 2, 64, dims[0]), torch.randn(3, 2, 64, dims[1])
    pool = PagePool([codes], (shape,), 5, torch.device("cpu"))
    ids = [4, 0, 2]
    pool.slabs[0].fill_(255)
    codes.store(keys, values, pool.slabs[0], torch.tensor(ids))
    table = PageTable([ids, ids[:1]], torch.device("cpu"))
    from tqai.backends.base import ExactTokens

    recent = ExactTokens(torch.randn(2, 2, 5, dims[0]), torch.randn(2, 2, 5, dims[1]))
    query = torch.randn(2, 4, 2, dims[0])
    found = codes.attend(query, pool.slabs[0], table, None, recent, None, 0.1, None).out
    for row, pages in enumerate((3, 1)):
        k = torch.cat([*keys[:pages].unbind(0), recent.keys[row]], dim=1).repeat_interleave(2, 0)
        v = torch.cat([*values[:pages].unbind(0), recent.values[row]], dim=1).repeat_interleave(2, 0)
        seen = torch.ones(2, k.shape[1], dtype=torch.bool).tril(k.shape[1] - 2)
        logits = (query[row] @ k.transpose(1, 2) * 0.1).masked_fill(~seen, -torch.inf)
        assert torch.allclose(found[row], logits.softmax(-1) @ v, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_running", 0),
        ("chunk_tokens", 100),
        ("chunk_tokens", 0),
        ("max_kv_bytes", -1),
        ("max_waiting", 1.5),
    ],
)
def test_engine_settings_out_of_range(field, value):
    with pytest.raises(ConfigError, match=field):
        EngineSettings(**{field: value})


def test_caches_that_the_engine_does_not_keep_are_refused():
    with pytest.raises(ConfigError, match="incremental"):
        EngineSettings(cache=CacheConfig(cache_strategy="incremental"))
    for field, value in (("compress_hidden", True), ("compress_ffn", True), ("bits_budget", 3.5)):
        with pytest.raises(ConfigError, match=field):
            EngineSettings(cache=CacheConfig(**{field: value}))
    mixed = EngineSettings(cache=CacheConfig(layer_bits=((4, 4), (2, 3))))
    assert mixed.cache_of(1).label == "K2/V3"
    with pytest.raises(ConfigError, match="2 layers"):
        mixed.cache_of(2)
