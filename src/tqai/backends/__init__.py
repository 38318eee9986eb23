"""Backends compute on packed pages; `resolve` says which one serves a device, and why.

Only names are imported here: a framework is loaded when its backend is asked for.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from tqai.errors import BackendError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    from tqai.backends.base import Backend
    from tqai.core.page import PageFormat

__all__ = ["BACKENDS", "Choice", "load", "resolve"]

logger = logging.getLogger("tqai")

BACKENDS: dict[str, str] = {
    "cuda": "tqai.backends.cuda:CudaBackend",
    "native": "tqai.backends.native.backend:NativeBackend",
    "torch": "tqai.backends.torch_ops:TorchBackend",
    "triton": "tqai.backends.triton:TritonBackend",
    "mlx": "tqai.backends.mlx:MlxBackend",
}
"""Backend name -> "module:class", in the order in which they are tried. "triton" comes after "torch", that
is, only when asked for: its present form has not yet passed all of its tests on a GPU. "mlx" serves arrays
of MLX and refuses every device of torch."""


@dataclass(frozen=True)
class Choice:
    """A backend and the sentence that says why it was chosen."""

    backend: Backend
    reason: str

    def __deepcopy__(self, memo: dict[int, object]) -> Choice:
        """Backends hold no state of a cache: a copied cache computes with the same one."""
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _choice_by_name, (self.backend.name, self.reason)


@cache
def load(name: str) -> Backend:
    """The backend of that name; one object per process.

    Raises:
        ConfigError: no backend of that name.
        BackendError: it cannot be loaded on this machine; the message says why.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend={name!r}: allowed are {', '.join(BACKENDS)} (or None for the best)")
    module_name, class_name = BACKENDS[name].split(":")
    try:
        backend: Backend = getattr(import_module(module_name), class_name)()
    except ImportError as error:
        raise BackendError(f"backend {name!r} cannot be loaded: {error}") from error
    return backend


def resolve(page_format: PageFormat, device_type: str, dtype: str, wanted: str | None = None) -> Choice:
    """The backend that serves these pages on this device and dtype: `wanted`, else the first that can.

    Raises:
        ConfigError: `wanted` is no backend.
        BackendError: `wanted` cannot be loaded here.
        UnsupportedError: `wanted` (or, without it, every backend) refuses; the message says why.
    """
    refusals = []
    for name in [wanted] if wanted is not None else list(BACKENDS):
        try:
            backend = load(name)
        except BackendError as error:
            if wanted is not None:
                raise
            refusals.append(f"{name}: {error}")
            continue
        refusal = backend.refuses(page_format, device_type, dtype)
        if refusal is None:
            reason = "asked for" if wanted is not None else "; ".join(["best that serves this", *refusals])
            logger.debug("backend %s for %s %s: %s", name, device_type, dtype, reason)
            return Choice(backend, reason)
        refusals.append(f"{name}: {refusal}")
    raise UnsupportedError(f"no backend for {device_type} {dtype}: {'; '.join(refusals)}")


def _choice_by_name(name: str, reason: str) -> Choice:
    return Choice(load(name), reason)
