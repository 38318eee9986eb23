"""The Metal kernels compiled as C++ and run on the CPU: the very source that is given to Metal."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np

from tqai.backends.mlx.metal import sources

HERE = Path(__file__).resolve().parent
THREADS, PAGE_TOKENS = 128, 64

TEMPLATE = """
namespace kernels_{name} {{
{header}
static void attend(
    const float* query, const uint8_t* pages, const float* key_centroids, const float* value_centroids,
    const int* ranges, const int* sizes, float* out, float* stats,
    uint3 thread_position_in_threadgroup, uint3 threadgroup_position_in_grid,
    uint thread_index_in_simdgroup, uint simdgroup_index_in_threadgroup
) {{
{attend}
}}
static void encode(
    const float* rotated_keys, const float* largest_keys, const float* rotated_values,
    const float* largest_values, const float* key_boundaries, const float* key_centroids,
    const float* value_boundaries, const float* value_centroids, uint8_t* out,
    uint3 thread_position_in_threadgroup, uint3 threadgroup_position_in_grid
) {{
{encode}
}}
}}
extern "C" void attend_{name}(
    const float* a, const uint8_t* b, const float* c, const float* d, const int* e, const int* f,
    float* out, float* stats, uint gx, uint gy, uint gz, int order
) {{
    for (uint z = 0; z < gz; z++) for (uint y = 0; y < gy; y++) for (uint x = 0; x < gx; x++)
        shim::run(128, order, [=](uint t) {{
            kernels_{name}::attend(
                a, b, c, d, e, f, out, stats, uint3{{t, 0, 0}}, uint3{{x, y, z}}, t % 32, t / 32
            );
        }});
}}
extern "C" void encode_{name}(
    const float* a, const float* b, const float* c, const float* d, const float* e, const float* f,
    const float* g, const float* h, uint8_t* out, uint pages, int order
) {{
    for (uint z = 0; z < 2; z++) for (uint y = 0; y < pages; y++)
        shim::run(64, order, [=](uint t) {{
            kernels_{name}::encode(a, b, c, d, e, f, g, h, out, uint3{{t, 0, 0}}, uint3{{0, y, z}});
        }});
}}
"""


def compiler() -> str | None:
    """A C++ compiler, or None."""
    return next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)


class CpuKernels:
    """Both kernels of several (page format, rows), in one library built in `folder`."""

    def __init__(self, folder: Path, cases: list, source=TEMPLATE, changed=lambda text: text):
        parts = ['#include "shim.h"']
        for number, (page_format, rows) in enumerate(cases):
            header = sources.header(page_format, rows)
            bodies = {kind: sources.body(kind) for kind in ("attend", "encode")}
            parts.append(changed(source.format(name=number, header=header, **bodies)))
            macros = [line.split()[1] for line in header.splitlines() if line.startswith("#define")]
            parts += [f"#undef {name}" for name in macros]
        unit, library = folder / "kernels.cpp", folder / "kernels.so"
        unit.write_text("\n".join(parts))
        flags = [
            "-std=c++17",
            "-O0",
            "-shared",
            "-fPIC",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unused-variable",
        ]
        command = [compiler(), *flags, "-Wno-unused-parameter", f"-I{HERE}", str(unit), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        self.library = ctypes.CDLL(str(library))
        self.cases = list(cases)

    def attend(self, case, query, slab, ranges, per_split, order=0):
        """`query` rotated and scaled `[batch, heads, rows, dim]`; returns out and stats."""
        page_format, rows = case
        batch, heads, pages = slab.shape[:3]
        splits = -(-pages // per_split)
        out = np.full((batch, heads, splits, rows, page_format.value.spec.head_dim), np.nan, np.float32)
        stats = np.full((batch, heads, splits, rows, 2), np.nan, np.float32)
        tables = [padded(codec.tables()["centroids"]) for codec in (page_format.key, page_format.value)]
        sizes = np.array([heads, pages, per_split], np.int32)
        inputs = [query, slab, *tables, np.asarray(ranges, np.int32), sizes, out, stats]
        self._call("attend", case, inputs, splits, heads, batch, order)
        return out, stats

    def encode(self, case, rotated_keys, largest_keys, rotated_values, largest_values, order=0):
        """Rotated `[pages, 64, dim]` and largest `[pages, 64]`; returns records `[pages, page_bytes]`."""
        page_format = case[0]
        pages = rotated_keys.shape[0]
        out = np.full((pages, page_format.page_bytes), 0xFF, np.uint8)
        tables = [
            padded(codec.tables()[name])
            for codec in (page_format.key, page_format.value)
            for name in ("boundaries", "centroids")
        ]
        inputs = [rotated_keys, largest_keys, rotated_values, largest_values, *tables, out]
        self._call("encode", case, inputs, pages, order)
        return out

    def _call(self, kind, case, arrays, *numbers):
        arrays = [np.ascontiguousarray(array) for array in arrays]
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
        name = f"{kind}_{self.cases.index(case)}"
        getattr(self.library, name)(*pointers, *(ctypes.c_int(number) for number in numbers))


def padded(table: np.ndarray) -> np.ndarray:
    """As `launch._padded_tables`."""
    return np.pad(table, (0, 256 - table.size)).astype(np.float32)
