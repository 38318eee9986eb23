"""What the benchmark of the embedded model measured: kept, checked by gates, shown, written, drawn."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from provenance import provenance
from rich.console import Console
from rich.table import Table

from tqai.evaluation import CacheMaker, PlotPoint, plot_kl_against_bits
from tqai.evaluation.intervals import Interval

SPEED_KL_LIMIT = 0.5
CODES_KL_SHARE = 2.5e-4

console = Console(width=132)


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
    kl_of_codes: dict[str, float] = field(default_factory=dict)
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


def gates(run: Run, full_size: bool) -> list[Gate]:
    """Checks of the measurement itself always; of the figures only at full size."""
    kl = {name: report["kl_mean"]["value"] for name, report in run.quality.items()}
    found = {name: report["correct"] for name, report in run.retrieval.items()}
    checked = [
        Gate(
            "the measure finds nothing lost in DynamicCache", kl["dynamic"] <= 1e-9, f"KL {kl['dynamic']:.2g}"
        ),
        Gate(
            f"attention on codes equals that on the decoded codes (KL <= {CODES_KL_SHARE} of the cache's)",
            all(value <= CODES_KL_SHARE * kl[name] for name, value in run.kl_of_codes.items()),
            ", ".join(f"{name} {value:.1e}" for name, value in run.kl_of_codes.items()),
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
        worst = max(speeds, key=lambda name: 0.0 if "quanto" in name else speeds[name]["kl_mean"])
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
        "kl_of_codes_against_decompressed": run.kl_of_codes,
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
