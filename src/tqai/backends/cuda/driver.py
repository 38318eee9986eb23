"""Modules, functions and launches through the CUDA driver, in torch's context and on its stream."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from tqai.backends.cuda.compile import cubin
from tqai.errors import BackendError

__all__ = ["Kernel", "Launch", "architecture", "entry", "kernel", "shared_memory_bytes"]


SPECIFIC = ("encode_wgmma.cu",)
"""Kernels of instructions that one architecture alone has."""


def architecture(device: torch.device, specific: bool = False) -> str:
    """Such as "sm_90"; `specific`, with what no other architecture has: "sm_90a"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if specific else ''}"


@cache
def shared_memory_bytes(index: int) -> int:
    """Most shared memory that one block may ask for."""
    properties: Any = torch.cuda.get_device_properties(index)
    return int(properties.shared_memory_per_block_optin)


class _Attribute(ctypes.Structure):
    """`CUlaunchAttribute`: an id, padding to 8 bytes, and a union of 64."""

    _fields_ = [("id", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16)]


class Config(ctypes.Structure):
    """`CUlaunchConfig`."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint32),
    ]


_CLUSTER_DIMENSION = 4
_PROGRAMMATIC_SERIALIZATION = 6
_PORTABLE_CLUSTER = 8


class Kernel:
    """One function of one module on one device. Its sole parameter is a ctypes structure."""

    def __init__(self, function: Any, shared_bytes: int) -> None:
        self._function = function
        self.address = int(function)
        self._shared_limit = 48 * 1024
        self._wide_clusters = False
        self.reserve(shared_bytes)

    def reserve(self, shared_bytes: int) -> None:
        """Let launches ask for that much dynamic shared memory."""
        if shared_bytes > self._shared_limit:
            driver = _driver()
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes), "shared memory")
            self._shared_limit = shared_bytes

    def clusters(self, cluster: int, threads: int, shared_bytes: int) -> int:
        """How many clusters of so many blocks the device can hold at a time; 0 if none."""
        driver = _driver()
        self.reserve(shared_bytes)
        if cluster > _PORTABLE_CLUSTER and not self._wide_clusters:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            if int(driver.cuFuncSetAttribute(self._function, attribute, 1)[0]) != 0:
                return 0
            self._wide_clusters = True
        count = ctypes.c_int(0)
        call = Launch(self, (cluster, 1), threads, shared_bytes, cluster=cluster)
        result = entry("cuOccupancyMaxActiveClusters", 3)(
            ctypes.addressof(count), self.address, ctypes.addressof(call.config)
        )
        return count.value if result == 0 else 0

    def launch(
        self, params: ctypes.Structure, grid: tuple[int, int], threads: int, shared_bytes: int, stream: int
    ) -> None:
        """Asynchronous. Raises BackendError if the driver refuses the launch."""
        Launch(self, grid, threads, shared_bytes)(bytes(params), stream)


class Launch:
    """A kernel with its grid, ready to be launched many times; thread-safe.

    `cluster` blocks of the first axis form a cluster. With `overlap` the launch may begin while the one
    before it on the stream ends (programmatic dependent launch): the kernel itself must wait.
    """

    def __init__(
        self,
        function: Kernel,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        cluster: int = 1,
        overlap: bool = False,
    ) -> None:
        function.reserve(shared_bytes)
        self._address = function.address
        self._attributes = (_Attribute * 2)()
        count = 0
        if cluster > 1:
            self._attributes[count].id = _CLUSTER_DIMENSION
            self._attributes[count].value[:3] = (cluster, 1, 1)
            count += 1
        if overlap:
            self._attributes[count].id = _PROGRAMMATIC_SERIALIZATION
            self._attributes[count].value[0] = 1
            count += 1
        self.config = Config(
            (grid[0], grid[1], 1),
            (threads, 1, 1),
            shared_bytes,
            None,
            ctypes.addressof(self._attributes),
            count,
        )
        self._call = entry("cuLaunchKernelEx", 4)
        self._configs: dict[int, Config] = {}

    def __call__(self, params: bytes, stream: int) -> None:
        """Asynchronous. Raises BackendError if the driver refuses the launch."""
        config = self._configs.get(stream)
        if config is None:
            config = self._configs[stream] = Config.from_buffer_copy(self.config)
            config.stream = stream
        result = self._call(config, self._address, _Pointer(params), None)
        if result != 0:
            raise BackendError(f"a CUDA kernel does not launch: error {result} of the driver")


_Pointer = ctypes.c_char_p * 1


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
        code = cubin(file, macros, architecture(device, file in SPECIFIC))
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


@cache
def entry(name: str, arguments: int) -> Any:
    """A function of the driver as ctypes calls it: a fraction of the time of a call through the bindings."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        found = getattr(ctypes.CDLL(library), name)
    except (OSError, AttributeError) as error:
        raise BackendError(f"{name} of the NVIDIA driver cannot be called: {error}") from error
    if name == "cuLaunchKernelEx":
        found.argtypes = [ctypes.POINTER(Config), ctypes.c_void_p, _Pointer, ctypes.c_void_p]
    else:
        found.argtypes = [ctypes.c_void_p] * arguments
    found.restype = ctypes.c_int
    return found
