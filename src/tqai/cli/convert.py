"""`tqai convert`: a model with its value rotation in the weights, and tqai's settings beside it."""

from __future__ import annotations

from typing import Annotated

import typer

from tqai.cli.models import WRONG_USAGE, load_model
from tqai.cli.options import (
    BitsK,
    BitsV,
    Codec,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LastLayerBits,
    ModelOption,
    Offsets,
    ResidualWindow,
    SinkTokens,
    cache_config,
)
from tqai.cli.report import CommandError, print_json

__all__ = ["convert"]


def convert(
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder to write: new, empty, or of an earlier conversion.")
    ],
    model: ModelOption = None,
    config: ConfigOption = None,
    bits_k: BitsK = None,
    bits_v: BitsV = None,
    sink_tokens: SinkTokens = None,
    residual_window: ResidualWindow = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="File of tqai calibrate; spends --bits-budget.", show_default="none"),
    ] = None,
    bits_budget: Annotated[
        float | None, typer.Option(help="Bits per value, all-in, over the layers.", show_default="none")
    ] = None,
    codec: Codec = None,
    offsets: Offsets = None,
    last_layer_bits: LastLayerBits = None,
    seed: Annotated[int, typer.Option(help="Seed of the rotation.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
) -> None:
    """Write a model whose values come rotated, so that decoding need not; plain transformers loads it too."""
    settings = cache_config(
        config,
        bits_k=bits_k,
        bits_v=bits_v,
        sink_tokens=sink_tokens,
        residual_window=residual_window,
        seed=seed,
        bits_budget=bits_budget,
        codec=codec,
        offsets=offsets,
        last_layer_bits=last_layer_bits,
    )
    if calibration is not None and bits_budget is None:
        raise CommandError("--calibration needs --bits-budget, the bits per value to spend", WRONG_USAGE)
    if not output:
        raise CommandError("--output is empty: a folder is wanted", WRONG_USAGE)
    loaded = load_model(model, device, dtype)
    import tqai
    from tqai.integrations.transformers.converted import SETTINGS_FILE

    written = tqai.convert(
        loaded.model, output, loaded.tokenizer, source=loaded.name, config=settings, calibration=calibration
    )
    if json:
        print_json({"model": loaded.name, "output": output, "settings": written.to_dict()})
        return
    print(f"Wrote {loaded.name} to {output}, its value rotation in the weights, settings in {SETTINGS_FILE}.")
    print(f"  tqai run PROMPT --tqai-config {output}")
    print(f'  tqai.patch(model, config_path="{output}")    with the model loaded from there')
