"""mlx-lm's own entry points with compressed caches, on the embedded model, and beside torch."""

from __future__ import annotations

import json
import threading
import urllib.request
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from mlx_lm import server
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

import tqai
from tqai import demo
from tqai.config import CacheConfig
from tqai.demo.retrieval import document
from tqai.errors import (
    CorruptFileError,
    FileVersionError,
    ModelMismatchError,
    UnsupportedError,
)
from tqai.integrations.mlx_lm import (
    TurboQuantBatchKVCache,
    TurboQuantKVCache,
    load_cache,
    save_cache,
)
from tqai.integrations.mlx_lm.serving import compressed_models

PROMPT_TOKENS, NEW_TOKENS, CONTINUED_TOKENS = 100, 64, 32
STEP = {"prefill_step_size": 48}
SETTINGS = {"bits_k": 4, "bits_v": 2, "sink_tokens": 4}


@pytest.fixture(scope="module")
def embedded():
    """The embedded model in mlx-lm, float32, and its tokenizer."""
    model, tokenizer = mlx_lm.load(str(demo.model_path()))
    model.set_dtype(mx.float32)
    return model, tokenizer


@pytest.fixture(scope="module")
def torch_model():
    return demo.load(torch.float32)[0]


@pytest.fixture
def patched(embedded):
    """The embedded model, patched with SETTINGS for one test."""
    tqai.patch(embedded[0], **SETTINGS)
    yield embedded[0]
    tqai.unpatch(embedded[0])


@pytest.fixture
def small(tiny):
    """A random model of two layers, patched with SETTINGS."""
    model = tiny("llama")
    tqai.patch(model, **SETTINGS)
    return model


@pytest.fixture
def words(ids):
    return ids(1, PROMPT_TOKENS)


@pytest.fixture(scope="module")
def prompt(embedded):
    return embedded[1].encode(document()[:3000])[:PROMPT_TOKENS]


@pytest.fixture(scope="module")
def by_torch(torch_model, prompt, tmp_path_factory):
    """Greedy tokens of the torch path, and a file with its cache after the prompt."""
    cache = tqai.patch(torch_model, backend="torch", **SETTINGS)
    path = tmp_path_factory.mktemp("saved") / "by_torch.safetensors"
    with torch.inference_mode():
        torch_model(torch.tensor([prompt[:-1]]), past_key_values=cache)
        cache.save(path, torch_model)
        ids, given = [], prompt[-1:]
        for _ in range(NEW_TOKENS):
            given = [int(torch_model(torch.tensor([given]), past_key_values=cache).logits[0, -1].argmax())]
            ids += given
    tqai.unpatch(torch_model)
    return ids, path


def generated(model, ids, count=NEW_TOKENS, **settings):
    return [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=count, **settings)]


def test_tokens_are_those_of_the_torch_path(patched, prompt, by_torch):
    assert generated(patched, prompt) == by_torch[0]


def test_cache_saved_by_torch_goes_on_here(patched, prompt, by_torch):
    wanted, path = by_torch
    cache = load_cache(path, patched)
    assert cache[0].store.counts == [1]
    assert generated(patched, prompt[-1:], CONTINUED_TOKENS, prompt_cache=cache) == wanted[:CONTINUED_TOKENS]


def test_cache_saved_here_goes_on_in_torch(patched, torch_model, prompt, by_torch, tmp_path):
    cache = tqai.patch(patched, **SETTINGS)
    patched(mx.array([prompt[:-1]]), cache=cache)
    cache.save(tmp_path / "here.safetensors")
    tqai.patch(torch_model, backend="torch", **SETTINGS)
    loaded = tqai.TurboQuantCache.load(tmp_path / "here.safetensors", torch_model)
    ids, given = [], prompt[-1:]
    with torch.inference_mode():
        for _ in range(CONTINUED_TOKENS):
            given = [int(torch_model(torch.tensor([given]), past_key_values=loaded).logits[0, -1].argmax())]
            ids += given
    tqai.unpatch(torch_model)
    assert ids == by_torch[0][:CONTINUED_TOKENS]


def test_saved_caches_are_refused_where_they_do_not_belong(patched, by_torch, tmp_path, tiny):
    path = by_torch[1]
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "none.safetensors")
    with pytest.raises(ModelMismatchError, match="6 layers, the model has 2"):
        load_cache(path, tiny("llama"))
    own = tmp_path / "own.safetensors"
    save_cache(own, load_cache(path), patched)
    assert load_cache(own, patched)[0].store.seen == [PROMPT_TOKENS - 1]
    other = mlx_lm.load(str(demo.model_path()))[0]
    with pytest.raises(ModelMismatchError, match="its weights differ"):
        load_cache(own, other)
    data = bytearray(own.read_bytes())
    rng = np.random.default_rng(0)
    for at in rng.integers(8, len(data), 12):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises((CorruptFileError, FileVersionError)):
            load_cache(tmp_path / "damaged")
    (tmp_path / "short").write_bytes(data[:-5])
    with pytest.raises(CorruptFileError):
        load_cache(tmp_path / "short")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["damaged", "own.safetensors", "short"]


def test_batches_and_foreign_caches_are_not_saved(tmp_path, vectors):
    batch = TurboQuantBatchKVCache([0, 0])
    with pytest.raises(UnsupportedError, match="layer 0 is a TurboQuantBatchKVCache"):
        save_cache(tmp_path / "x", [batch])
    assert not list(tmp_path.iterdir())


def test_prompt_caches_of_mlx_lm_save_and_load(small, words, tmp_path):
    cache = make_prompt_cache(small)
    wanted = generated(small, words, 8, prompt_cache=cache)
    again = make_prompt_cache(small)
    small(mx.array([words[:-1]]), cache=again)
    save_prompt_cache(str(tmp_path / "c.safetensors"), again, {"model": "demo"})
    loaded, about = load_prompt_cache(str(tmp_path / "c.safetensors"), return_metadata=True)
    assert about == {"model": "demo"}
    assert [type(x) for x in loaded] == [TurboQuantKVCache] * 2
    assert loaded[0].meta_state == again[0].meta_state
    assert loaded[0].nbytes == again[0].nbytes
    assert generated(small, words[-1:], 8, prompt_cache=loaded) == wanted
    batch = again[0].merge([again[0], TurboQuantKVCache(again[0].store.config)])
    save_prompt_cache(str(tmp_path / "b.safetensors"), [batch])
    (back,) = load_prompt_cache(str(tmp_path / "b.safetensors"))
    assert (back.offset.tolist(), back.nbytes) == ([PROMPT_TOKENS - 1, 0], batch.nbytes)


def test_trimming_a_prompt_cache_goes_back_in_time(small, words):
    cache = make_prompt_cache(small)
    small(mx.array([words]), cache=cache)
    assert all(layer.is_trimmable() for layer in cache)
    assert [layer.trim(10) for layer in cache] == [10] * 2
    assert cache[0].offset == PROMPT_TOKENS - 10
    wanted = small(mx.array([words[-10:]]), cache=cache)
    fresh = make_prompt_cache(small)
    small(mx.array([words[:-10]]), cache=fresh)
    np.testing.assert_allclose(
        np.array(small(mx.array([words[-10:]]), cache=fresh)), np.array(wanted), atol=2e-3
    )


def test_generate_and_stream_generate_use_the_compressed_cache(patched, embedded, prompt, monkeypatch):
    made = []
    original = patched.make_cache
    monkeypatch.setattr(patched, "make_cache", lambda: made.append(original()) or made[-1])
    tokenizer = embedded[1]
    text = mlx_lm.generate(patched, tokenizer, prompt[:70], max_tokens=4)
    streamed = [part.token for part in mlx_lm.stream_generate(patched, tokenizer, prompt[:70], max_tokens=4)]
    assert text.strip() == tokenizer.decode(streamed).strip()
    assert len(made) == 2
    assert all(isinstance(layer, TurboQuantKVCache) and layer.store.counts == [1] for layer in made[0])


def test_kv_bits_of_mlx_lm_leave_the_compressed_cache_alone(small, words):
    cache = make_prompt_cache(small)
    settings = {"prompt_cache": cache, "kv_bits": 4, "quantized_kv_start": 0}
    assert generated(small, words, 4, **settings) == generated(small, words, 4)
    assert [type(layer) for layer in cache] == [TurboQuantKVCache] * 2


def test_batches_generate_what_single_sequences_do(small, words):
    """Different lengths, prompts of several pieces, sequences that end early; caches are handed back."""
    prompts = [words[:70], words[20:33], words[:98]]
    counts = [3, 9, 12]
    # the same steps: what a step has compressed is what the next one sees
    singles = [generated(small, ids, count, **STEP) for ids, count in zip(prompts, counts, strict=True)]
    generator = BatchGenerator(small, prefill_batch_size=2, completion_batch_size=3, **STEP)
    uids = generator.insert(prompts, counts)
    found, caches = {uid: [] for uid in uids}, {}
    while len(caches) < 3:
        for response in generator.next()[1]:
            found[response.uid].append(response.token)
            if response.finish_reason is not None:
                caches[response.uid] = response.prompt_cache
    assert [found[uid] for uid in uids] == singles
    generator.close() if hasattr(generator, "close") else None
    for uid, ids, count in zip(uids, prompts, counts, strict=True):
        layer = caches[uid][0]
        assert type(layer) is TurboQuantKVCache
        assert layer.offset in (len(ids) + count - 1, len(ids) + count)
    continued = generated(small, [5], 6, prompt_cache=caches[uids[2]])
    assert len(continued) == 6


def test_batch_generate_returns_compressed_caches(patched, embedded, prompt):
    response = mlx_lm.batch_generate(
        patched, embedded[1], [prompt[:66], prompt[:5]], max_tokens=3, return_prompt_caches=True
    )
    assert [type(caches[0]) for caches in response.caches] == [TurboQuantKVCache] * 2
    wanted = embedded[1].decode(generated(patched, prompt[:66], 3))
    assert response.texts[0] == wanted


def test_speculative_decoding_gives_the_same_tokens(small, words):
    """The draft model is the model itself; caches are trimmed whenever a token is refused."""
    steps = speculative_generate_step(mx.array(words), small, small, num_draft_tokens=3, max_tokens=12)
    tokens = [int(token) for token, *_ in steps]
    agreeing = np.mean([a == b for a, b in zip(tokens, generated(small, words, 12), strict=True)])
    assert agreeing == 1.0


def test_left_padded_batch_is_as_its_sequences_alone(small, words):
    short, long = words[:68], words[:75]
    caches = [
        TurboQuantBatchKVCache([7, 0], layer.store.config, layer.modules) for layer in small.make_cache()
    ]
    tokens = mx.array([[0] * 7 + short, long])
    logits = small(tokens, cache=caches)[:, -1]
    assert caches[0].offset.tolist() == [68, 75]
    assert caches[0].store.counts == [1, 1]
    for row, ids in enumerate((short, long)):
        alone = small(mx.array([ids]), cache=small.make_cache())[:, -1]
        np.testing.assert_allclose(np.array(logits[row]), np.array(alone[0]), atol=2e-3)
    caches[0].filter([1])
    assert caches[0].offset.tolist() == [75]
    with pytest.raises(ValueError, match="empty cache"):
        caches[1].prepare(left_padding=[1, 1])
    other = caches[1].extract(0)
    other.store.config = CacheConfig(bits_k=3)
    with pytest.raises(ValueError, match="different settings"):
        TurboQuantBatchKVCache.merge([caches[1].extract(1), other])


@pytest.mark.filterwarnings("ignore:mlx_lm.server is not recommended")
def test_server_answers_from_compressed_caches(prompt, embedded, monkeypatch):
    """mlx_lm.server itself, over HTTP; asked twice, the second time from its prompt cache."""
    monkeypatch.setattr(
        "sys.argv", ["mlx_lm.server", "--model", str(demo.model_path()), "--max-tokens", "5", "--port", "0"]
    )
    made = {}

    class Server(ThreadingHTTPServer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made["server"] = self
            ready.set()

    class Provider(server.ModelProvider):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made["provider"] = self

    class Generator(server.ResponseGenerator):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made["generator"] = self

    ready = threading.Event()
    monkeypatch.setattr(server, "ResponseGenerator", Generator)
    monkeypatch.setattr(server.run, "__defaults__", (Server, server.APIHandler))
    monkeypatch.setattr(server._run_http_server, "__defaults__", (Server, server.APIHandler))
    monkeypatch.setattr(server, "ModelProvider", Provider)
    text = embedded[1].decode(prompt[:80])

    def ask():
        body = json.dumps({"prompt": text, "max_tokens": 5, "temperature": 0}).encode()
        url = f"http://127.0.0.1:{made['server'].server_address[1]}/v1/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=90) as answer:
            return json.loads(answer.read())

    with compressed_models(CacheConfig(**SETTINGS)):
        thread = threading.Thread(target=server.main, daemon=True)
        thread.start()
        assert ready.wait(90)
        first, second = ask(), ask()
        model = made["provider"].model
        made["server"].shutdown()
        thread.join(90)
        made["server"].server_close()
        made["generator"].stop_and_join()
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 64
    assert isinstance(model.make_cache()[0], TurboQuantKVCache)
    assert model.make_cache()[0].store.config.sink_tokens == 4
    tqai.unpatch(model)


def test_serving_takes_its_own_options_and_leaves_the_others(monkeypatch):
    from tqai.integrations.mlx_lm import serving

    seen = SimpleNamespace()

    def main():
        import sys

        seen.arguments, seen.load = sys.argv[1:], server.ModelProvider.load

    monkeypatch.setattr(server, "main", main)
    monkeypatch.setattr("sys.argv", ["x"])
    own = server.ModelProvider.load
    serving.main(["--bits-v", "3", "--model", "here", "--port", "8"])
    assert seen.arguments == ["--model", "here", "--port", "8"]
    assert seen.load is not own
    assert server.ModelProvider.load is own


def test_retrieval_in_a_short_document(embedded):
    """benchmarks/mlx_caches.py asks 50 questions at 4096 tokens; here one, in 240."""
    model, tokenizer = embedded
    made = demo.make_prompt(tokenizer, 240, seed=3)
    cache = tqai.patch(model, bits_k=4, bits_v=4)
    try:
        ids = tokenizer.encode(made.prompt(0))
        answer = tokenizer.decode(generated(model, ids, 8, prompt_cache=cache))
        assert demo.is_correct(answer, made.answers[0])
    finally:
        tqai.unpatch(model)
