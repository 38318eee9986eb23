"""The options of the cache, declared once for all commands that make one.

    @with_cache_options
    def command(prompt: str, cache: CacheOptions, ...) -> None: ...

On the command line `cache` becomes the options below; the command gets them as one object.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial, wraps
from importlib.util import find_spec
from typing import Annotated, Any, get_type_hints

import typer

from tqai.cli.models import WRONG_USAGE
from tqai.cli.options import (
    BackendOption,
    BitsBudget,
    BitsK,
    BitsV,
    Codec,
    ConfigOption,
    LastLayerBits,
    Offsets,
    ResidualWindow,
    ScaleFormat,
    SinkTokens,
    bits_pair,
    cache_config,
)
from tqai.cli.report import CommandError
from tqai.config import CacheConfig

__all__ = ["NO_OPTIONS", "CacheOptions", "refused_by_mlx", "with_cache_options"]

_STUDY = "Activations (a study of sensitivity: saves no memory)"
_BITS = "Bits, 1 to 8."


def _bits(help_text: str, panel: str) -> Any:
    return typer.Option(help=help_text, show_default="8", rich_help_panel=panel)


@dataclass(frozen=True)
class CacheOptions:
    """What was asked for, None or False where nothing was.

    `settings()` is the configuration they make; `settings_for(model)` also reads `--tqai-config`.
    """

    config: ConfigOption = None
    bits_k: BitsK = None
    bits_v: BitsV = None
    sink_tokens: SinkTokens = None
    residual_window: ResidualWindow = None
    codec: Codec = None
    offsets: Offsets = None
    scale_format: ScaleFormat = None
    last_layer_bits: LastLayerBits = None
    bits_budget: BitsBudget = None
    use_qjl: Annotated[
        bool,
        typer.Option(
            "--use-qjl", help="Keys also hold a 1-bit sketch of their residual.", rich_help_panel="Cache"
        ),
    ] = False
    qjl_sketch_size: Annotated[
        int | None,
        typer.Option(help="Sign bits of that sketch per key.", show_default="64", rich_help_panel="Cache"),
    ] = None
    tqai_config: Annotated[
        str | None,
        typer.Option(
            "--tqai-config",
            help="Folder that tqai convert wrote; also the model, unless --model names it.",
            show_default="none",
            rich_help_panel="Cache",
        ),
    ] = None
    backend: BackendOption = None
    compress_hidden: Annotated[
        bool,
        typer.Option(
            "--compress-hidden", help="Round what enters each decoder layer.", rich_help_panel=_STUDY
        ),
    ] = False
    bits_hidden: Annotated[int | None, _bits(f"{_BITS} Of --compress-hidden.", _STUDY)] = None
    compress_ffn: Annotated[
        bool,
        typer.Option(
            "--compress-ffn", help="Round what enters each feed-forward block.", rich_help_panel=_STUDY
        ),
    ] = False
    bits_ffn: Annotated[int | None, _bits(f"{_BITS} Of --compress-ffn.", _STUDY)] = None
    compress_attn_logits: Annotated[
        bool,
        typer.Option("--compress-attn-logits", help="Round the attention logits.", rich_help_panel=_STUDY),
    ] = False
    bits_attn: Annotated[int | None, _bits(f"{_BITS} Of --compress-attn-logits.", _STUDY)] = None
    compress_all: Annotated[
        bool,
        typer.Option("--compress-all", help="--compress-hidden and --compress-ffn.", rich_help_panel=_STUDY),
    ] = False

    def model_source(self, model: str | None) -> str | None:
        """The model to load: `--model`, else the folder of `--tqai-config`, else None."""
        return model if model is not None else self.tqai_config

    def settings(self, model: Any = None) -> CacheConfig:
        """The configuration, without what `--tqai-config` holds; the default is one that `model` is served.

        Raises:
            ConfigError: no such preset, or a setting is out of range.
            CommandError: `--config` beside `--tqai-config`.
        """
        if self.config is not None and self.tqai_config is not None:
            raise CommandError("--config and --tqai-config: allowed is one of the two", WRONG_USAGE)
        refuses: Callable[[CacheConfig], str | None] | None = None
        if self.backend == "mlx":
            refuses = refused_by_mlx
        elif model is not None:
            refuses = partial(_refused_with, model=model)
        return cache_config(self.config, refuses, **self._given())

    def settings_for(self, model: Any) -> CacheConfig:
        """The configuration for a loaded model; what is given beside `--tqai-config` goes before it.

        Raises:
            ConfigError: as `settings`, or the folder is no converted model's.
            ModelMismatchError: the model is not the converted one.
        """
        own = self.settings(model)
        if self.tqai_config is None:
            return own
        from tqai.integrations.transformers.converted import converted_settings

        changes = self._given()
        if {"bits_k", "bits_v", "bits_budget", "last_layer_bits"} & changes.keys():
            changes = {"layer_bits": None, "last_layer_bits": None, **changes}  # not those of a calibration
        return converted_settings(self.tqai_config, model).with_changes(**changes)

    def _given(self) -> dict[str, Any]:
        # not "value not in (None, False)": 0 equals False, and must be refused, not overlooked
        given = {
            name: value for name, value in asdict(self).items() if value is not None and value is not False
        }
        for name in ("config", "tqai_config", "compress_all"):
            given.pop(name, None)
        if self.last_layer_bits is not None:
            given["last_layer_bits"] = bits_pair(self.last_layer_bits)
        if self.compress_all:
            given |= {"compress_hidden": True, "compress_ffn": True}
        return given


def refused_by_mlx(config: CacheConfig) -> str | None:
    """Why mlx-lm's caches do not serve a configuration, or None."""
    if find_spec("mlx_lm") is None:
        return None  # the command itself says so
    from tqai.integrations.mlx_lm.settings import refuses

    return refuses(config)


def _refused_with(config: CacheConfig, model: Any) -> str | None:
    from tqai.integrations.transformers.default import why_not_default

    return why_not_default(config, model)


NO_OPTIONS = CacheOptions()
"""Nothing asked for: the default of a command's `cache`."""


def with_cache_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with its parameter `cache` replaced by one option per field of `CacheOptions`."""
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
    ]
    option_hints = get_type_hints(CacheOptions, include_extras=True)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=option_hints[field.name],
        )
        for field in fields(CacheOptions)
    ]
    place = next(index for index, parameter in enumerate(own) if parameter.name == "cache")
    before, after = own[:place], own[place + 1 :]
    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in after]
    parameters = [*before, *options, *keyword_only]

    @wraps(command)
    def flattened(*args: Any, **kwargs: Any) -> None:
        cache = CacheOptions(**{option.name: kwargs.pop(option.name) for option in options})
        command(*args, cache=cache, **kwargs)

    del flattened.__wrapped__
    flattened.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flattened.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flattened
