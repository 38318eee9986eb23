"""Kernels of few warps, built for the CPU: their own text, with the few lines of PTX replaced."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tqai.backends.cuda import compile as compiling

HERE = Path(__file__).parent
GUARD_BYTES = 4096
POISON = 0xA5
REPLACED = {
    "half_float": "return (float)__builtin_bit_cast(_Float16, h);",
    "float_half": "return __builtin_bit_cast(u16, (_Float16)f);",
    "float_bfloat": "u32 b = __float_as_uint(f); return f != f ? 32767 : (b + 32767 + (b >> 16 & 1)) >> 16;",
    "max_nan": "return a != a || b != b ? NAN : a > b ? a : b;",
    "exp2_fast": "std::abort();",
    "rcp_fast": "std::abort();",
}
RUN = """
static const void* given;
static bool finished;
static void one_lane() {
    ENTRY(*(const PARAMS*)given);
    finished = true;
}
extern "C" int run(const void* params, unsigned char* shared, int blocks, int threads) {
    static unsigned char stacks[MOST_LANES][1 << 18];
    given = params;
    emulated_shared = shared;
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        for (int i = 0; i < threads; ++i) {
            getcontext(&lanes[i]);
            lanes[i].uc_stack.ss_sp = stacks[i];
            lanes[i].uc_stack.ss_size = sizeof stacks[i];
            lanes[i].uc_link = &host;
            makecontext(&lanes[i], one_lane, 0);
        }
        for (int ended = 0; ended < threads;) {
            ended = 0;
            for (running = 0; running < threads; ++running) {
                threadIdx.x = running;
                finished = false;
                swapcontext(&host, &lanes[running]);
                ended += finished;
            }
            if (ended > 0 && ended < threads) return 1;  // lanes that part ways would wait for ever on a GPU
        }
    }
    return 0;
}
"""


def built(
    name: str,
    macros: dict[str, int],
    params: str,
    entry: str,
    directory: Path,
    replaced: dict[str, str] | None = None,
) -> ctypes.CDLL:
    """The library of a kernel file with a function `run(params, shared memory, blocks, threads)`; `replaced`
    are the bodies of functions that this file alone has."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    text = compiling.source(name).replace(
        "extern __shared__ __align__(128) u8 smem[]", "u8* smem = emulated_shared"
    )
    for function, body in (REPLACED | (replaced or {})).items():
        pattern = re.compile(rf"(__forceinline__ \w+ {function}\([^)]*\) {{\n).*?\n}}", re.DOTALL)
        text, count = pattern.subn(lambda m, body=body: m.group(1) + body + "\n}", text)
        assert count == 1, function
    source = directory / "kernel.cpp"
    source.write_text(
        (HERE / "lanes.h").read_text("utf-8")
        + text.replace("#pragma unroll", "//")
        + RUN.replace("ENTRY", entry).replace("PARAMS", params),
        "utf-8",
    )
    library = directory / "kernel.so"
    command = [compiler, "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-o", str(library), str(source)]
    done = subprocess.run([*command, *compiling.options(macros)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def guarded(size: int) -> tuple[np.ndarray, int]:
    """Bytes, poisoned, with canaries around them, and the address of the first one that may be used."""
    held = np.full(size + 2 * GUARD_BYTES, POISON, dtype=np.uint8)
    start = (-held.ctypes.data) % 128
    assert start <= GUARD_BYTES
    return held, held.ctypes.data + GUARD_BYTES


def unharmed(held: np.ndarray) -> bool:
    """Whether nothing was written outside."""
    return bool((held[:GUARD_BYTES] == POISON).all() and (held[-GUARD_BYTES:] == POISON).all())
