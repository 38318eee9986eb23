"""PTX from a word of codes to float16 levels, two neighbouring words at a time.

The compiler takes vectors of 16-bit integers apart; written so, one shift, one mask and one fused
multiply-add each serve two codes. `slice_kernels` has the same in plain terms, for other GPUs.
"""

from __future__ import annotations

import numpy as np

__all__ = ["pair_instructions"]


def pair_instructions(coefficients: tuple[float, ...], bits: int, slices: int) -> tuple[str, ...]:
    """Instructions for each slice, from `$1` (and, for 3 bits, `$2`, the words of the top bits) to `$0`.

    1024 + 2 code is a float16 whose low bits are those of the code, one place up; times 1 / levels, less
    (1023 + levels) / levels, it is x of `polynomial.half_polynomial`, exactly.
    """
    return tuple(_instructions(coefficients, bits, i) for i in range(slices))


def _instructions(coefficients: tuple[float, ...], bits: int, i: int) -> str:
    levels = 2**bits
    width = 4 if bits == 4 else 2
    names = [f"c{k}" for k in range(len(coefficients))]
    lines = [f"{{ .reg .b32 b, t, x, y, p, m, a, {', '.join(names)};"]
    lines += [f"mov.b32 m, {_twice(1 / levels)};", f"mov.b32 a, {_twice(-(1023 + levels) / levels)};"]
    lines += [f"mov.b32 {name}, {_twice(c)};" for name, c in zip(names, coefficients, strict=True)]
    lines += [_shift("b", "$1", width * i - 1)]
    mask = 0x1E if bits == 4 else 0x6
    lines += [f"lop3.b32 b, b, 0x{mask << 16 | mask:08x}, 0x64006400, 0xea;"]
    if bits == 3:
        lines += [_shift("t", "$2", i - 3), "lop3.b32 b, t, 0x00080008, b, 0xea;"]
    lines += ["fma.rn.f16x2 x, b, m, a;", "mul.rn.f16x2 y, x, x;"]
    last = names[-1]
    for name in names[-2::-1]:
        lines.append(f"fma.rn.f16x2 p, y, {last}, {name};")
        last = "p"
    lines.append(f"mul.rn.f16x2 $0, x, {last}; }}")
    return " ".join(lines)


def _shift(to: str, source: str, right: int) -> str:
    return f"shr.b32 {to}, {source}, {right};" if right >= 0 else f"shl.b32 {to}, {source}, {-right};"


def _twice(number: float) -> str:
    bits = int(np.float16(number).view(np.uint16))
    return f"0x{bits << 16 | bits:08x}"
