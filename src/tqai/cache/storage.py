"""Saved caches: one safetensors file, written atomically, checked when read.

    tensors   layers.<i>.key_codes, .key_scales, .value_codes, .value_scales   canonical pages
              layers.<i>.window_keys, .window_values, .sink_keys, .sink_values  exact tokens
    metadata  {"tqai": JSON header}: format, version, settings, one entry per layer, the model's
              fingerprint, SHA-256 of every tensor and of the header itself

The canonical form belongs to no backend and no framework (docs/format.md). Every bit is covered by a
checksum, so a file that was truncated or altered is refused and never becomes a wrong cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tqai.errors import CorruptFileError, FileVersionError

__all__ = ["FORMAT_VERSION", "read_file", "write_file"]

FORMAT_NAME = "tqai-cache"
FORMAT_VERSION = 4
"""The version that is written and read. Codes of versions 1 to 3 count other levels (`core/codebook.py`,
`core/trellis_code.py`)."""


def write_file(path: str | PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write `tensors` and `header` (JSON values) to `path`; an existing file is replaced only by a whole one.

    Raises:
        OSError: the folder cannot be written. Nothing is left behind.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to save a cache in")
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    full: dict[str, Any] = {**header, "format": FORMAT_NAME, "version": FORMAT_VERSION}
    full["sha256"] = {name: _digest(tensor) for name, tensor in on_cpu.items()}
    full["header_sha256"] = _header_digest(full)
    data = save(on_cpu, {"tqai": json.dumps(full, sort_keys=True)})
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_file(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and header of a saved cache.

    Raises:
        FileNotFoundError: no such file.
        CorruptFileError: not a saved cache, truncated, or any bit altered.
        FileVersionError: written in a format version that this tqai does not read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no saved cache at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(metadata["tqai"])
        version, checksums, claimed = header["version"], header["sha256"], header.pop("header_sha256")
        if header["format"] != FORMAT_NAME:
            raise KeyError("format")
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptFileError(f"{path} is no saved cache, or is truncated: {error}") from error
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise FileVersionError(f"{path} has format version {version!r}: allowed is {FORMAT_VERSION}")
    if claimed != _header_digest(header):
        raise CorruptFileError(f"{path}: the header does not match its checksum")
    if set(checksums) != set(tensors):
        raise CorruptFileError(f"{path}: tensors are missing or were added")
    for name, tensor in tensors.items():
        if _digest(tensor) != checksums[name]:
            raise CorruptFileError(f"{path}: tensor {name} does not match its checksum")
    return tensors, header


def _digest(tensor: Tensor) -> str:
    hasher = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    if tensor.numel():
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _header_digest(header: Mapping[str, Any]) -> str:
    covered = {name: value for name, value in header.items() if name != "header_sha256"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()
