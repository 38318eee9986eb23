"""Options that several commands share, and the cache configuration that they make."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tqai.config import DEFAULT_PRESET, FALLBACK_PRESET, NAMED_PRESETS, PRESETS, STUDY_PRESETS, CacheConfig
from tqai.errors import ConfigError

__all__ = [
    "BackendOption",
    "BitsBudget",
    "BitsK",
    "BitsV",
    "Codec",
    "ConfigOption",
    "DeviceOption",
    "DtypeOption",
    "FileOption",
    "JsonOption",
    "LastLayerBits",
    "ModelOption",
    "Offsets",
    "ResidualWindow",
    "ScaleFormat",
    "SinkTokens",
    "bits_pair",
    "cache_config",
]

_PANEL = "Cache"

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Hub name or local folder of a transformers model.",
        show_default="embedded model",
    ),
]
BitsK = Annotated[
    int | None,
    typer.Option(help="Bits per key coordinate, 1 to 8.", show_default="4", rich_help_panel=_PANEL),
]
BitsV = Annotated[
    int | None,
    typer.Option(help="Bits per value coordinate, 1 to 8.", show_default="2", rich_help_panel=_PANEL),
]
_PRESET_HELP = f"Preset: {', '.join([*PRESETS, *NAMED_PRESETS, *STUDY_PRESETS])}."
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        help=_PRESET_HELP,
        show_default=f"{DEFAULT_PRESET}, where no option says how to compress",
        rich_help_panel=_PANEL,
    ),
]
ServedConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        help=_PRESET_HELP,
        show_default=f"{FALLBACK_PRESET}, where no option says how to compress",
        rich_help_panel=_PANEL,
    ),
]
SinkTokens = Annotated[
    int | None,
    typer.Option(
        "--sink-tokens",
        "--sinks",
        help="The first N tokens stay exact.",
        show_default="0",
        rich_help_panel=_PANEL,
    ),
]
ResidualWindow = Annotated[
    int | None,
    typer.Option(
        "--residual-window",
        "--window",
        help="At least the newest N tokens stay exact.",
        show_default="0",
        rich_help_panel=_PANEL,
    ),
]
Codec = Annotated[
    str | None,
    typer.Option(help="Codec: scalar, trellis or trellis256.", show_default="scalar", rich_help_panel=_PANEL),
]
Offsets = Annotated[
    str | None,
    typer.Option(
        help="Offsets of keys and values: off, on, auto.", show_default="off", rich_help_panel=_PANEL
    ),
]
ScaleFormat = Annotated[
    str | None,
    typer.Option(help="Scales: bfloat16 or log8.", show_default="bfloat16", rich_help_panel=_PANEL),
]
BitsBudget = Annotated[
    float | None,
    typer.Option(
        help="Bits per value, all-in, within which each layer gets 2, 3 or 4.",
        show_default="none",
        rich_help_panel=_PANEL,
    ),
]
LastLayerBits = Annotated[
    str | None,
    typer.Option(help="Bits of the last layer, such as K4/V4.", show_default="none", rich_help_panel=_PANEL),
]
BackendOption = Annotated[
    str | None,
    typer.Option(help="Backend that computes on the codes.", show_default="the best", rich_help_panel=_PANEL),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="Device, such as cpu or cuda:0.", show_default="a GPU if there is one"),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="Weights and exact tokens: float32, bfloat16 or float16.",
        show_default="embedded model: float32 on a CPU, else as stored",
    ),
]
FileOption = Annotated[
    str | None,
    typer.Option(help="Text file that is read before the prompt."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def cache_config(
    preset: str | None = None,
    refuses: Callable[[CacheConfig], str | None] | None = None,
    default: str | None = None,
    **settings: Any,
) -> CacheConfig:
    """The preset (or `CacheConfig.asked`, which `refuses` and `default` are for) with every setting applied
    that is not None; `last_layer_bits` is text such as "K4/V4".

    Raises:
        ConfigError: no such preset, or a setting is out of range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if isinstance(given.get("last_layer_bits"), str):
        given["last_layer_bits"] = bits_pair(given["last_layer_bits"])
    return (
        CacheConfig.asked(given, refuses, default) if preset is None else CacheConfig.preset(preset, **given)
    )


def bits_pair(text: str) -> tuple[int, int]:
    """(bits_k, bits_v) of text such as "K4/V4".

    Raises:
        ConfigError: it is no such text.
    """
    found = re.fullmatch(r"[Kk](\d+)/?[Vv](\d+)", text)
    if found is None:
        raise ConfigError(f"last_layer_bits={text!r}: wanted is such as K4/V4")
    return int(found[1]), int(found[2])
