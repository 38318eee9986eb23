"""`tqai bench-kv`: a model's caches at growing context lengths, side by side."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tqai.cli.models import WRONG_USAGE, LoadedModel, load_model
from tqai.cli.options import DeviceOption, DtypeOption, FileOption, JsonOption, ModelOption
from tqai.cli.prompts import read_text
from tqai.cli.report import CommandError, console, format_bytes, print_json, steps, warn
from tqai.config import DEFAULT_PRESET, PRESETS, CacheConfig

if TYPE_CHECKING:
    import torch

    from tqai.evaluation.context_sweep import BranchReport

__all__ = ["bench_kv"]

QUICK_CONTEXTS, QUICK_CACHES, QUICK_TOKENS = (512, 1024), 1, 16
COMBINED = "bench_kv.json"


def bench_kv(
    model: ModelOption = None,
    context: Annotated[
        str, typer.Option(help="Context lengths in tokens, separated by commas.")
    ] = "512,1024,2048,4096",
    configs: Annotated[
        str | None,
        typer.Option(
            help="Presets of the cache, separated by commas.",
            show_default=f"{DEFAULT_PRESET} and all of bits alone",
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each context.")] = 32,
    quick: Annotated[
        bool, typer.Option("--quick", help="512 and 1024 tokens, the default preset, 16 tokens decoded.")
    ] = False,
    file: FileOption = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the JSON files (this model's, and all together) and the plot.",
            show_default="none written",
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
) -> None:
    """Peak memory, bytes held, speed and quality at growing contexts, uncompressed and for each preset."""
    contexts = list(QUICK_CONTEXTS) if quick else _contexts(context)
    names = _configs(configs)
    if quick:
        names, new_tokens = names[:QUICK_CACHES], min(new_tokens, QUICK_TOKENS)
    if new_tokens < 2:
        raise CommandError(f"--new-tokens {new_tokens}: allowed are whole numbers from 2", WRONG_USAGE)
    text = read_text(file)
    loaded = load_model(model, device, dtype)
    ids = _text_ids(loaded, text, max(contexts) + new_tokens + 1)

    from tqai.evaluation.context_sweep import sweep_contexts

    with steps(len(contexts) * (1 + len(names))) as progress:
        started = 0

        def begin(words: str) -> None:
            nonlocal started
            if started:
                progress.done()
            started += 1
            progress.begin(words)

        reports = sweep_contexts(loaded.model, ids, contexts, names, new_tokens, begin)
    result = {
        "model": loaded.name,
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "new_tokens": new_tokens,
        "branches": [report.to_dict() for report in reports],
    }
    if output is not None:
        _write(Path(output).expanduser(), loaded.name, result, reports)
    if json:
        print_json(result)
    else:
        _print(result, reports)


def _contexts(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise CommandError(
            f"--context {text}: allowed are whole numbers from 1, separated by commas", WRONG_USAGE
        )
    return sorted(set(found))


def _configs(text: str | None) -> list[str]:
    if text is None:
        return [DEFAULT_PRESET, *PRESETS]
    return [_preset_name(part.strip()) for part in text.split(",")]


def _preset_name(name: str) -> str:
    """As `cache_maker` takes it: presets of bits alone may be spelled in several ways."""
    label = CacheConfig.preset(name).label
    return label if label in PRESETS else name


def _text_ids(loaded: LoadedModel, text: str, tokens: int) -> torch.Tensor:
    import torch

    from tqai.demo.retrieval import document

    limit = loaded.context_tokens
    if limit is not None and tokens - 1 > limit:
        raise CommandError(f"{tokens - 1} tokens: {loaded.name} has only {limit} positions", WRONG_USAGE)
    ids = loaded.tokenizer.encode(text or document()[: 12 * tokens])
    if len(ids) < tokens:
        raise CommandError(
            f"the text has {len(ids)} tokens and {tokens} are needed: give a longer --file", WRONG_USAGE
        )
    return torch.tensor(ids[:tokens])


def _write(folder: Path, name: str, result: dict[str, Any], reports: list[BranchReport]) -> None:
    """This model's file and plot, and the file of all models, with this one's part replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = re.sub(r"[^\w.-]+", "_", name).strip("_") or "model"
    own = folder / f"bench_kv_{plain}.json"
    own.write_text(_text(result), "utf-8")
    combined = folder / COMBINED
    try:
        models = json.loads(combined.read_text("utf-8"))["models"] if combined.is_file() else {}
    except (ValueError, KeyError) as error:
        raise CommandError(f"{combined} holds something else ({error}): move it away") from error
    models[name] = result
    combined.write_text(_text({"models": models}), "utf-8")
    if find_spec("matplotlib") is None:
        warn("no plot: pip install 'tqai[plot]'")
        return
    from tqai.evaluation.sweep_plot import plot_sweep

    plot_sweep(reports, own.with_suffix(".svg"), f"{name}, {result['dtype']}, {result['device']}")


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _print(result: dict[str, Any], reports: list[BranchReport]) -> None:
    from rich import box
    from rich.table import Table

    title = f"{result['model']}, {result['dtype']}, {result['device']}"
    columns = ("context", "cache", "peak memory", "held", "bits", "tokens/s", "KL", "agree")
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, padding=0)
    context = None
    for report in reports:
        if context is not None and report.context_tokens != context:
            table.add_section()
        context = report.context_tokens
        table.add_row(
            str(context),
            "uncompressed" if report.cache == "dynamic" else report.cache,
            "-" if report.peak_bytes is None else format_bytes(report.peak_bytes),
            format_bytes(report.held_bytes),
            f"{report.bits_per_value:.2f}",
            f"{report.tokens_per_second:.1f}",
            f"{report.kl_mean:.4f}",
            f"{report.top1_agreement:.0%}",
        )
    out = console()
    out.print(table)
    out.print(
        "peak memory: above the model, over one prefill and the decoding; KL (nats per token) and agreement "
        "of the likeliest token against the uncompressed cache"
    )
