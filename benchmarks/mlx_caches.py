"""How good, how small and how fast are compressed caches in mlx-lm, on MLX's CPU device?

    python benchmarks/mlx_caches.py PART...    PART: retrieval kl memory speed (default: all four)
    python benchmarks/mlx_caches.py --quick    a smoke run of every part, writes nothing

Parts run one by one, each into its own entry of benchmarks/results/mlx.json:

    retrieval   50 six-digit codes hidden in documents of 4096 tokens, K4/V4, exact match; everything in
                MLX: prefill in chunks of 2048 as mlx_lm.generate does it, then greedy decoding
    kl          mean KL in chunks of 32 that read the cache back, here and with transformers and torch
    memory      bytes held at 8191 tokens, when the exact window is fullest: `nbytes`, and what MLX's
                allocator says
    speed       milliseconds per decoded token of the embedded model at 1024, 4096 and 8192 tokens, against
                KVCache and QuantizedKVCache (4 and 2 bits); caches hold random keys and values. Our caches'
                attention is first checked against float64 attention to what core decodes.

Exits with 1 if a gate fails. Retrieval takes about ten minutes: MLX multiplies matrices slowly on CPUs.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache
from provenance import ROOT, provenance

import tqai
from tqai import demo
from tqai.core.page import CanonicalPages, pages_from_bytes
from tqai.integrations.mlx_lm import TurboQuantKVCache
from tqai.integrations.mlx_lm.attention import attend_step

RESULT = ROOT / "benchmarks" / "results" / "mlx.json"
PREFILL_CHUNK = 2048
PRESETS = ("K4/V4", "K4/V2")
MAX_ERROR = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    arguments = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    passed = True
    for name in arguments.parts or list(PARTS):
        started = time.perf_counter()
        entry = PARTS[name](arguments.quick)
        entry["seconds"] = time.perf_counter() - started
        entry["provenance"] = {**provenance(), "mlx": version("mlx"), "mlx_lm": version("mlx-lm")}
        print(name, json.dumps({key: entry[key] for key in entry if key != "provenance"}, indent=1))
        passed &= bool(entry["passed"])
        result[name] = entry
        if not arguments.quick:
            RESULT.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    return 0 if passed else 1


def load(dtype: Any = None) -> tuple[Any, Any]:
    """The embedded model and its tokenizer, in mlx-lm; `dtype` None leaves the weights as stored."""
    model, tokenizer = mlx_lm.load(str(demo.model_path()))
    if dtype is not None:
        model.set_dtype(dtype)
    return model, tokenizer


def prefill(model: Any, ids: list[int], cache: Any) -> None:
    for start in range(0, len(ids), PREFILL_CHUNK):
        model(mx.array([ids[start : start + PREFILL_CHUNK]]), cache=cache)
        mx.eval([layer.state for layer in cache])


def greedy(model: Any, ids: list[int], cache: Any, count: int) -> list[int]:
    out, given = [], ids
    for _ in range(count):
        given = [int(model(mx.array([given]), cache=cache)[0, -1].argmax())]
        out += given
    return out


def retrieval(quick: bool) -> dict[str, Any]:
    documents, questions, tokens = (1, 2, 600) if quick else (5, 10, 4096)
    model, tokenizer = load()
    right, wrong = 0, []
    for seed in range(documents):
        prompt = demo.make_prompt(tokenizer, tokens, seed=100 + seed, n_facts=questions)
        text = tokenizer.encode(prompt.text)
        full = [tokenizer.encode(prompt.prompt(index)) for index in range(questions)]
        shared = next(
            i
            for i, column in enumerate(zip(text, *full, strict=False))
            if len(set(column)) > 1 or i + 1 == len(text)
        )
        cache = tqai.patch(model, bits_k=4, bits_v=4, backend="mlx")
        prefill(model, text[:shared], cache)
        for ids, answer in zip(full, prompt.answers, strict=True):
            found = tokenizer.decode(greedy(model, ids[shared:], copy.deepcopy(cache), 9))
            if demo.is_correct(found, answer):
                right += 1
            else:
                wrong.append({"seed": seed, "answer": answer, "found": found})
        print(f"document {seed}: {right} right so far", file=sys.stderr, flush=True)
    total = documents * questions
    return {
        "tokens": tokens,
        "documents": documents,
        "questions": total,
        "right": right,
        "wrong": wrong,
        "label": "K4/V4",
        "dtype": "bfloat16",
        "bits_per_value": cache.memory().bits_per_value,
        "passed": right == total,
    }


def kl(quick: bool) -> dict[str, Any]:
    import torch

    from tqai.demo.retrieval import document
    from tqai.evaluation import cache_maker, evaluate_quality

    tokens, start = (200, 128) if quick else (1024, 512)
    model, tokenizer = load(mx.float32)
    ids = tokenizer.encode(document())[:tokens]
    torch_model, _ = demo.load(torch.float32)
    makers = [cache_maker(label, torch_model) for label in PRESETS]
    reports = evaluate_quality(torch_model, [torch.tensor(ids)], makers, prefill_tokens=start, resamples=2)
    plain = chunked_logits(model, ids, make_prompt_cache(model), start)
    entry: dict[str, Any] = {"tokens": tokens, "prefill_tokens": start, "chunk_tokens": 32, "caches": {}}
    for label in PRESETS:
        cache = tqai.patch(model, config=label, backend="mlx")
        packed = chunked_logits(model, ids, cache, start)
        tqai.unpatch(model)
        log_p, log_q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (plain, packed))
        found = float((mx.exp(log_p) * (log_p - log_q)).sum(-1)[:-1].mean())
        wanted = float(np.mean(np.concatenate([part.kl for part in reports[label].documents])))
        entry["caches"][label] = {"mlx_kl": found, "torch_kl": wanted, "ratio": found / wanted}
    entry["passed"] = all(abs(part["ratio"] - 1) <= 0.02 for part in entry["caches"].values())
    return entry


def chunked_logits(model: Any, ids: list[int], cache: Any, start: int, chunk: int = 32) -> Any:
    """Logits float32 `[tokens - start, vocabulary]`, the history read back from the cache."""
    mx.eval(model(mx.array([ids[:start]]), cache=cache))
    parts = []
    for at in range(start, len(ids), chunk):
        parts.append(model(mx.array([ids[at : at + chunk]]), cache=cache)[0].astype(mx.float32))
        mx.eval(parts[-1], [layer.state for layer in cache])
    return mx.concatenate(parts)


def random_filled(caches: list[Any], args: Any, tokens: int) -> list[Any]:
    """`caches` with `tokens` random keys and values each, bfloat16."""
    for layer, cache in enumerate(caches):
        shape = (1, args.num_key_value_heads, tokens, args.head_dim)
        keys, values = (
            mx.random.normal(shape, key=mx.random.key(2 * layer + side)).astype(mx.bfloat16)
            for side in (0, 1)
        )
        cache.update_and_fetch(keys, values)
        mx.eval(cache.state)
    return caches


def memory(quick: bool) -> dict[str, Any]:
    tokens = 511 if quick else 8191
    model, _ = load()
    entry: dict[str, Any] = {"tokens": tokens, "dtype": "bfloat16", "caches": {}}
    values = 2 * tokens * model.args.num_key_value_heads * model.args.head_dim * model.args.num_hidden_layers
    for name, make in makers(model).items():
        mx.clear_cache()
        before = mx.get_active_memory()
        caches = random_filled(make(), model.args, tokens) if "quantized" not in name else make(tokens)
        held = mx.get_active_memory() - before
        counted = sum(cache.nbytes for cache in caches)
        entry["caches"][name] = {
            "nbytes": counted,
            "allocated_bytes": held,
            "bits_per_value": 8 * counted / values,
        }
        del caches
    entry["passed"] = quick or entry["caches"]["K4/V2"]["bits_per_value"] <= 3.4
    return entry


def makers(model: Any) -> dict[str, Any]:
    """Name -> how to make the caches of all layers; quantized ones are made filled."""
    layers = len(model.layers)

    def quantized(bits: int) -> Any:
        def make(tokens: int) -> list[Any]:
            plain = random_filled([KVCache() for _ in range(layers)], model.args, tokens)
            caches = [cache.to_quantized(group_size=64, bits=bits) for cache in plain]
            for cache in caches:
                mx.eval(cache.keys, cache.values)
            return caches

        return make

    def packed(label: str) -> Any:
        def make() -> list[Any]:
            tqai.patch(model, config=label, backend="mlx")
            return list(model.make_cache())

        return make

    return {
        "KVCache": lambda: [KVCache() for _ in range(layers)],
        "quantized 4 bits": quantized(4),
        "quantized 2 bits": quantized(2),
        **{label: packed(label) for label in PRESETS},
    }


def speed(quick: bool) -> dict[str, Any]:
    lengths, repeats = ((256,), 2) if quick else ((1024, 4096, 8192), 12)
    model, _ = load()
    entry: dict[str, Any] = {"dtype": "bfloat16", "lengths": {}, "attention_errors": {}}
    for label in PRESETS:
        entry["attention_errors"][label] = attention_error(model, label)
    entry["passed"] = all(error < MAX_ERROR for error in entry["attention_errors"].values())
    if not entry["passed"]:
        return entry
    for tokens in lengths:
        row: dict[str, float] = {}
        for name, make in makers(model).items():
            caches = make(tokens) if "quantized" in name else random_filled(make(), model.args, tokens)
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                mx.eval(model(mx.array([[1]]), cache=caches), [cache.state for cache in caches])
                times.append(1e3 * (time.perf_counter() - start))
            row[name] = statistics.median(times[1:])
            tqai.unpatch(model)
        best = min(row["quantized 4 bits"], row["quantized 2 bits"])
        entry["lengths"][str(tokens)] = {
            "ms_per_token": row,
            "speedup_over_KVCache": {label: row["KVCache"] / row[label] for label in PRESETS},
            "speedup_over_best_quantized": {label: best / row[label] for label in PRESETS},
        }
    return entry


def attention_error(model: Any, label: str, tokens: int = 333) -> float:
    """Relative L2 error of one layer's attention against float64 attention to what core decodes."""
    cache = TurboQuantKVCache(tqai.CacheConfig.preset(label))
    args = model.args
    random_filled([cache], args, tokens)
    shape = (1, args.num_key_value_heads, 1, args.head_dim)
    new = [mx.random.normal(shape, key=mx.random.key(70 + side)) for side in (0, 1)]
    step = cache.store.append(*(x.astype(mx.bfloat16) for x in new))
    query = mx.random.normal((1, args.num_attention_heads, 1, args.head_dim), key=mx.random.key(99))
    found = np.array(attend_step(step, query, None, args.head_dim**-0.5).out).astype(np.float64)
    raw = np.array(mx.concatenate(list(step.slabs), axis=2))
    pages: CanonicalPages = pages_from_bytes(raw, step.page_format)
    sides = []
    for codec, encoded, recent in (
        (step.page_format.key, pages.key, step.recent.keys),
        (step.page_format.value, pages.value, step.recent.values),
    ):
        decoded = codec.decode(encoded).reshape(*raw.shape[:2], -1, args.head_dim)
        sides.append(
            np.concatenate([decoded, np.array(recent.astype(mx.float32))], axis=2).astype(np.float64)
        )
    groups = args.num_attention_heads // args.num_key_value_heads
    keys, values = (np.repeat(side, groups, axis=1) for side in sides)
    logits = np.array(query).astype(np.float64) @ keys.swapaxes(-1, -2) * args.head_dim**-0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    wanted = weights / weights.sum(-1, keepdims=True) @ values
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


PARTS = {"retrieval": retrieval, "kl": kl, "memory": memory, "speed": speed}

if __name__ == "__main__":
    sys.exit(main())
