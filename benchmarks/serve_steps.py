"""Steps of the engine on a GPU without HTTP: decode throughput, memory, first tokens and gaps.

Decode steps are timed over a synthetic history: one sequence's random keys and values are encoded once and
stand in the pages of every sequence. What a step does, and how long it takes, does not depend on the numbers.
First tokens and gaps are those of real prompts.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tqai.config import CacheConfig
from tqai.server.engine import decode_graphs
from tqai.server.engine.engine import Engine
from tqai.server.engine.model import inspect_model
from tqai.server.engine.page_table import HeldPages
from tqai.server.engine.sampling import SamplingParams
from tqai.server.engine.sequence import Delta, GenerationRequest, Sequence
from tqai.server.engine.settings import EngineSettings
from tqai.server.engine.store import page_bytes_of

__all__ = [
    "decode_row",
    "dynamic_row",
    "first_token_rows",
    "gap_row",
    "generate_rows",
    "kernel_rows",
    "make_engine",
    "request",
]

WARM_UPS, STEPS = 4, 24
FORMS = ((4, 3, 1056), (4, 2, 1056), (4, 4, 528), (4, 3, 528), (2, 3, 1056), (8, 3, 528))
"""Warps, stages and programs of a launch, about."""
GRAPH_ROWS = decode_graphs.graph_rows


def make_engine(model: Any, tokenizer: Any, kind: str, **settings: Any) -> Engine:
    """`kind`: "uncompressed" or the name of a configuration such as "K4/V2"."""
    cache = None if kind == "uncompressed" else CacheConfig.preset(kind)
    return Engine(model, tokenizer, EngineSettings(cache=cache, **settings))


def request(prompt: list[int], tokens: int, **params: Any) -> GenerationRequest:
    """A greedy request that does not end early."""
    return GenerationRequest(
        prompt, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **params)
    )


def fill(engine: Engine, contexts: int, tokens: int) -> None:
    """Make `contexts` requests run that have `tokens` tokens each."""
    store, scheduler = engine.store, engine.scheduler
    pages = store.pages_after(tokens)
    for layer, shape in enumerate(store.shape.layers):
        generator = torch.Generator(store.device).manual_seed(layer)
        keys, values = (
            torch.randn(
                (pages, shape.kv_heads, 64, dim),
                generator=generator,
                device=store.device,
                dtype=store.shape.dtype,
            )
            for dim in (shape.key_dim, shape.value_dim)
        )
        store.store_pages(layer, keys, values, torch.arange(pages, device=store.device))
        slab = store.slabs[layer]
        for start in range(pages, pages * contexts, pages):
            slab[start : start + pages] = slab[:pages]
        for part in store.exact[layer]:
            part.normal_(generator=generator)
    # ids are handed out from 0 upwards
    for number in range(contexts):
        ids = store.pool.take(pages)
        sequence = Sequence(
            number,
            request([1 + (7 * n + number) % 4000 for n in range(tokens)], 4096),
            lambda event: None,
            engine.tokenizer,
            frozenset(),
            number,
            None,
        )
        sequence.tokens.append(5)
        sequence.held, sequence.computed, sequence.lead_done = [HeldPages(ids)], tokens, True
        scheduler.running.append(sequence)


def decode_row(
    model: Any, tokenizer: Any, kind: str, contexts: int, tokens: int, graphs: bool = True
) -> dict[str, Any]:
    """Milliseconds of a step of `contexts` sequences, by the scheduler and by the graph alone, and bytes."""
    _clean()
    before = torch.cuda.memory_allocated()
    pages = contexts * (-(-(tokens + 256) // 64))
    cache = None if kind == "uncompressed" else CacheConfig.preset(kind)
    shape = inspect_model(model)
    page_bytes = page_bytes_of(EngineSettings(cache=cache).for_layers(len(shape.layers)), shape)
    # the graph of this number of rows alone: others are not replayed here
    decode_graphs.graph_rows = lambda rows: [rows]
    engine = make_engine(
        model,
        tokenizer,
        kind,
        max_running=contexts,
        max_kv_bytes=pages * page_bytes,
        max_model_len=tokens + 4096,
    )
    decode_graphs.graph_rows = GRAPH_ROWS
    held = torch.cuda.memory_allocated() - before
    fill(engine, contexts, tokens)
    runner, scheduler = engine.scheduler.runner, engine.scheduler
    captured = None if runner.graphs is None else dict(runner.graphs.captured)
    usable = runner.graphs is not None and runner.graphs.usable
    if not graphs:
        runner.graphs = None
    for _ in range(WARM_UPS):
        scheduler.step()
    times = []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        scheduler.step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    figures = engine.figures()
    row: dict[str, Any] = {"kind": kind, "graphs": graphs and usable, "contexts": contexts, "tokens": tokens}
    row |= {"backend": engine.store.codes[0].name, "step_ms": statistics.median(times)}
    row |= {"mean_step_ms": statistics.mean(times), "largest_step_ms": max(times)}
    row["tokens_per_s"] = contexts / row["mean_step_ms"] * 1e3
    row |= {"allocated_bytes": held, "pages": figures.pages, "page_bytes": page_bytes}
    row |= {"used_pages": figures.used_pages, "held_bytes": figures.held_bytes}
    if graphs and usable:
        _, graph, _ = runner.graphs._steps[min(n for n in runner.graphs._steps if n >= contexts)]
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        for _ in range(8):
            graph.replay()
        ended.record()
        ended.synchronize()
        row |= {"graph_ms": started.elapsed_time(ended) / 8, "captured_s": captured}
    assert len(scheduler.running) == contexts, "requests have ended"
    del engine, runner, scheduler
    _clean()
    return row


def dynamic_row(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    """The same step by transformers' DynamicCache, all sequences of one length."""
    from transformers.cache_utils import DynamicCache

    _clean()
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    config = model.config
    with torch.inference_mode():
        for layer in range(config.num_hidden_layers):
            shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
            keys, values = (torch.randn(shape, device="cuda", dtype=model.dtype) for _ in "kv")
            cache.update(keys, values, layer)
        del keys, values
        ids = torch.zeros((batch, 1), dtype=torch.int64, device="cuda")
        times = []
        for _ in range(WARM_UPS + STEPS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    del cache
    _clean()
    model.set_attn_implementation(attention)
    step = statistics.median(times[WARM_UPS:])
    row = {"kind": "DynamicCache", "graphs": False, "contexts": batch, "tokens": tokens, "step_ms": step}
    return {**row, "tokens_per_s": batch / step * 1e3, "held_bytes": held}


class _Watched:
    """When the tokens of a request came."""

    def __init__(self, engine: Engine, wanted: GenerationRequest) -> None:
        self.times: list[float] = []
        self.ended = False
        self.sequence = engine.submit(wanted, self._take)
        accept = self.sequence.accept

        def timed(chosen: Any) -> bool:
            self.times.append(time.perf_counter())
            return accept(chosen)

        self.sequence.accept = timed  # type: ignore[method-assign]

    def _take(self, event: Any) -> None:
        self.ended = not isinstance(event, Delta)


def first_token_rows(engine: Engine, kind: str, prompts: dict[int, list[int]]) -> list[dict[str, Any]]:
    """Seconds to the first token of one prompt of each length, nothing else being served."""
    rows = []
    for length, prompt in prompts.items():
        start = time.perf_counter()
        watched = _Watched(engine, request(prompt, 2))
        assert engine.wait_idle(600)
        seconds = watched.times[0] - start
        rows.append({"kind": kind, "prompt_tokens": length, "first_token_ms": 1e3 * seconds})
    return rows


def generate_rows(model: Any, prompts: dict[int, list[int]], cudnn: bool) -> list[dict[str, Any]]:
    """Seconds to the first token of transformers' `generate`, with torch's flash attention or cuDNN's."""
    attention, rows = model.config._attn_implementation, []
    model.set_attn_implementation("sdpa")
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    for _ in range(2):  # cuDNN makes its plans the first time
        rows = []
        for length, prompt in prompts.items():
            ids = torch.tensor([prompt], device="cuda")
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
            torch.cuda.synchronize()
            row = {"kind": f"transformers generate{', cuDNN' * cudnn}", "prompt_tokens": length}
            rows.append({**row, "first_token_ms": 1e3 * (time.perf_counter() - start)})
    torch.backends.cuda.enable_cudnn_sdp(False)
    model.set_attn_implementation(attention)
    _clean()
    return rows


def gap_row(engine: Engine, kind: str, others: list[list[int]], joining: list[int]) -> dict[str, Any]:
    """Gaps between the tokens of requests that decode while a long prompt joins: from its arrival to its
    first token."""
    running = [_Watched(engine, request(prompt, 4096)) for prompt in others]
    while not all(len(watched.times) > 16 for watched in running):
        time.sleep(0.005)
    arrived = time.perf_counter()
    calm = [gap for watched in running for gap in _gaps(watched.times)[-8:]]
    joined = _Watched(engine, request(joining, 2))
    while not joined.ended:
        time.sleep(0.005)
    first = joined.times[0]
    gaps = [
        later - earlier
        for watched in running
        for earlier, later in itertools.pairwise(list(watched.times))
        if arrived < later <= first + 0.5 and earlier < first
    ]
    assert not any(watched.ended for watched in running), "requests have ended"
    for watched in running:
        engine.cancel(watched.sequence)
    assert engine.wait_idle(60)
    gaps.sort()
    row = {"kind": kind, "chunk_tokens": engine.settings.chunk_tokens, "others": len(others)}
    row |= {"joining_tokens": len(joining), "first_token_ms": 1e3 * (first - arrived), "gaps": len(gaps)}
    row |= {"calm_gap_ms": 1e3 * statistics.median(calm), "p50_gap_ms": 1e3 * statistics.median(gaps)}
    return {**row, "p99_gap_ms": 1e3 * gaps[int(0.99 * (len(gaps) - 1))], "largest_gap_ms": 1e3 * gaps[-1]}


def _gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def _clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def kernel_rows(batches: list[int], tokens: int) -> list[dict[str, Any]]:
    """Microseconds of attention of one layer by the uncompressed pages' kernel, in several forms, over tables
    of random pages, and by torch's own kernel on tensors that lie side by side."""
    from gpu_timing import graph_us

    from tqai.server.engine import exact_decode

    rows, pages = [], tokens // 64
    chosen = exact_decode.WARPS, exact_decode.STAGES, exact_decode.PROGRAMS
    draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    for batch in batches:
        query, recent = draw(batch, 32, 1, 128), draw(2, batch, 8, 64, 128)
        slabs = [draw(batch * pages, 8, 64 * 256) for _ in "ab"]
        table = torch.randperm(batch * pages, device="cuda").view(batch, pages)
        page_counts, counts = (
            torch.full((batch,), count, device="cuda", dtype=torch.int32) for count in (pages, 32)
        )
        calls = [
            partial(
                exact_decode.attend_exact_pages,
                *(query, slab, table, page_counts, recent[0], recent[1], counts, 0.09),
            )
            for slab in slabs
        ]
        for form in FORMS:
            exact_decode.WARPS, exact_decode.STAGES, exact_decode.PROGRAMS = form
            rows.append({"batch": batch, "warps_stages_programs": form, "us": graph_us(calls)})
        exact_decode.WARPS, exact_decode.STAGES, exact_decode.PROGRAMS = chosen
        del calls, slabs
        _clean()
        keys, values = draw(batch, 8, tokens, 128), draw(batch, 8, tokens, 128)
        sdpa = partial(F.scaled_dot_product_attention, query, keys, values, enable_gqa=True)
        rows.append({"batch": batch, "kind": "torch SDPA", "us": graph_us([sdpa])})
        del sdpa, keys, values
        _clean()
    return rows
