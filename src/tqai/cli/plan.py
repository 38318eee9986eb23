"""`tqai plan`: what a model's cache takes in a given memory, and the command lines for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tqai.cli.models import WRONG_USAGE, check_torch
from tqai.cli.options import JsonOption
from tqai.cli.report import CommandError, console, format_bytes, print_json
from tqai.cli.serve import parse_bytes
from tqai.config import NAMED_PRESETS, PRESETS

__all__ = ["plan"]

SPARE = 0.1
"""Share of the memory that is left for activations and the allocator."""


def plan(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Hub name or local folder; only its config is read.",
            show_default="embedded model",
        ),
    ] = None,
    memory: Annotated[str, typer.Option(help="Memory of all devices together, such as 80GiB.")] = "80GiB",
    context: Annotated[int, typer.Option(min=1, help="Tokens of one sequence.")] = 32768,
    config: Annotated[
        str, typer.Option("--config", help=f"bfloat16 or a preset: {', '.join((*PRESETS, *NAMED_PRESETS))}.")
    ] = "K4/V2",
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of one machine; 0: CPU.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    weights: Annotated[
        str | None,
        typer.Option(help="Size of the weights, such as 16GB.", show_default="counted from the config"),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say what fits into a memory at each preset, and how this or another engine is started for it."""
    check_torch()
    from tqai.server.planning import CACHES, cache_layers, cache_named, commands, held, weight_bytes

    wanted, _ = cache_named(config)
    room = parse_bytes(memory, "--memory")
    name, found = _config_of(model)
    layers = cache_layers(found)
    weights_bytes = weight_bytes(found) if weights is None else parse_bytes(weights, "--weights")
    free = int(room * (1 - SPARE)) - weights_bytes
    rows = held(layers, free, context)
    lines = commands(name, wanted, context, gpus, nodes)
    if model is None:
        lines = {"tqai": lines["tqai"].replace(f" -m '{name}'", "")}  # no other engine has this model
    if json:
        print_json(
            {
                "model": name,
                "memory_bytes": room,
                "weights_bytes": weights_bytes,
                "cache_bytes": max(free, 0),
                "context_tokens": context,
                "layers": [
                    {
                        **asdict(layer),
                        "bytes_per_token": {
                            name: layer.bytes_per_token(cache) for name, cache in map(cache_named, CACHES)
                        },
                    }
                    for layer in layers
                ],
                "held": [asdict(row) for row in rows],
                "config": wanted,
                "commands": lines,
            }
        )
        return
    _print(name, room, weights_bytes, free, context, layers, rows, wanted, lines)


def _print(
    name: str,
    room: int,
    weights_bytes: int,
    free: int,
    context: int,
    layers: list[Any],
    rows: list[Any],
    wanted: str,
    lines: dict[str, str],
) -> None:
    from rich.table import Table

    from tqai.server.planning import cache_named

    screen = console()
    for_cache = f"{format_bytes(max(free, 0))} for the cache in {format_bytes(room)}"
    print(f"{name}: {format_bytes(weights_bytes)} of weights, {for_cache}")
    kinds = Table(
        "layers",
        "kind",
        "KV heads x dim",
        "window",
        "bfloat16, bytes per token",
        f"{wanted}, bytes per token",
    )
    cache = cache_named(wanted)[1]
    for layer in layers:
        kinds.add_row(
            str(layer.count),
            layer.kind,
            f"{layer.kv_heads} x {layer.head_dim}" if layer.grows else "-",
            str(layer.sliding_window or "-"),
            f"{layer.bytes_per_token(None):.0f}" if layer.grows else "constant",
            f"{layer.bytes_per_token(cache):.0f}" if layer.grows else "constant",
        )
    screen.print(kinds)
    fits = Table(
        "cache", "bytes per token", f"one of {context} tokens", f"fit of {context}", "longest one, tokens"
    )
    for row in rows:
        fits.add_row(
            row.label,
            f"{row.bytes_per_token:.0f}",
            format_bytes(row.context_bytes),
            str(row.contexts),
            str(row.longest_tokens),
        )
    screen.print(fits)
    for engine, line in lines.items():
        print(f"{engine}: {line}")


def _config_of(name: str | None) -> tuple[str, Any]:
    from transformers import AutoConfig

    from tqai import demo

    source = str(demo.model_path()) if name is None else name
    local = Path(source).expanduser().is_dir()
    try:
        found = AutoConfig.from_pretrained(source, local_files_only=local)
    except Exception as error:  # a damaged folder or an unknown name fails in any of a dozen ways
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CommandError(f"model {source}: {reason}", WRONG_USAGE) from error
    return ("embedded model" if name is None else name), found
