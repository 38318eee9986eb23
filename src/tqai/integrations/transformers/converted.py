"""Converted models: a folder that plain transformers loads, with tqai's settings beside the weights.

config.json, *.safetensors, tokenizer   the model, its value rotation in the weights (folding.py)
tqai_config.json                        the settings of the cache, and by what they are known again
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import tqai
from tqai.cache.calibration import Calibration
from tqai.config import CacheConfig
from tqai.errors import ConfigError, ModelMismatchError
from tqai.integrations.transformers.bits import with_calibration
from tqai.integrations.transformers.folding import fold_value_rotation, value_sample
from tqai.integrations.transformers.saving import fingerprint

__all__ = ["SETTINGS_FILE", "convert", "converted_settings"]

SETTINGS_FILE = "tqai_config.json"
CALIBRATION_FILE = "calibration.json"
FORMAT, VERSION = "tqai-converted", 1
LEFT_OPEN = ("backend", "device")
SAMPLE_TOLERANCE = 0.02


def convert(
    model: Any,
    folder: str | PathLike[str],
    tokenizer: Any = None,
    *,
    source: str | None = None,
    config: CacheConfig | None = None,
    calibration: str | PathLike[str] | Calibration | None = None,
    **settings: Any,
) -> CacheConfig:
    """Write `model` to `folder` with the rotation of its values folded into its weights.

    Load it as any other model, and give `tqai.patch(model, config_path=folder)` the folder: decoding then
    skips the rotation of values. Logits equal the original's within rounding.

    Args:
        model: a transformers causal language model. Its weights are changed in place: it is the converted
            model afterwards.
        folder: a new or empty folder, or one that holds an earlier conversion.
        tokenizer: saved beside it if given.
        source: name or path of the model, for the record.
        config, settings: of the cache; see `CacheConfig`. What they say of offsets goes with them; offsets
            themselves are each sequence's own, and no part of a model.
        calibration: what `tqai calibrate` wrote: with `bits_budget`, each layer gets the bits that it buys.
            It is kept beside the settings.

    Returns:
        The settings as written: `rotation_v` is "identity".

    Raises:
        ConfigError: the folder holds something else, or a setting is out of range or already "identity".
        UnsupportedError: a model whose values cannot be rotated in its weights; nothing is written then.
    """
    chosen = CacheConfig.asked(settings)
    if config is not None:
        chosen = CacheConfig.from_dict({**config.to_dict(), **settings})
    if calibration is not None:
        if not isinstance(calibration, Calibration):
            calibration = Calibration.load(calibration)
        chosen = with_calibration(chosen, calibration, fingerprint(model))
    kind = chosen.rotation_v or chosen.rotation
    if kind == "identity":
        raise ConfigError("rotation_v='identity': there is no rotation of values to fold into the weights")
    target = Path(folder).expanduser()
    _check_target(target)
    fold_value_rotation(model, kind, chosen.seed)
    written = chosen.with_changes(rotation_v="identity", **dict.fromkeys(LEFT_OPEN))
    target.mkdir(parents=True, exist_ok=True)
    for earlier in (SETTINGS_FILE, CALIBRATION_FILE):
        (target / earlier).unlink(missing_ok=True)
    model.save_pretrained(target)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "tqai_version": tqai.__version__,
        "model": source if source is not None else getattr(model.config, "name_or_path", "") or None,
        "bits_k": written.bits_k,
        "bits_v": written.bits_v,
        "seed": written.seed,
        "settings": written.to_dict(),
        "folded_value_rotation": kind,
        "value_weights": value_sample(model),
    }
    if calibration is not None:
        calibration.save(target / CALIBRATION_FILE)
    # last, so that a folder with settings is a whole one
    (target / SETTINGS_FILE).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return written


def converted_settings(folder: str | PathLike[str], model: Any) -> CacheConfig:
    """The settings in a folder that `convert` wrote, for the model that was loaded from it.

    Raises:
        ConfigError: no such folder, or not one of these.
        ModelMismatchError: `model` is not the converted one, so that its values are not rotated.
    """
    path = Path(folder).expanduser() / SETTINGS_FILE
    content = _read(path)
    try:
        settings = CacheConfig.from_dict(content["settings"])
        sample = content["value_weights"]
    except KeyError as error:
        raise ConfigError(f"config_path={str(folder)!r}: {SETTINGS_FILE} lacks {error}") from error
    if not _same_weights(sample, value_sample(model)):
        raise ModelMismatchError(
            f"config_path={str(folder)!r} belongs to the model in that folder, whose values are rotated in "
            "its weights, and this model is another: load the model from there, or leave config_path out"
        )
    return settings


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"config_path={str(path.parent)!r}: {error.strerror or error} ({SETTINGS_FILE}); wanted is a "
            "folder that `tqai convert` wrote"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"{path} was not written by this tqai: run `tqai convert` again")
    if content.get("version") != VERSION:
        raise ConfigError(f"{path} has version {content.get('version')!r}: this tqai reads {VERSION}")
    return content


def _same_weights(expected: list[list[float]], found: list[list[float]]) -> bool:
    """Equal but for the rounding of another dtype."""
    if len(expected) != len(found) or any(len(a) != len(b) for a, b in zip(expected, found, strict=True)):
        return False
    for before, after in zip(expected, found, strict=True):
        largest = max((abs(value) for value in before), default=0.0)
        if any(abs(a - b) > SAMPLE_TOLERANCE * largest for a, b in zip(before, after, strict=True)):
            return False
    return True


def _check_target(target: Path) -> None:
    if target.is_file():
        raise ConfigError(f"{target} is a file: a folder is wanted")
    if target.is_dir() and any(target.iterdir()) and not (target / SETTINGS_FILE).is_file():
        raise ConfigError(f"{target} is not empty and holds no earlier conversion: choose another folder")
