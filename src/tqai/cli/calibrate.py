"""`tqai calibrate`: measure what each layer's keys and values need, and write it to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tqai.cli.models import WRONG_USAGE, load_model
from tqai.cli.options import DeviceOption, DtypeOption, JsonOption, ModelOption
from tqai.cli.prompts import read_text
from tqai.cli.report import CommandError, print_json, steps

__all__ = ["calibrate"]


def calibrate(
    output: Annotated[str, typer.Option("--output", "-o", help="File to write, such as calibration.json.")],
    model: ModelOption = None,
    text: Annotated[
        str | None, typer.Option(help="Text file to read.", show_default="embedded document")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are read.")] = 1024,
    prefill: Annotated[int, typer.Option(help="The first so many fill the cache and are not scored.")] = 512,
    bits_budget: Annotated[
        float, typer.Option(help="Show the bits that this budget (bits per value, all-in) buys.")
    ] = 3.25,
    codec: Annotated[str, typer.Option(help="Codec of the caches.")] = "scalar",
    sink_tokens: Annotated[int, typer.Option(help="The first N tokens stay exact.")] = 0,
    residual_window: Annotated[int, typer.Option(help="At least the newest N tokens stay exact.")] = 0,
    offsets: Annotated[str, typer.Option(help="Offsets of keys and values: off, on or auto.")] = "off",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
) -> None:
    """Measure the KL that 2, 3 and 4 bits cost in each layer, for `bits="auto"` with a calibration."""
    from tqai.config import CacheConfig
    from tqai.errors import InputError

    config = CacheConfig(
        codec=codec, sink_tokens=sink_tokens, residual_window=residual_window, offsets=offsets
    ).with_changes(bits_budget=bits_budget)
    if not Path(output).expanduser().parent.is_dir():
        raise CommandError(f"--output {output}: no such folder", WRONG_USAGE)
    content = _text(text)
    loaded = load_model(model, device, dtype)
    import torch

    from tqai.evaluation.calibrate import calibrate as measure
    from tqai.evaluation.calibrate import calibration_runs

    ids = torch.tensor(loaded.tokenizer.encode(content)[:tokens], dtype=torch.long)
    if len(ids) <= prefill:
        raise CommandError(
            f"--prefill {prefill}: the text has {len(ids)} tokens, allowed are up to {len(ids) - 1}",
            WRONG_USAGE,
        )
    layers = loaded.model.config.get_text_config(decoder=True).num_hidden_layers
    try:
        with steps(calibration_runs(layers)) as progress:
            progress.begin("calibrating")
            found = measure(loaded.model, ids, config, prefill, on_run=lambda _: progress.done())
    except InputError as error:
        raise CommandError(str(error), WRONG_USAGE) from error
    found.save(Path(output).expanduser())
    bits = found.layer_bits(config, bits_budget)
    result: dict[str, Any] = {
        "model": loaded.name,
        "output": output,
        "tokens": len(ids),
        "bits_budget": bits_budget,
        "bits_per_value": found.all_in_bits(config, bits),
        "layer_bits": [list(pair) for pair in bits],
    }
    if json:
        print_json(result)
        return
    _print(result, found)


def _text(path: str | None) -> str:
    if path is None:
        from tqai.demo.retrieval import document

        return document()
    return read_text(path, "--text")


def _print(result: dict[str, Any], found: Any) -> None:
    from rich.table import Table

    from tqai.cli.report import console

    table = Table(title=f"{result['model']}: KL in nats per token, less that of the reference")
    for name in ("layer", "K2", "K3", "K4", "V2", "V3", "V4", "bits"):
        table.add_column(name, justify="right")
    for index, (layer, bits) in enumerate(zip(found.layers, result["layer_bits"], strict=True)):
        if layer is not None:
            errors = [*layer[1].keys.values(), *layer[1].values.values()]
            table.add_row(str(index), *(f"{error:.2g}" for error in errors), "K{}/V{}".format(*bits))
    printer = console()
    printer.print(table)
    spent = f"{result['bits_per_value']:.3f} of {result['bits_budget']:g} bits per value"
    printer.print(f"{spent}; wrote {result['output']}")
