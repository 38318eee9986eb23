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
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from provenance import ROOT, provenance
from rich.console import Console
from rich.table import Table

from tqai.demo import load
from tqai.demo.retrieval import document
from tqai.errors import UnsupportedError
from tqai.evaluation import (
    CacheMaker,
    PlotPoint,
    bits_per_value,
    cache_maker,
    evaluate_quality,
    evaluate_retrieval,
    held_bytes,
    make_tasks,
    measure_speed,
    plot_kl_against_bits,
    prefill_caches,
    split_documents,
)
from tqai.evaluation.chunked import run_tokens
from tqai.evaluation.intervals import Interval

CACHES = ("dynamic", "quanto-4", "quanto-2", "K4/V4", "K4/V3", "K4/V2", "K3/V3", "K3/V2")
RESULT = ROOT / "benchmarks" / "results" / "demo_model.json"
PLOT = ROOT / "docs" / "images" / "demo_quality.svg"
RESIDUAL_PERIOD_TOKENS = 128
SPEED_KL_LIMIT = 0.5

console = Console(width=118)


@dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the committed benchmark."""

    memory_tokens: int = 8192
    documents: int = 8
    document_tokens: int = 2048
    prefill_tokens: int = 512
    chunk_tokens: int = 32
    retrieval_tokens: int = 4096
    questions: int = 50
    questions_per_document: int = 5
    speed_tokens: tuple[int, ...] = (1024, 4096, 8192)
    bursts: int = 4
    burst_tokens: int = 8
    seed: int = 0


QUICK = Settings(
    memory_tokens=1024,
    documents=2,
    document_tokens=320,
    prefill_tokens=192,
    retrieval_tokens=640,
    questions=2,
    questions_per_document=2,
    speed_tokens=(512,),
    bursts=2,
    burst_tokens=4,
)


@dataclass(frozen=True)
class Gate:
    """A statement that must hold for the result to be worth anything."""

    name: str
    passed: bool
    detail: str


@dataclass
class Run:
    """Everything measured so far."""

    settings: Settings
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)
    retrieval: dict[str, dict[str, Any]] = field(default_factory=dict)
    speed: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        console.print(f"[bold]{part}[/bold] ...")
        start = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - start, 1)
        console.print(f"  {self.seconds[part]:.0f} s")


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
        # Attention on the codes against the same codes decompressed first: must be the same numbers.
        full = cache_maker("K4/V2", model, label="K4/V2 decompressed", cache_strategy="full")
        reports = evaluate_quality(
            model, documents, [*makers, full], settings.prefill_tokens, settings.chunk_tokens
        )
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
            makers.append(cache_maker(name, model))
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


def gates(run: Run, full_size: bool) -> list[Gate]:
    """Checks of the measurement itself always; of the figures only at full size."""
    kl = {name: report["kl_mean"]["value"] for name, report in run.quality.items()}
    found = {name: report["correct"] for name, report in run.retrieval.items()}
    checked = [
        Gate(
            "the measure finds nothing lost in DynamicCache", kl["dynamic"] <= 1e-9, f"KL {kl['dynamic']:.2g}"
        ),
        Gate(
            "K4/V2 on its codes equals K4/V2 decompressed",
            abs(kl["K4/V2"] - kl["K4/V2 decompressed"]) <= 1e-3 * kl["K4/V2"],
            f"KL {kl['K4/V2']:.6f} and {kl['K4/V2 decompressed']:.6f}",
        ),
        Gate(
            "memory() says what is held",
            all(
                entry["reported"]["total_bytes"] == entry["held_bytes"]
                for entry in run.memory.values()
                if "reported" in entry
            ),
            ", ".join(
                f"{name} {entry['reported']['total_bytes'] - entry['held_bytes']:+d}"
                for name, entry in run.memory.items()
                if "reported" in entry
            ),
        ),
    ]
    for tokens, speeds in run.speed.items():
        worst = max(speeds, key=lambda name: speeds[name]["kl_mean"] if "/" in name else 0.0)
        value = speeds[worst]["kl_mean"]
        checked.append(
            Gate(
                f"tokens decoded while timing at {tokens} agree (KL <= {SPEED_KL_LIMIT})",
                value <= SPEED_KL_LIMIT,
                f"{worst} {value:.4f}",
            )
        )
    if full_size:
        questions = run.settings.questions
        bits = run.memory["K4/V2"]["bits_per_value"]
        checked += [
            Gate(
                "uncompressed retrieval >= 95%",
                found["dynamic"] >= 0.95 * questions,
                f"{found['dynamic']} of {questions}",
            ),
            Gate("K4/V4 KL <= 0.01 nats", kl["K4/V4"] <= 0.01, f"{kl['K4/V4']:.5f}"),
            Gate(
                "K4/V4 retrieval equals uncompressed",
                found["K4/V4"] >= found["dynamic"],
                f"{found['K4/V4']} and {found['dynamic']} of {questions}",
            ),
            Gate(f"K4/V2 <= 3.4 bits at {run.settings.memory_tokens}", bits <= 3.4, f"{bits:.3f}"),
        ]
    return checked


def show(run: Run, checked: list[Gate]) -> None:
    """The result as tables for people."""
    table = Table(title=f"Quality and size ({run.settings.memory_tokens} tokens)")
    for name in (
        "cache",
        "MB held",
        "bits/value",
        "mean bits",
        "KL mean (95%)",
        "KL p99",
        "top-1",
        "perplexity",
    ):
        table.add_column(name, justify="left" if name == "cache" else "right")
    table.add_column(f"found of {run.settings.questions}", justify="right")
    for name, memory in run.memory.items():
        quality = run.quality[name]
        kl = quality["kl_mean"]
        table.add_row(
            name,
            f"{memory['held_bytes'] / 1e6:.2f}",
            f"{memory['bits_per_value']:.3f}",
            f"{memory['bits_per_value_mean']:.3f}",
            f"{kl['value']:.5f} ({kl['low']:.5f}-{kl['high']:.5f})",
            f"{quality['kl_p99']['value']:.4f}",
            f"{quality['top1_agreement']['value']:.4f}",
            f"{quality['perplexity']['value']:.4f}",
            str(run.retrieval[name]["correct"]),
        )
    console.print(table)
    table = Table(title="Decoding, tokens per second (against DynamicCache), and prefill seconds")
    table.add_column("cache")
    for tokens in run.speed:
        table.add_column(f"at {tokens}", justify="right")
        table.add_column("prefill", justify="right")
    for name in run.memory:
        cells = []
        for speeds in run.speed.values():
            speed, base = speeds[name], speeds["dynamic"]
            if "withheld" in speed:
                cells += ["withheld", ""]
                continue
            ratio = speed["tokens_per_second"] / base["tokens_per_second"]
            cells += [f"{speed['tokens_per_second']:.1f} ({ratio:.2f}x)", f"{speed['prefill_seconds']:.2f}"]
        table.add_row(name, *cells)
    console.print(table)
    for gate in checked:
        mark = "[green]ok    [/green]" if gate.passed else "[red]FAILED[/red]"
        console.print(f"{mark} {gate.name}: {gate.detail}", highlight=False)
    console.print(f"{sum(run.seconds.values()):.0f} s in all")


def write(run: Run, checked: list[Gate], model: Any, path: Path) -> None:
    """The result as JSON, replaced at once, so that no half-written file is ever there."""
    result = {
        "benchmark": "demo_model",
        **provenance(),
        "model": {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        },
        "settings": asdict(run.settings),
        "gates": [asdict(gate) for gate in checked],
        "not_measured": run.not_measured,
        "memory": run.memory,
        "quality": run.quality,
        "retrieval": run.retrieval,
        "speed": run.speed,
        "seconds": run.seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
    console.print(f"wrote {path}")


def draw(run: Run, makers: list[CacheMaker], path: Path) -> None:
    """KL against the mean bits, of every cache that loses something."""
    points = [
        PlotPoint(
            maker.name,
            maker.family,
            run.memory[maker.name]["bits_per_value_mean"],
            Interval(**run.quality[maker.name]["kl_mean"]),
        )
        for maker in makers
        if maker.family != "dynamic"
    ]
    settings = run.settings
    title = (
        f"Embedded model, {settings.documents} documents of {settings.document_tokens} tokens, "
        f"bits at {settings.memory_tokens}"
    )
    plot_kl_against_bits(points, path, title)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
