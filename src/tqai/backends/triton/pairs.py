"""PTX from words of codes to float16 levels, two neighbouring words in a register.

The compiler takes vectors of 16-bit integers apart; written so, one shift, one mask and one fused
multiply-add each serve two codes. `slice_kernels` has the same in plain terms, for other GPUs.

Words of 4 bits come in fours and all slices at once: two words by the polynomial, which keeps the pipe for
float16 busy, and two by byte permutes from a table of the same 8 magnitudes, which keep that for integers.
"""

from __future__ import annotations

import numpy as np

from tqai.backends.triton.polynomial import half_levels

__all__ = ["four_instructions", "pair_instructions"]


def pair_instructions(coefficients: tuple[float, ...], bits: int, slices: int) -> tuple[str, ...]:
    """Instructions for each slice of 2 or 3 bits, from `$1` (and, for 3, `$2`, words of top bits) to `$0`.

    1024 + 2 code is a float16 whose low bits are those of the code, one place up; times 1 / levels, less
    (1023 + levels) / levels, it is x of `polynomial.half_polynomial`, exactly.
    """
    return tuple(_instructions(coefficients, bits, i) for i in range(slices))


def four_instructions(coefficients: tuple[float, ...]) -> str:
    """Instructions for 4 bits: from `$8` (words 0, 1) and `$9` (words 2, 3) to the levels of slice i, `$2i`
    (of words 0, 1) and `$2i+1` (of words 2, 3)."""
    names = [f"c{k}" for k in range(len(coefficients))]
    registers = ["b", "x", "y", "p", "m", "a", "s", "t", "u", "v", *names, *_TABLE_NAMES, *_BYTE_NAMES]
    lines = [f"{{ .reg .b32 {', '.join(registers)};"]
    lines += _constants(coefficients, 16)
    for i in range(4):
        lines += [_shift("b", "$8", 4 * i - 1), "lop3.b32 b, b, 0x001e001e, 0x64006400, 0xea;"]
        lines += _polynomial(names, f"${2 * i}")
    magnitudes = half_levels(coefficients, 4)[8:].astype(np.float16)
    words = magnitudes.view(np.uint8).reshape(8, 2).T.copy().view("<u4").reshape(-1)
    lines += [f"mov.b32 {name}, 0x{word:08x};" for name, word in zip(_TABLE_NAMES, words, strict=True)]
    lines += [
        # s: the top bit of codes below 8; code ^ 7 of those, so that the low three bits number magnitudes
        "not.b32 s, $9;",
        "and.b32 s, s, 0x88888888;",
        "shr.b32 t, s, 3;",
        "sub.u32 t, s, t;",
        "xor.b32 t, t, $9;",
        "and.b32 u, t, 0x77777777;",
        "shr.b32 v, u, 16;",
        "prmt.b32 l0, tl0, tl1, u;",
        "prmt.b32 h0, th0, th1, u;",
        "prmt.b32 l1, tl0, tl1, v;",
        "prmt.b32 h1, th0, th1, v;",
    ]
    for i in (0, 2):  # two slices of each word, then of both
        bytes_of_both = "0x5140" if i == 0 else "0x7362"
        lines += [f"prmt.b32 t, l0, h0, {bytes_of_both};", f"prmt.b32 u, l1, h1, {bytes_of_both};"]
        for k, halves in ((i, "0x5410"), (i + 1, "0x7632")):
            lines += [
                f"prmt.b32 v, t, u, {halves};",
                _shift("x", "s", 4 * k - 12),
                f"lop3.b32 ${2 * k + 1}, x, 0x80008000, v, 0x6a;",
            ]
    return " ".join(lines) + " }"


_TABLE_NAMES = ("tl0", "tl1", "th0", "th1")
_BYTE_NAMES = ("l0", "l1", "h0", "h1")


def _constants(coefficients: tuple[float, ...], levels: int) -> list[str]:
    return [
        f"mov.b32 m, {_twice(1 / levels)};",
        f"mov.b32 a, {_twice(-(1023 + levels) / levels)};",
        *(f"mov.b32 c{k}, {_twice(c)};" for k, c in enumerate(coefficients)),
    ]


def _polynomial(names: list[str], to: str) -> list[str]:
    lines = ["fma.rn.f16x2 x, b, m, a;", "mul.rn.f16x2 y, x, x;"]
    last = names[-1]
    for name in names[-2::-1]:
        lines.append(f"fma.rn.f16x2 p, y, {last}, {name};")
        last = "p"
    return [*lines, f"mul.rn.f16x2 {to}, x, {last};"]


def _instructions(coefficients: tuple[float, ...], bits: int, i: int) -> str:
    names = [f"c{k}" for k in range(len(coefficients))]
    lines = [f"{{ .reg .b32 b, t, x, y, p, m, a, {', '.join(names)};", *_constants(coefficients, 2**bits)]
    lines += [_shift("b", "$1", 2 * i - 1), "lop3.b32 b, b, 0x00060006, 0x64006400, 0xea;"]
    if bits == 3:
        lines += [_shift("t", "$2", i - 3), "lop3.b32 b, t, 0x00080008, b, 0xea;"]
    return " ".join([*lines, *_polynomial(names, "$0"), "}"])


def _shift(to: str, source: str, right: int) -> str:
    return f"shr.b32 {to}, {source}, {right};" if right >= 0 else f"shl.b32 {to}, {source}, {-right};"


def _twice(number: float) -> str:
    bits = int(np.float16(number).view(np.uint16))
    return f"0x{bits << 16 | bits:08x}"
