"""CUDA C++ to machine code at first use: NVRTC through cuda-core, cached on disk.

A kernel is compiled for one set of macros and one architecture. Its cubin is kept under
`$TQAI_CACHE_DIR`, else `$XDG_CACHE_HOME/tqai`, else `~/.cache/tqai`, in `kernels/<sha256>.cubin`, named by
the source text, the macros, the architecture and the compiler's version; written to a temporary file
first and renamed, so that processes may race. A cache that cannot be written costs a warning, not the run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from importlib import metadata, resources
from pathlib import Path

from tqai.errors import BackendError

__all__ = ["cache_directory", "cubin", "options", "source"]

logger = logging.getLogger("tqai")

_IMPORTING = threading.Lock()
"""Two threads that import cuda.core for the first time can see half of it."""
INCLUDE = re.compile(r'^#include "([a-z_]+\.cuh)"$', re.MULTILINE)


@cache
def source(name: str) -> str:
    """Text of a kernel file of this package with its own includes put in place: NVRTC needs no path."""
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return INCLUDE.sub(lambda match: source(match.group(1)), text)


def options(macros: Mapping[str, int]) -> list[str]:
    """Macro definitions for a command line, sorted by name."""
    return [f"-D{name}={value}" for name, value in sorted(macros.items())]


def cache_directory() -> Path:
    """Where compiled kernels are kept; not made here."""
    chosen = os.environ.get("TQAI_CACHE_DIR")
    if chosen:
        return Path(chosen) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tqai" / "kernels"


def cubin(name: str, macros: Mapping[str, int], arch: str) -> bytes:
    """Machine code of a kernel file for `arch` ("sm_90"), from the cache or compiled.

    Raises:
        BackendError: cuda-core is missing, or the compiler refuses; the message has its log.
    """
    text = source(name)
    key = hashlib.sha256(repr((text, options(macros), arch, _compiler_version())).encode()).hexdigest()
    path = cache_directory() / f"{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    code = _compile(text, name, macros, arch)
    _keep(path, code)
    return code


def _compiler_version() -> tuple[str, ...]:
    found = []
    for package in ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)


def _compile(text: str, name: str, macros: Mapping[str, int], arch: str) -> bytes:
    with _IMPORTING:
        try:
            from cuda.core import Program, ProgramOptions
        except ImportError as first:
            try:
                from cuda.core.experimental import Program, ProgramOptions
            except ImportError as error:
                raise BackendError(
                    f"the CUDA backend compiles with cuda-core (pip install 'tqai[cuda]'): {first}; {error}"
                ) from error
    definitions = [(key, str(value)) for key, value in sorted(macros.items())]
    try:
        settings = ProgramOptions(name=name, std="c++17", arch=arch, define_macro=definitions)
        program = Program(text, "c++", settings)
        made = program.compile("cubin")
        return bytes(made.code)
    except Exception as error:  # whatever the compiler or its bindings raise is the same to the caller
        raise BackendError(f"{name} does not compile for {arch}: {error}") from error


def _keep(path: Path, code: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(code)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("compiled kernels cannot be kept in %s: %s", path.parent, error)
