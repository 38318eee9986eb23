"""How good, how small and how fast are compressed caches on the embedded model?

    python benchmarks/demo_model.py            about 10 minutes on two cores; writes the result and the plot
    python benchmarks/demo_model.py --quick    a smoke run of every part, writes nothing

Four measurements of the same caches (transformers' DynamicCache and quanto, presets of tqai):

    memory      bytes held, found by walking to the tensors' storages, at 8192 tokens
    quality     KL and perplexity on held-out text in chunks of 32 that read the cache back
    retrieval   six-digit codes hidden in documents of 4096 tokens, exact match
    speed       tokens per second of decoding at 1024, 4096 and 8192 tokens, prefill seconds

Exits with 1 if a gate fails (see `gates`). A speed is reported only for a cache whose decoded tokens
agree with the uncompressed model's.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from demo_result import QUICK, SPEED_KL_LIMIT, Run, Settings, console, draw, gates, show, write
from provenance import ROOT

from tqai.core.page import PAGE_TOKENS
from tqai.demo import load
from tqai.demo.retrieval import document
from tqai.errors import UnsupportedError
from tqai.evaluation import (
    CacheMaker,
    bits_per_value,
    cache_maker,
    evaluate_quality,
    evaluate_retrieval,
    held_bytes,
    make_tasks,
    measure_speed,
    prefill_caches,
    score_logits,
    split_documents,
)
from tqai.evaluation.chunked import run_tokens

CACHES = ("dynamic", "quanto-4", "quanto-2", "balanced", "K4/V4", "K4/V3", "K4/V2", "K3/V3", "K3/V2")
RESULT = ROOT / "benchmarks" / "results" / "demo_model.json"
PLOT = ROOT / "docs" / "images" / "demo_quality.svg"
RESIDUAL_PERIOD_TOKENS = 128
COMPARED_CHUNKS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, nothing written, no gate on figures"
    )
    parser.add_argument("--output", type=Path, help=f"JSON file (default {RESULT.relative_to(ROOT)})")
    parser.add_argument("--plot", type=Path, help=f"svg or png file (default {PLOT.relative_to(ROOT)})")
    parser.add_argument("--model", help="folder or hub name of another model than the embedded one")
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else Settings()
    model, tokenizer = load() if arguments.model is None else load_other(arguments.model)
    text = torch.tensor(tokenizer.encode(document()))
    run = Run(settings)
    makers = make_all(model, run)
    with run.timed("memory"):
        measure_memory(model, text, makers, run)
    with run.timed("quality"):
        documents = split_documents(text, settings.document_tokens, settings.documents)
        compare_with_decompressed(model, documents[0], makers, run)
        reports = evaluate_quality(model, documents, makers, settings.prefill_tokens, settings.chunk_tokens)
        run.quality = {name: report.to_dict() for name, report in reports.items()}
    with run.timed("retrieval"):
        tasks = make_tasks(
            tokenizer,
            settings.retrieval_tokens,
            settings.questions,
            settings.questions_per_document,
            settings.seed,
        )
        found = evaluate_retrieval(model, tokenizer, tasks, makers)
        run.retrieval = {name: report.to_dict() for name, report in found.items()}
    with run.timed("speed"):
        for tokens in settings.speed_tokens:
            speeds = measure_speed(model, text, makers, tokens, settings.bursts, settings.burst_tokens)
            run.speed[str(tokens)] = {name: report.to_dict() for name, report in speeds.items()}
    checked = gates(run, full_size=not arguments.quick)
    for tokens, speeds_at in run.speed.items():
        for name in [name for name, speed in speeds_at.items() if not speed["kl_mean"] <= SPEED_KL_LIMIT]:
            speeds_at[name] = {"withheld": f"decoded tokens differ: KL {speeds_at[name]['kl_mean']:.3g} nats"}
            console.print(
                f"[yellow]speed of {name} at {tokens} withheld: {speeds_at[name]['withheld']}[/yellow]"
            )
    show(run, checked)
    output = arguments.output or (None if arguments.quick else RESULT)
    if output is not None:
        write(run, checked, model, output)
    plot = arguments.plot or (None if arguments.quick else PLOT)
    if plot is not None:
        draw(run, makers, plot)
    return 0 if all(gate.passed for gate in checked) else 1


def load_other(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(name)


def make_all(model: Any, run: Run) -> list[CacheMaker]:
    """The makers of all caches that work on this machine; the others are named in the result."""
    makers = []
    for name in CACHES:
        try:
            makers.append(replace(cache_maker(name, model), name=name))
        except UnsupportedError as error:
            run.not_measured[name] = str(error)
            console.print(f"[yellow]{name} is not measured: {error}[/yellow]")
    return makers


def measure_memory(model: Any, text: torch.Tensor, makers: list[CacheMaker], run: Run) -> None:
    """Bytes at `memory_tokens`, and the mean and the most over the chunks of the last 128 tokens.

    quanto requantizes everything each 128 tokens and keeps up to 127 tokens exact in between, so one
    length alone would flatter it or wrong it.
    """
    settings = run.settings
    tokens = settings.memory_tokens
    filled = tokens - RESIDUAL_PERIOD_TOKENS
    batch = text[None, :tokens]
    for maker, cache in zip(makers, prefill_caches(model, batch[:, :filled], makers), strict=True):
        bits = []
        for start in range(filled, tokens, settings.chunk_tokens):
            stop = start + settings.chunk_tokens
            run_tokens(model, batch[:, start:stop], cache)
            bits.append(bits_per_value(cache, model.config, stop))
        held = held_bytes(cache)
        run.memory[maker.name] = {
            "tokens": tokens,
            "held_bytes": held,
            "bits_per_value": bits[-1],
            "bits_per_value_mean": sum(bits) / len(bits),
            "bits_per_value_most": max(bits),
            "constants_bytes": held_bytes(cache, constants=True) - held,
            "settings": maker.settings,
            "family": maker.family,
        }
        if hasattr(cache, "memory"):
            run.memory[maker.name]["reported"] = cache.memory().to_dict()


def compare_with_decompressed(model: Any, text: torch.Tensor, makers: list[CacheMaker], run: Run) -> None:
    """KL of attention on the codes against the same codes decompressed, in nats per token.

    Both caches are filled anew for every chunk: what a model computes from attention that differs in rounding
    is now and then encoded as another code, and from then on the two would not hold the same any more.
    """
    settings = run.settings
    ends = range(settings.prefill_tokens, len(text) - settings.chunk_tokens, PAGE_TOKENS)
    for maker in [maker for maker in makers if maker.family == "tqai"]:
        full = cache_maker(maker.name, model, cache_strategy="full")
        kl = []
        for end in ends[:: max(1, len(ends) // COMPARED_CHUNKS)]:
            chunk = text[None, end : end + settings.chunk_tokens]
            caches = prefill_caches(model, text[None, :end], [full, maker])
            expected, got = (run_tokens(model, chunk, cache)[0] for cache in caches)
            kl += score_logits(expected, got, chunk[0, 1:]).kl.tolist()
        run.kl_of_codes[maker.name] = sum(kl) / len(kl)


if __name__ == "__main__":
    sys.exit(main())
