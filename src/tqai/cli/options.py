"""Options that several commands share, and the cache configuration that they make."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tqai.config import PRESETS, STUDY_PRESETS, CacheConfig

__all__ = [
    "BackendOption",
    "BitsK",
    "BitsV",
    "ConfigOption",
    "DeviceOption",
    "DtypeOption",
    "FileOption",
    "JsonOption",
    "ModelOption",
    "ResidualWindow",
    "SinkTokens",
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
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config", help=f"Preset: {', '.join([*PRESETS, *STUDY_PRESETS])}.", rich_help_panel=_PANEL
    ),
]
SinkTokens = Annotated[
    int | None,
    typer.Option(help="The first N tokens stay exact.", show_default="0", rich_help_panel=_PANEL),
]
ResidualWindow = Annotated[
    int | None,
    typer.Option(help="At least the newest N tokens stay exact.", show_default="0", rich_help_panel=_PANEL),
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


def cache_config(preset: str | None = None, **settings: Any) -> CacheConfig:
    """The preset (or the default) with every setting applied that is not None.

    Raises:
        ConfigError: no such preset, or a setting is out of range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    return CacheConfig(**given) if preset is None else CacheConfig.preset(preset, **given)
