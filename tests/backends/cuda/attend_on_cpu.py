"""The attention kernels' own text, built for the CPU and run there: in tests alone, and slowly."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tqai.backends.cuda import compile as compiling

HERE = Path(__file__).parent
BODIES = {
    "half_float": "return (float)__builtin_bit_cast(_Float16, h);",
    "float_half": "return __builtin_bit_cast(u16, (_Float16)f);",
    "float_bfloat": (
        "u32 b = __float_as_uint(f); return f != f ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;"
    ),
    "max_nan": "return a != a || b != b ? __uint_as_float(0x7fffffffu) : a > b ? a : b;",
    "max_of_warp": "return warp_maximum(__float_as_uint(absolute));",
    "exp2_fast": "return exp2f(x);",
    "rcp_fast": "return 1.0f / x;",
    "shared_address": "return (u32)((const u8*)p - blocks[block_number()].shared);",
    "own_entries": "return shared_address(lut) + 4 * lane;",
    "entry_at": "return *(const u32*)(blocks[block_number()].shared + first + 128 * code);",
    "permute": "return permuted(a, b, selector, true);",
    "mma_s8s8": "multiply<true, false>(d, a0, a1, a2, a3, b0, b1);",
    "mma_s8s8_half": "multiply<false, false>(d, a0, a1, 0, 0, b0, 0);",
    "mma_s8u8": "multiply<true, true>(d, a0, a1, a2, a3, b0, b1);",
}
TRELLIS_FILES = ("trellis_lookup.cuh", "trellis_queries.cuh", "trellis_page.cuh")
TRELLIS_BODIES = {
    "multiply_add": "return fmaf(a, b, c);",
    "load_shared": "return *(const u32*)(blocks[block_number()].shared + address);",
    "load_shared_at": "return *(const u32*)(blocks[block_number()].shared + address + AT);",
    "masked_or": "return (a & mask) | c;",
    "upper_half_plus": "return (x >> 16) + plus;",
    "either": "return (a & mask) | (b & ~mask);",
    "differing": "return (a ^ b) & mask;",
    "upper_half": "return x >> 16;",
    "mma_u8s8": "multiply<true, false, true>(d, a0, a1, a2, a3, b0, b1);",
    "mma_u8s8_half": "multiply<false, false, true>(d, a0, a1, 0, 0, b0, 0);",
    "mma_u8u8": "multiply<true, true, true>(d, a0, a1, a2, a3, b0, b1);",
    "mma_tf32": "multiply_floats(d, a0, a1, a2, a3, b0, b1);",
}
STATEMENTS = {
    r'asm volatile\("mov\.s32 .*?"=r"\(hides\)\);': "hides = 0;",
    r'asm volatile\("st\.relaxed.*?;\n': "*(float2*)to = {sendable(v.x), sendable(v.y)}; ++moves;\n",
    r'asm volatile\("ld\.relaxed.*?\.v4.*?"memory"\);': "pass(); v = *((float4*)(part(k) + j * DV) + at);",
    r'asm volatile\("ld\.relaxed.*?\.v2.*?"memory"\);': "v = *(float2*)(part(k) + COLS * DV + 2 * j);",
    r'asm volatile\("atom\.add\.acq_rel.*?"memory"\);': "arrived = (*counter)++;",
}
RUN = """
static const Params* given;
static void one_lane() {
    tqai_attend(*given);
    lanes[current].ended = true;
}
extern "C" int run(const Params* p, int x, int y, int cluster, int threads, int bytes, int at_once) {
    given = p;
    hasty = at_once;
    return run_grid(one_lane, x, y, cluster, threads, bytes);
}
"""


def built(name: str, macros: dict[str, int], directory: Path) -> ctypes.CDLL:
    """The library of a kernel file with a function `run`; 0 is what it returns when all is well."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    library = directory / f"{name}-{abs(hash(tuple(sorted(macros.items()))))}.so"
    if not library.exists():
        text = compiling.source(name)
        trellis = "TRELLIS" in macros
        for other in ("transport.cuh", *(() if trellis else TRELLIS_FILES)):
            text = text.replace(compiling.source(other), "")
        text, count = re.subn(
            r"extern __shared__ .* u8 smem\[\];", "u8* smem = blocks[block_number()].shared;", text
        )
        assert count == 1
        for function, body in (BODIES | (TRELLIS_BODIES if trellis else {})).items():
            pattern = re.compile(
                rf"(__forceinline__ \w+ {function}\([^)]*(?:\)\[4\][^)]*)?\) {{).*?\n?}}\n", re.DOTALL
            )
            text, count = pattern.subn(lambda m, body=body: m.group(1) + body + "}\n", text)
            assert count == 1, function
        for pattern, code in STATEMENTS.items():
            text = re.sub(pattern, lambda _, code=code: code, text, flags=re.DOTALL)
        left = re.search(r".{200}\basm\b.{100}", text, re.DOTALL)
        assert left is None, left.group()
        source = library.with_suffix(".cpp")
        source.write_text((HERE / "attend_on_cpu.h").read_text("utf-8") + text + RUN, "utf-8")
        command = [compiler, "-std=c++20", "-O0", "-w", "-shared", "-fPIC", "-o", str(library), str(source)]
        done = subprocess.run(
            [*command, *compiling.options(macros)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[:3000]
    return ctypes.CDLL(str(library))
