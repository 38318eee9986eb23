"""Modules, functions and launches through the CUDA driver, in torch's context and on its stream."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from tqai.backends.cuda.compile import cubin
from tqai.errors import BackendError

__all__ = ["Kernel", "architecture", "kernel", "shared_memory_bytes"]


def architecture(device: torch.device) -> str:
    """Such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def shared_memory_bytes(index: int) -> int:
    """Most shared memory that one block may ask for."""
    properties: Any = torch.cuda.get_device_properties(index)
    return int(properties.shared_memory_per_block_optin)


class Kernel:
    """One function of one module on one device. `launch` takes a ctypes structure, the sole parameter."""

    def __init__(self, function: Any, shared_bytes: int) -> None:
        driver = _driver()
        self._function = function
        self._launch = driver.cuLaunchKernel
        self._shared_limit = 48 * 1024
        self.reserve(shared_bytes)

    def reserve(self, shared_bytes: int) -> None:
        """Let launches ask for that much dynamic shared memory."""
        if shared_bytes > self._shared_limit:
            driver = _driver()
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes), "shared memory")
            self._shared_limit = shared_bytes

    def launch(
        self, params: ctypes.Structure, grid: tuple[int, int], threads: int, shared_bytes: int, stream: int
    ) -> None:
        """Asynchronous. Raises BackendError if the driver refuses the launch."""
        self.reserve(shared_bytes)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        result = self._launch(
            self._function,
            grid[0],
            grid[1],
            1,
            threads,
            1,
            1,
            shared_bytes,
            stream,
            ctypes.addressof(pointers),
            0,
        )
        if result[0] != 0:
            raise BackendError(f"a CUDA kernel does not launch: {result[0]}")


_KERNELS: dict[tuple[Any, ...], Kernel] = {}


def kernel(
    file: str, entry: str, macros: Mapping[str, int], device: torch.device, shared_bytes: int
) -> Kernel:
    """The function `entry` of `file` for these macros on this device, compiled and loaded once.

    Raises:
        BackendError: it does not compile or load.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    key = (file, entry, tuple(sorted(macros.items())), index)
    found = _KERNELS.get(key)
    if found is None:
        driver = _driver()
        code = cubin(file, macros, architecture(device))
        with torch.cuda.device(index):
            torch.cuda.current_stream()  # makes torch's context current
            module = _check(driver.cuModuleLoadData(code), f"loading {file}")
            function = _check(driver.cuModuleGetFunction(module, entry.encode()), entry)
        found = _KERNELS[key] = Kernel(function, shared_bytes)
    return found


def _check(result: tuple[Any, ...], what: str) -> Any:
    if int(result[0]) != 0:
        raise BackendError(f"{what}: {result[0]}")
    return result[1] if len(result) > 1 else None


@cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(f"the CUDA backend needs cuda-core (pip install 'tqai[cuda]'): {error}") from error
    return driver
